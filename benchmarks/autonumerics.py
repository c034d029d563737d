"""Programs evolved for 2^x on [0, 1] with up to 10 operations, beside Taylor, minimax polynomials and rationals.

Three seeds, each with a budget of CPU seconds of its own process; a run that was stopped continues from its state.
Then one search for programs in float32 arithmetic with fma, on [-1/2, 1/2], checked on two million other points.

    python benchmarks/autonumerics.py --seconds 600 --states /tmp/states   # three processes, 10 CPU minutes each
"""

import argparse
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from _runner import write_result

from lightning_opt.solvers.autonumerics import ParetoFront, Problem, evolve
from lightning_opt.solvers.autonumerics.baselines import Baseline, baselines
from lightning_opt.solvers.autonumerics.picture import draw

PICTURE = Path(__file__).parents[1] / "docs" / "methods" / "img" / "autonumerics.png"
PAPER = {"ops": 10, "digits": 14.3}  # arXiv:2312.08472


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--function", default="exp2")
    parser.add_argument("--max_ops", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--float32_evals", type=int, default=9600, help="programs to fit in float32")
    parser.add_argument("--states", type=Path, required=True, help="folder for the states of the searches")
    options = parser.parse_args()
    options.states.mkdir(parents=True, exist_ok=True)
    jobs = [(options.function, options.max_ops, options.seconds, seed, options.states) for seed in options.seeds]
    with ProcessPoolExecutor(len(jobs), mp_context=get_context("spawn")) as pool:
        fronts = list(pool.map(search, jobs))
    problem = Problem(options.function)
    rivals = baselines(problem, options.max_ops)
    rows = {str(ops): row(ops, fronts, rivals) for ops in range(1, options.max_ops + 1)}
    for ops, values in rows.items():
        print(ops, *(f"{name} {value}" for name, value in values.items()), sep="  ")
    float32 = search_float32(options.states, options.float32_evals)
    payload = {
        "function": options.function,
        "domain": list(problem.domain),
        "error": problem.error,
        "digits_by_ops": rows,
        "paper": PAPER,
        "searches": [searched(front) for front in fronts],
        "float32": float32,
    }
    limits = f"--seconds {options.seconds:g} --float32_evals {options.float32_evals}"
    sys.argv = [sys.argv[0], limits, "--states DIR"]  # the folder is of no account
    write_result("autonumerics", payload)
    PICTURE.parent.mkdir(exist_ok=True)
    draw(PICTURE, fronts, rivals)


def search(job: tuple[str, int, float, int, Path]) -> ParetoFront:
    function, max_ops, seconds, seed, states = job
    state = states / f"{function}_{seed}.npz"
    return evolve(function, max_ops=max_ops, budget_s=seconds, seed=seed, state=state)


def search_float32(states: Path, max_evals: int) -> dict[str, Any]:
    """Largest errors in ULP by operations: as the search measured them, and on other points, drawn at random."""
    settings: dict[str, Any] = {"max_ops": 7, "error": "ulp32", "ops": "+-*/ fma"}
    front = evolve("exp2", (-0.5, 0.5), **settings, budget_s=None, max_evals=max_evals, state=states / "float32.npz")
    rng = np.random.default_rng(5)
    small = rng.choice((-1, 1), 500_000) * 2.0 ** rng.uniform(-24, -1, 500_000)
    x = np.concatenate([rng.uniform(-0.5, 0.5, 1_500_000), small]).astype(np.float32)
    y = np.exp2(x.astype(np.float64))
    spacing = np.spacing(y.astype(np.float32)).astype(np.float64)
    result = searched(front)
    for item, entry in zip(front, result["front"], strict=True):
        errors = np.abs(item(x).astype(np.float64) - y) / spacing
        entry["on_other_points"] = {"max_ulp": float(errors.max()), "at_least_1_ulp": int((errors >= 1).sum())}
    return result


def row(ops: int, fronts: list[ParetoFront], rivals: list[Baseline]) -> dict[str, Any]:
    """Digits, ``-log10`` of the largest error, of the best with at most so many operations."""
    result: dict[str, Any] = {}
    for front in fronts:
        result[f"seed_{front.seed}"] = digits([item.max_error for item in front if item.ops <= ops])
    for kind in ("taylor", "minimax polynomial", "minimax rational"):
        result[kind.replace(" ", "_")] = digits([b.max_error for b in rivals if b.kind == kind and b.ops <= ops])
    as_fraction = [b.max_error for b in rivals if b.kind == "minimax rational" and b.ops_as_fraction <= ops]
    result["minimax_rational_as_fraction"] = digits(as_fraction)
    return result


def digits(errors: list[float]) -> float | None:
    return round(-math.log10(min(errors)), 2) if errors else None


def searched(front: ParetoFront) -> dict[str, Any]:
    items = [
        {"ops": item.ops, "max_error": item.max_error, "python": item.to_python().splitlines()[2:]} for item in front
    ]
    return {"seed": front.seed, "fits": front.evals, "cpu_seconds": round(front.seconds, 1), "front": items}


if __name__ == "__main__":
    main()
