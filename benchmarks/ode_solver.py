"""Time of a neural ODE's prediction by our own solver beside torchdiffeq's and torchode's, at the same tolerances.

Run with ``LIGHTNING_OPT_DATA=<folder of MNIST> python benchmarks/ode_solver.py``; writes
``benchmarks/results/ode_solver.json``. The model is the one of arXiv:2303.02262: the 784 pixels are the state, the
dynamics a network 785 - 100 - 784 with tanh that is told the time, and a linear layer reads the state at t = 1; it is
trained for ``--steps`` batches of 512 before. The digits of scikit-learn have the same with 64 pixels and 50 units.

Every comparison alternates the solvers in one process and reports the median of the paired ratios, beside evaluations
of the network and the error, in tolerances, against a solution with a tolerance of 1e-10 in float64. ``--clock cpu``
takes the processor time of the process, which other work on the machine disturbs less.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
import torchode
from _runner import paired_times, ratio_summary, write_result
from torch import Tensor, nn

from lightning_opt.data import MNIST, Digits
from lightning_opt.ode import NeuralODE

TARGET = 1.5
MODELS = {"digits": (Digits, 64, 50, 360), "mnist": (MNIST, 784, 100, 512)}
TOLERANCES = (1e-3, 1e-5, 1e-7)
OURS = {"tsit5": "ours, tsit5", "dopri5": "ours, dopri5"}
THEIRS = "torchdiffeq, dopri5"


class Dynamics(nn.Module):
    """Two layers, each told the time."""

    def __init__(self, pixels: int, hidden: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(pixels + 1, hidden), nn.Linear(hidden + 1, pixels)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        column = t.expand(len(y))[:, None]  # torchode has a time for each sample
        return self.outer(torch.cat([torch.tanh(self.inner(torch.cat([y, column], dim=1))), column], dim=1))


def trained(name: str, steps: int) -> tuple[Dynamics, Tensor]:
    """Dynamics that classify, and a batch of test images."""
    source, pixels, hidden, count = MODELS[name]
    torch.manual_seed(0)
    dynamics, head = Dynamics(pixels, hidden), nn.Linear(pixels, 10)
    data = source()
    images, labels = data.load("train")
    optimizer = torch.optim.Adam([*dynamics.parameters(), *head.parameters()], lr=1e-3)
    block = NeuralODE(dynamics, rtol=1e-4, atol=1e-4)
    for _ in range(steps):
        batch = torch.randint(len(images), (min(512, count),))
        x = images[batch].flatten(1).float() / data.max_value
        loss = nn.functional.cross_entropy(head(block(x)), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    test, _ = data.load("test")
    return dynamics, test[:count].flatten(1).float() / data.max_value


def with_torchode(dynamics: nn.Module, images: Tensor, tolerance: float) -> Callable[[], Tensor]:
    """A prediction with a step size for each image."""
    term = torchode.ODETerm(dynamics, with_stats=True)
    controller = torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term)
    adjoint = torchode.AutoDiffAdjoint(torchode.Tsit5(term=term), controller)
    ends = torch.tensor([[0.0, 1.0]], dtype=images.dtype).expand(len(images), 2)

    def predict() -> Tensor:
        solution = adjoint.solve(torchode.InitialValueProblem(y0=images, t_eval=ends))
        predict.evaluations = int(solution.stats["n_f_evals"].max())  # type: ignore[attr-defined]
        return solution.ys[:, -1]

    return predict


def error_in_tolerances(state: Tensor, exact: Tensor, tolerance: float) -> float:
    """Root mean square of the error in the units that a solver controls."""
    return ((state.double() - exact) / (tolerance * (1 + exact.abs()))).square().mean().sqrt().item()


def predictions(name: str, steps: int, rounds: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """A row for each solver and tolerance."""
    dynamics, images = trained(name, steps)
    fine = NeuralODE(copy.deepcopy(dynamics).double(), method="dopri5", rtol=1e-10, atol=1e-10).eval()
    rows = []
    with torch.no_grad():
        exact = fine(images.double())
        for tolerance in TOLERANCES:
            options = {"rtol": tolerance, "atol": tolerance}
            blocks = {label: NeuralODE(dynamics, method=method, **options).eval() for method, label in OURS.items()}
            blocks[THEIRS] = NeuralODE(dynamics, method="dopri5", solver="torchdiffeq", **options).eval()
            calls: dict[str, Callable[[], Tensor]] = {
                label: lambda block=block: block(images) for label, block in blocks.items()
            }
            calls["torchode, tsit5"] = with_torchode(dynamics, images, tolerance)
            times = paired_times(calls, rounds, warmup=2, clock=clock)
            for label, call in calls.items():
                state = call()
                record = blocks[label].last_solve if label in blocks else None
                row = {
                    "model": name,
                    "tolerance": tolerance,
                    "solver": label,
                    "ms": 1e3 * statistics.median(times[label]),
                    "nfe": record.nfe_forward if record else call.evaluations,  # type: ignore[attr-defined]
                    "error_in_tolerances": error_in_tolerances(state, exact, tolerance),
                    "torchdiffeq_over_this": ratio_summary(times, THEIRS, label),
                }
                rows.append(row)
                ratio = row["torchdiffeq_over_this"]
                print(
                    f"{name:8}{tolerance:8.0e}  {label:22}{row['ms']:9.1f} ms{row['nfe']:5d} evaluations"
                    f"{row['error_in_tolerances']:9.2f} tolerances off{ratio['median']:7.2f}x"
                    f" ({ratio['q10']:.2f} - {ratio['q90']:.2f})"
                )
    return rows


def training_steps(name: str, steps: int, rounds: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """A row for each solver and kind of gradient, at a tolerance of 1e-5."""
    dynamics, images = trained(name, steps)
    rows = []
    for adjoint in (False, True):
        options: dict[str, Any] = {"method": "dopri5", "rtol": 1e-5, "atol": 1e-5, "adjoint": adjoint}
        blocks = {
            "ours, dopri5": NeuralODE(dynamics, **options),
            THEIRS: NeuralODE(dynamics, solver="torchdiffeq", **options),
        }
        calls = {label: lambda block=block: block(images).square().mean().backward() for label, block in blocks.items()}
        times = paired_times(calls, rounds, warmup=2, clock=clock)
        ratio = ratio_summary(times, THEIRS, "ours, dopri5")
        for label, block in blocks.items():
            calls[label]()
            assert block.last_solve is not None
            rows.append(
                {
                    "model": name,
                    "adjoint": adjoint,
                    "solver": label,
                    "ms": 1e3 * statistics.median(times[label]),
                    "nfe_forward": block.last_solve.nfe_forward,
                    "nfe_backward": block.last_solve.nfe_backward,
                    "torchdiffeq_over_this": ratio if label != THEIRS else None,
                }
            )
            print(f"{name:8}adjoint={adjoint!s:6}{label:22}{rows[-1]['ms']:9.1f} ms forward and backward")
        print(f"{'':44}{ratio['median']:.2f}x ({ratio['q10']:.2f} - {ratio['q90']:.2f})")
    return rows


def main() -> None:
    """Measure, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each solver")
    parser.add_argument("--steps", type=int, default=200, help="of training before")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    options = parser.parse_args()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "versions": {name: metadata.version(name) for name in ("torchdiffeq", "torchode")},
        "rounds": options.rounds,
        "clock": options.clock,
        "target": TARGET,
    }
    for part, measure in (("prediction", predictions), ("training", training_steps)):
        result[part] = [row for m in options.models for row in measure(m, options.steps, options.rounds, clock)]
    print(write_result("ode_solver", result))


if __name__ == "__main__":
    main()
