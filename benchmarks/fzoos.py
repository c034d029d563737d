"""FZooS beside FedZO, FedProx and SCAFFOLD: queries and rounds on quadratics that differ by client, and for macro-F1.

Quadratics as in the authors' code (20 coordinates, 5 clients, 12 rounds of 10 steps of Adam at rate 0.01; baselines go
on to 60 rounds), for two degrees C to which clients differ; then, at C = 5, each method at each of four rates on two
seeds. Digits: two clients with the images of five digits each calibrate a frozen classifier for macro-F1 with 100, 200
and 300 queries each; for each of these both methods are tuned on two other seeds, FedZO among 36 settings and FZooS
among 8. Finished runs are kept in the result file.

    python benchmarks/fzoos.py                    about half an hour on one core, and the picture
    python benchmarks/fzoos.py --part quadratic   one of the two; summary: the tables and the picture of what is on file
    python benchmarks/fzoos.py --seeds 0 1        fewer seeds
"""

import argparse
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _grid import paired_verdict
from _runner import read_result, write_result
from torch import Tensor
from tqdm import tqdm

from lightning_opt.data import Digits
from lightning_opt.models.calibrated_classifier import macro_f1, unbalanced_classifier
from lightning_opt.solvers.fzoos import MinimizeResult, fedzo_minimize, fzoos_minimize

PICTURE = Path(__file__).parents[1] / "docs" / "methods" / "img" / "fzoos.png"
COLORS = {
    "FZooS": "#4269d0",
    "FZooS without correction": "#97bbf5",
    "FedZO": "#9498a0",
    "FedProx": "#efb118",
    "SCAFFOLD": "#ff725c",
}
CORRECTIONS = {"FedZO": "none", "FedProx": "prox", "SCAFFOLD": "scaffold"}
DIM, CLIENTS, ROUNDS, BASELINE_ROUNDS = 20, 5, 12, 60
RATES, RATE_SEEDS = (0.005, 0.01, 0.02, 0.04), (0, 1)
BUDGETS = (100, 200, 300)  # queries of a client for macro-F1; methods are tuned for each
TUNING_SEEDS = (100, 101)
Objective = Callable[[Tensor], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["quadratic", "digits", "summary"], help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    done = Runs(read_result("fzoos").get("runs", {}))
    if options.part in (None, "quadratic"):
        quadratics(done, options.seeds)
    if options.part in (None, "digits"):
        digits(done, options.seeds)
    sys.argv = sys.argv[:1]
    payload = summary(done.rows, options.seeds)
    write_result("fzoos", {**payload, "runs": done.rows})
    for part, rows in payload.items():
        print(part, *(f"  {name}: {row}" for name, row in rows.items()), sep="\n")
    draw(done.rows, payload, options.seeds)


class Runs:
    """Finished runs by key; each is written to the file when it ends."""

    def __init__(self, rows: dict[str, Any]) -> None:
        self.rows = rows

    def all(self, jobs: dict[str, Callable[[], dict[str, Any]]]) -> None:
        for key, job in tqdm(jobs.items(), unit="run"):
            if key not in self.rows:
                start = time.process_time()
                self.rows[key] = {**job(), "cpu_seconds": round(time.process_time() - start, 2)}
                write_result("fzoos", {"runs": self.rows})


# Quadratics


def quadratics(done: Runs, seeds: list[int]) -> None:
    jobs = {
        f"quadratic/{c:g}/{name}/0.01/{seed}": partial(on_quadratic, c, seed, name, 0.01)
        for c, seed, name in itertools.product((5.0, 0.5), seeds, COLORS)
    }
    for rate, seed, name in itertools.product(RATES, RATE_SEEDS, COLORS):
        jobs.setdefault(f"quadratic/5/{name}/{rate:g}/{seed}", partial(on_quadratic, 5.0, seed, name, rate))
    done.all(jobs)


def on_quadratic(c: float, seed: int, name: str, lr: float) -> dict[str, Any]:
    fns, x0 = quadratic(c, seed)
    if name in CORRECTIONS:
        rounds = BASELINE_ROUNDS if lr == 0.01 else ROUNDS
        result = fedzo_minimize(fns, x0, rounds=rounds, correction=CORRECTIONS[name], lr=lr, seed=seed)
    else:
        result = fzoos_minimize(fns, x0, rounds=ROUNDS, gamma=0.0 if "without" in name else 1.0, lr=lr, seed=seed)
    return curve(result, {"F": lambda x: sum(fn(x) for fn in fns) / len(fns)})


def quadratic(c: float, seed: int) -> tuple[list[Objective], Tensor]:
    """The authors' clients, whose mean is ``0.1 / d (|z|^2 + sum z + 1)``, and a start."""
    rng = np.random.default_rng(seed)
    alpha = np.full(CLIENTS, 1 / CLIENTS)
    squares, slopes = (torch.from_numpy(1 + c * (rng.dirichlet(alpha, DIM) - 1 / CLIENTS)) for _ in range(2))

    def client(i: int) -> Objective:
        def f(x: Tensor) -> float:
            z = 20 * x.clamp(0, 1) - 10
            return float(0.1 / DIM * (squares[:, i] @ z**2 + slopes[:, i] @ z + 1))

        return f

    return [client(i) for i in range(CLIENTS)], torch.from_numpy(rng.random(DIM))


LEAST = 0.1 / DIM * (1 - DIM / 4)  # of the mean


# Macro-F1 on digits


GRID: dict[str, list[dict[str, Any]]] = {
    "FZooS": [
        {"lr": lr, "radius": radius, "noise": noise, "local_steps": 5, "active": 2, "sync_active": 10}
        for lr, radius, noise in itertools.product((0.05, 0.1), (0.2, 0.4), (1e-2, 1e-1))
    ],
    "FedZO": [
        {"lr": lr, "mu": mu, "directions": directions, "local_steps": 5}
        for lr, mu, directions in itertools.product((0.05, 0.1, 0.2), (0.1, 0.3, 0.5), (2, 5, 10, 20))
    ],
}
UNTUNED = {"lr": 0.01, "mu": 0.01, "directions": 20, "local_steps": 10}  # the authors' for their problems


def digits(done: Runs, seeds: list[int]) -> None:
    for name, settings in GRID.items():
        done.all(
            {
                f"digits-tuning/{name}/{k}/{seed}": partial(on_digits, name, chosen, seed)
                for k, chosen in enumerate(settings)
                for seed in TUNING_SEEDS
            }
        )
        done.all(
            {
                f"digits/{name}/{k}/{seed}": partial(on_digits, name, settings[k], seed)
                for k in sorted({tuned(done.rows, name, budget) for budget in BUDGETS})
                for seed in seeds
            }
        )
    done.all({f"digits/FedZO untuned/{seed}": partial(on_digits, "FedZO", UNTUNED, seed) for seed in seeds})


def tuned(rows: dict[str, Any], name: str, budget: int) -> int:
    """The number of the setting whose macro-F1 with so many queries is best on the tuning seeds."""

    def score(k: int) -> float:
        return statistics.mean(
            at(rows[f"digits-tuning/{name}/{k}/{seed}"], "macro_f1", budget) for seed in TUNING_SEEDS
        )

    return max(range(len(GRID[name])), key=score)


def on_digits(name: str, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    fns, measures = calibration(seed)
    x0 = torch.zeros(20, dtype=torch.float64)
    if name == "FZooS":
        steps, active, sync = (settings[key] for key in ("local_steps", "active", "sync_active"))
        rounds = (BUDGETS[-1] - 11) // (steps + (steps - 1) * active + 1 + sync)
        result = fzoos_minimize(fns, x0, rounds=rounds, bounds=None, seed=seed, **settings)
    else:
        rounds = max(1, BUDGETS[-1] // (settings["local_steps"] * (settings["directions"] + 1)))
        result = fedzo_minimize(fns, x0, rounds=rounds, bounds=None, seed=seed, **settings)
    return {**curve(result, measures), "settings": settings}


def calibration(seed: int) -> tuple[list[Objective], dict[str, Objective]]:
    """Two clients with five digits each, and the macro-F1 of all digits, in training and test.

    A point holds what is added to the scales and offsets of the ten logits.
    """
    data = Digits(val_size=137)
    data.setup()
    assert data.train_set is not None
    assert data.test_set is not None
    (inputs, labels), (test_inputs, test_labels) = (
        split.__getitems__(range(len(split))) for split in (data.train_set, data.test_set)
    )
    weight, bias = unbalanced_classifier(inputs, labels, 10, 60, 4, seed)
    logits, test_logits = (x.flatten(1) @ weight.T + bias for x in (inputs, test_inputs))

    def score(x: Tensor, logits: Tensor, labels: Tensor) -> float:
        x = x.float()
        return float(macro_f1(((1 + x[:10]) * logits + x[10:]).argmax(1), labels, 10))

    fns = [lambda x, part=labels // 5 == side: 1 - score(x, logits[part], labels[part]) for side in (0, 1)]
    return fns, {
        "macro_f1": lambda x: score(x, logits, labels),
        "test_macro_f1": lambda x: score(x, test_logits, test_labels),
    }


# Tables and picture


def curve(result: MinimizeResult, measures: dict[str, Objective]) -> dict[str, Any]:
    """Measures along a run, of which no query is counted."""
    values = {name: [round(measure(x), 6) for x in result.points] for name, measure in measures.items()}
    return {"queries": result.queries.tolist(), "bytes": result.num_bytes.tolist(), **values}


def summary(rows: dict[str, Any], seeds: list[int]) -> dict[str, Any]:
    payload: dict[str, Any] = {}
    for c in ("5", "0.5"):
        finished = finished_seeds(rows, c, seeds)
        if finished:
            payload[f"quadratic, C = {c}"] = {
                name: quadratic_row([rows[f"quadratic/{c}/{name}/0.01/{seed}"] for seed in finished]) for name in COLORS
            }
    keys = {
        (name, rate): [f"quadratic/5/{name}/{rate:g}/{seed}" for seed in RATE_SEEDS]
        for name in COLORS
        for rate in RATES
    }
    if all(key in rows for several in keys.values() for key in several):
        payload["quadratic, C = 5, mean F after 12 rounds by rate"] = {
            name: {f"{rate:g}": mean([rows[key]["F"][ROUNDS] for key in keys[name, rate]]) for rate in RATES}
            for name in COLORS
        }
    if all(f"digits/FedZO untuned/{seed}" in rows for seed in seeds):
        for budget in BUDGETS:
            payload[f"digits, {budget} queries of a client"] = digits_table(rows, budget, seeds)
    return payload


def finished_seeds(rows: dict[str, Any], c: str, seeds: list[int]) -> list[int]:
    """Those that all methods have run on."""
    return [seed for seed in seeds if all(f"quadratic/{c}/{name}/0.01/{seed}" in rows for name in COLORS)]


def quadratic_row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """After 12 rounds; and rounds and queries until 95% of the way to the least value is done."""
    last = [run["F"][ROUNDS] for run in runs]
    reached = []
    for run in runs:
        target = LEAST + 0.05 * (run["F"][0] - LEAST)
        reached.append(next((k for k, value in enumerate(run["F"]) if value <= target), None))
    found = [k for k in reached if k is not None]
    return {
        "F_mean": mean(last),
        "F_each": last,
        "queries": runs[0]["queries"][ROUNDS],
        "bytes_of_a_client": runs[0]["bytes"][ROUNDS],
        "reached_95%": len(found),
        "rounds_to_95%": found,
        "queries_to_95%": [run["queries"][k] for run, k in zip(runs, reached, strict=True) if k is not None],
        "cpu_seconds": mean([run["cpu_seconds"] for run in runs]),
    }


def digits_table(rows: dict[str, Any], budget: int, seeds: list[int]) -> dict[str, Any]:
    """Macro-F1 with so many queries, each method with the setting that was best for that on the tuning seeds."""
    table: dict[str, Any] = {}
    for name in (*GRID, "FedZO untuned"):
        k = f"/{tuned(rows, name, budget)}" if name in GRID else ""
        runs = [rows[f"digits/{name}{k}/{seed}"] for seed in seeds]
        table[name] = {"settings": runs[0]["settings"], "rounds": round_of(runs[0], budget)}
        for part in ("macro_f1", "test_macro_f1"):
            each = [at(run, part, budget) for run in runs]
            table[name] |= {f"{part}_mean": mean(each), f"{part}_start": mean([r[part][0] for r in runs]), part: each}
    for part in ("macro_f1", "test_macro_f1"):
        ours, theirs = table["FZooS"][part], table["FedZO"][part]
        table[f"FZooS less FedZO, {part}"] = paired_verdict(ours, theirs, larger_is_better=True)
    return table


def at(run: dict[str, Any], name: str, budget: int) -> float:
    """At the last server's point that a client has reached with at most so many queries."""
    return run[name][round_of(run, budget)]


def round_of(run: dict[str, Any], budget: int) -> int:
    return sum(queries <= 2 * budget for queries in run["queries"]) - 1


def mean(values: list[float]) -> float:
    return round(statistics.mean(values), 4)


def draw(rows: dict[str, Any], payload: dict[str, Any], seeds: list[int]) -> None:
    if len([part for part in payload if "by rate" not in part]) < 5:
        return
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
    for axes, c in zip(panels, ("5", "0.5"), strict=False):
        for name, color in COLORS.items():
            runs = [rows[f"quadratic/{c}/{name}/0.01/{seed}"] for seed in finished_seeds(rows, c, seeds)]
            gaps = np.array([run["F"] for run in runs]) - LEAST
            band(axes, np.array(runs[0]["queries"]) / 1000, gaps, color, name)
        axes.set(
            yscale="log", xlim=(0, 20), xlabel="queries of all clients, thousands", ylabel="F less its least value"
        )
        axes.set_title(f"quadratics of 5 clients that differ by C = {c}")
    for name, color in (("FZooS", COLORS["FZooS"]), ("FedZO", COLORS["FedZO"])):
        for budget, line in ((300, "-"), (100, "--")):
            k = tuned(rows, name, budget)
            if line == "--" and k == tuned(rows, name, 300):
                continue
            runs = [rows[f"digits/{name}/{k}/{seed}"] for seed in seeds]
            values = np.array([run["macro_f1"] for run in runs])
            band(
                panels[2], np.array(runs[0]["queries"]) / 2, values, color, f"{name}, tuned for {budget} queries", line
            )
    runs = [rows[f"digits/FedZO untuned/{seed}"] for seed in seeds]
    values = np.array([run["macro_f1"] for run in runs])
    band(panels[2], np.array(runs[0]["queries"]) / 2, values, COLORS["FedZO"], "FedZO, as on the left", ":")
    panels[2].set(xlabel="queries of a client", ylabel="macro-F1 of all digits", xlim=(0, BUDGETS[-1]))
    panels[2].set_title("two clients with five digits each")
    for axes in panels[1:]:
        axes.legend(frameon=False, fontsize=8)
    for axes in panels:
        axes.grid(alpha=0.25)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=120)
    plt.close(figure)


def band(axes: Any, x: np.ndarray, y: np.ndarray, color: str, label: str, line: str = "-") -> None:
    """The mean over seeds, and from the lowest to the highest."""
    axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.15, linewidth=0)
    axes.plot(x, y.mean(0), color=color, label=label, linestyle=line, linewidth=1.8)


if __name__ == "__main__":
    main()
