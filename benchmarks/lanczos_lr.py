"""Train with LanczosLRLearner, untuned, beside a grid of learning rates; and measure what it costs.

    python benchmarks/lanczos_lr.py                       all of it; about an hour on one core
    python benchmarks/lanczos_lr.py --problems digits_mlp one problem
    python benchmarks/lanczos_lr.py --cost                only the cost

Three problems: the digits with an MLP and with a convolutional network with BatchNorm (batches of 32, 8 epochs), and
Fashion-MNIST with an MLP (10,000 training images, batches of 128, 10 epochs), each at a constant rate and with one that
falls linearly to zero. Beside SGD with Nesterov momentum 0.9 at seven rates a factor of about 3 apart, the learner
begins at a rate 100 times too small and 100 times too large, a hundredth and a hundred times of the grid's best, and,
with the loss 10 times as small and as large, at the rate 0.1. Five seeds set initial weights and order, the same for
all. The learner takes its default arguments.

Cost: the time of one refresh (on 32 samples, the default, and on the whole batch) beside that of one training step of
the Fashion-MNIST ResNet, paired; from it the share of a run of 10 epochs that all refreshes take by the default
cadence, as the callback chooses it, and by one refresh every 20 steps.

Every run is written to ``benchmarks/results/lanczos_lr.json`` when it ends, and is skipped until a setting changes.
"""

import argparse
import math
import statistics
from functools import cache
from typing import Any

import lightning.pytorch as pl
import torch
from _fits import quiet_trainer
from _grid import Key, Row, loss_and_accuracy, process_pool, run_missing
from _runner import paired_times, ratio_summary, read_result, write_result
from torch import Tensor, nn

from lightning_opt.callbacks import LanczosLRLearner
from lightning_opt.callbacks._refresh_schedule import RefreshSchedule, refreshes
from lightning_opt.callbacks.lanczos_lr_learner import EFFECTIVE, RECENT
from lightning_opt.curvature import HessianOperator, lanczos, probe_mode
from lightning_opt.data import Digits, FashionMNIST
from lightning_opt.models import MLP, ResNet

FILE = "lanczos_lr"
GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SEEDS = (0, 1, 2, 3, 4)
DECAYS = ("constant", "linear")
SETTINGS = {
    "digits": {"train": 1300, "batch_size": 32, "epochs": 8},
    "fashion_mnist": {"train": 10_000, "batch_size": 128, "epochs": 10},
    "momentum": 0.9,
}
LEARNER = {
    "arguments": repr(LanczosLRLearner()),
    "effective": {str(k): v for k, v in EFFECTIVE.items()},
    "recent": RECENT,
}


def convolutional() -> nn.Module:
    """Two layers with BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


PROBLEMS = {
    "digits_mlp": ("digits", lambda: MLP(64, hidden=(128, 64))),
    "digits_cnn": ("digits", convolutional),
    "fashion_mnist_mlp": ("fashion_mnist", lambda: MLP(784, hidden=(256, 128))),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--cost", action="store_true", help="measure the cost only")
    options = parser.parse_args()
    stored = on_file()
    rows: dict[Key, Row] = {(r["problem"], r["decay"], r["method"], r["seed"]): r for r in stored["runs"]}
    if options.cost:
        stored["cost"][torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"] = cost()
    else:
        with process_pool(options.processes) as pool:

            def done(row: Row) -> None:
                print(*row.values(), flush=True)
                write(rows, stored["cost"])

            for methods in (grid_methods, learner_methods):
                keys = [
                    (problem, decay, method, seed)
                    for problem in options.problems
                    for decay in DECAYS
                    for method in methods(problem, decay, rows)
                    for seed in SEEDS
                ]
                run_missing(pool, run, keys, rows=rows, done=done)
    write(rows, stored["cost"])
    print_tables(rows, stored["cost"])


# --- runs ---


def grid_methods(problem: str, decay: str, rows: dict[Key, Row]) -> list[str]:
    return [f"SGD {lr:g}" for lr in GRID]


def learner_methods(problem: str, decay: str, rows: dict[Key, Row]) -> list[str]:
    best = float(best_of_grid(problem, decay, rows)[0].split()[1])
    return [
        f"learner from {best / 100:g}",
        f"learner from {best * 100:g}",
        "learner from 0.1, loss x 0.1",
        "learner from 0.1, loss x 10",
    ]


def run(problem: str, decay: str, method: str, seed: int) -> dict[str, Any]:
    """One run, by the Trainer."""
    torch.set_num_threads(1)
    source, make = PROBLEMS[problem]
    learns = method.startswith("learner")
    words = method.split()
    lr = float(words[2].rstrip(",") if learns else words[1])
    scale = float(words[-1]) if "loss" in words else 1.0
    torch.manual_seed(seed)
    module = Task(make(), lr, scale, decay if not learns else "constant")
    learner = LanczosLRLearner(decay="linear" if decay == "linear" else None)
    trainer = quiet_trainer(max_epochs=SETTINGS[source]["epochs"], callbacks=[learner] if learns else [])
    data = data_module(source, seed)
    trainer.fit(module, data.train_dataloader())
    loss, accuracy = loss_and_accuracy(module.net, *data.test_set.__getitems__(range(len(data.test_set))))
    return {
        "problem": problem,
        "decay": decay,
        "method": method,
        "seed": seed,
        "test_accuracy": accuracy,
        "test_loss": loss if math.isfinite(loss) else None,
        "finite": all(bool(p.isfinite().all()) for p in module.parameters()),
        "interval": learner._schedule.interval if learns else None,
    }


class Task(pl.LightningModule):
    def __init__(self, net: nn.Module, lr: float, scale: float, decay: str) -> None:
        super().__init__()
        self.net, self.lr, self.scale, self.decay = net, lr, scale, decay

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.scale * nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=SETTINGS["momentum"], nesterov=True)
        if self.decay == "constant":
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@cache
def loaded(source: str) -> Any:
    sizes = SETTINGS[source]
    if source == "digits":
        data: Any = Digits(val_size=137, batch_size=sizes["batch_size"])
    else:
        data = FashionMNIST(train_size=sizes["train"], val_size=10_000, batch_size=sizes["batch_size"])
    data.prepare_data()
    data.setup()
    return data


def data_module(source: str, seed: int) -> Any:
    data = loaded(source)
    data.seed = seed
    return data


# --- cost ---


def cost(epochs: int = 10, batch_size: int = 128, rounds: int = 12) -> dict[str, Any]:
    """A refresh beside a step of the ResNet, and shares of a run of so many epochs of all 50,000 images."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    net = ResNet().to(device)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, nesterov=True)
    images = torch.randn(batch_size, 1, 28, 28, device=device)
    labels = torch.randint(10, (batch_size,), device=device)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(net(batch[0]), batch[1])

    def step() -> None:
        optimizer.zero_grad()
        loss((images, labels)).backward()
        optimizer.step()

    def refresh(samples: int) -> None:
        with probe_mode(net):
            hessian = HessianOperator(loss, net.parameters(), [(images[:samples], labels[:samples])])
            lanczos(hessian, 10, generator=torch.Generator().manual_seed(0))

    functions = {"step": step, "refresh_of_32": lambda: refresh(32), "refresh": lambda: refresh(batch_size)}
    times = paired_times(functions, rounds)
    steps = epochs * math.ceil(50_000 / batch_size)
    result: dict[str, Any] = {
        "steps": steps,
        "batch_size": batch_size,
        "step_seconds": statistics.median(times["step"]),
    }
    for name in ("refresh", "refresh_of_32"):
        ratio = ratio_summary(times, name, "step")
        schedule = RefreshSchedule(None, LanczosLRLearner().max_overhead)
        schedule.step_seconds, schedule.refresh_seconds = times["step"], times[name]
        interval = schedule.chosen(steps)
        count = refreshes(interval, steps)
        result[name] = {
            "in_steps": ratio,
            "default_interval": interval,
            "default_refreshes": count,
            "default_share": {quantile: value * count / steps for quantile, value in ratio.items()},
            "every_20_share": {quantile: value / 20 for quantile, value in ratio.items()},
        }
    return result


# --- results ---


def on_file() -> dict[str, Any]:
    old = read_result(FILE)
    cost_on_file = old.get("cost", {})
    runs = old["runs"] if old.get("settings") == SETTINGS else []
    if old.get("learner") != LEARNER:
        runs = [row for row in runs if row["method"].startswith("SGD")]
    return {"runs": runs, "cost": cost_on_file}


def write(rows: dict[Key, Row], costs: dict[str, Any]) -> None:
    ordered = [rows[key] for key in sorted(rows)]
    write_result(
        FILE, {"settings": SETTINGS, "learner": LEARNER, "results": summary(rows), "cost": costs, "runs": ordered}
    )


def accuracies(problem: str, decay: str, method: str, rows: dict[Key, Row]) -> list[float]:
    return [rows[problem, decay, method, s]["test_accuracy"] for s in SEEDS if (problem, decay, method, s) in rows]


def best_of_grid(problem: str, decay: str, rows: dict[Key, Row]) -> tuple[str, list[float]]:
    """The rate with the best mean test accuracy: chosen on the test set, in the grid's favor."""
    values = {m: accuracies(problem, decay, m, rows) for m in grid_methods(problem, decay, rows)}
    best = max(values, key=lambda method: statistics.mean(values[method]))
    return best, values[best]


def summary(rows: dict[Key, Row]) -> list[dict[str, Any]]:
    """For each problem and decay that is done: the best of the grid, and each start of the learner beside it."""
    results = []
    for problem in PROBLEMS:
        for decay in DECAYS:
            grid = [accuracies(problem, decay, m, rows) for m in grid_methods(problem, decay, rows)]
            if any(len(values) < len(SEEDS) for values in grid):
                continue
            best, of_best = best_of_grid(problem, decay, rows)
            results.append(_row(problem, decay, best, of_best, of_best))
            for method in learner_methods(problem, decay, rows):
                values = accuracies(problem, decay, method, rows)
                if len(values) == len(SEEDS):
                    results.append(_row(problem, decay, method, values, of_best))
    return results


def _row(problem: str, decay: str, method: str, values: list[float], best: list[float]) -> dict[str, Any]:
    differences = [100 * (a - b) for a, b in zip(values, best, strict=True)]
    return {
        "problem": problem,
        "decay": decay,
        "method": method,
        "mean": statistics.mean(values),
        "std": statistics.stdev(values),
        "min": min(values),
        "points_beside_best": statistics.mean(differences),
        "standard_error": statistics.stdev(differences) / math.sqrt(len(differences)),
    }


def print_tables(rows: dict[Key, Row], costs: dict[str, Any]) -> None:
    for r in summary(rows):
        print(
            f"{r['problem']:<19}{r['decay']:<10}{r['method']:<30}{r['mean']:>7.2%} ± {r['std']:.2%}"
            f"  lowest {r['min']:.2%}  beside the best {r['points_beside_best']:+.2f} ± {r['standard_error']:.2f}"
        )
    for device, result in costs.items():
        for name in ("refresh_of_32", "refresh"):
            r = result[name]
            print(
                f"{device}, {name}: {r['in_steps']['median']:.1f} steps; every {r['default_interval']} steps"
                f" {r['default_share']['median']:.1%} of the time; every 20 {r['every_20_share']['median']:.0%}"
            )


if __name__ == "__main__":
    main()
