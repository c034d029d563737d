"""What AdaptiveBatchSize costs, and whether it beats the front of fixed batch sizes on Fashion-MNIST.

    python benchmarks/adaptive_batch_size.py cost            share of the step on the ResNet; some minutes on 2 cores
    python benchmarks/adaptive_batch_size.py overhead        of a step without a test, in microseconds; a minute
    python benchmarks/adaptive_batch_size.py front           all methods; some 20 minutes on 2 cores
    python benchmarks/adaptive_batch_size.py front --only "batch 32" "eta 1"
    python benchmarks/adaptive_batch_size.py front --plot    only draw the picture again
    python benchmarks/adaptive_batch_size.py front --smoke   2 epochs of 1,000 images, one rate; writes nothing

**cost**: fits of the ResNet at batch 64 with the callback at its defaults and without, one after the other in one
process, the order turning; the threshold is so large that no test fails, so both make the same steps. The first row has
one micro-batch a step, which tests divide into 8 pieces; the second accumulates 4 micro-batches of 16. Timed over 40
steps, one test. Beside each ratio stands that of two runs without the callback, which is what noise does.

**overhead**: processor time of one thread a step of a model with a single weight, beside that of a fit without the
callback, paired; printed only. It hardly depends on what else the machine does.

**front**: an MLP (784-256-128-10), 10,000 training images, 10,000 others to choose by, 10 epochs, SGD with momentum 0.9
whose rate falls linearly to zero over the samples, no weight decay, all through the Trainer. Fixed batches of 32, 128,
512 and 2048, one of 1024 to see how coarse their line is, and batches that grow from 32 to 2048 at most. For each
method 5 rates a factor of about 3 apart on seed 0; while the best is at an edge, one more there; the best and its
neighbors on three seeds, and the rate with the best validation accuracy is the method's. The front is the line through
the first four in (log steps, test accuracy); a growing batch is beyond it if it lies above by more than one standard
error, paired by seed; the same with the fifth.
Every run is written to ``benchmarks/results/adaptive_batch_size.json`` when it ends, and is skipped until a setting
changes.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _fits import StepClock, paired_fits, quiet_trainer
from _grid import Key, RateSearch, Row, loss_and_accuracy, process_pool, rate_1_3_10, run_missing, whole_splits
from _runner import ratio_summary, read_result, write_result
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_opt.callbacks import AdaptiveBatchSize
from lightning_opt.data import FashionMNIST, ResumableLoader
from lightning_opt.models import MLP, Classifier, ResNet
from lightning_opt.schedules import SampleBasedLR

PICTURE = Path(__file__).parents[1] / "docs" / "methods" / "img" / "adaptive-batch-size.png"
SETTINGS: dict[str, Any] = {
    "hidden": [256, 128],
    "train_size": 10_000,
    "val_size": 10_000,
    "epochs": 10,
    "momentum": 0.9,
    "schedule": "linear to zero over samples",
}
GROWS = {"b0": 32, "b_max": 2048, "growth_cap": 2.0}
METHODS: dict[
    str, tuple[int, dict[str, Any] | None, int]
] = {  # batch at the start, the callback, number of a usual rate
    "batch 32": (32, None, -4),
    "batch 128": (128, None, -3),
    "batch 512": (512, None, -2),
    "batch 1024": (1024, None, -2),
    "batch 2048": (2048, None, -1),
    "eta 1": (32, {**GROWS, "eta": 1.0}, -3),
    "eta 0.5": (32, {**GROWS, "eta": 0.5}, -3),
    "eta 1, linear rate": (32, {**GROWS, "eta": 1.0, "lr_scale": "linear"}, -4),
}
FRONT = ["batch 32", "batch 128", "batch 512", "batch 2048"]
FIXED = [name for name, (_, callback, _) in METHODS.items() if callback is None]
SEEDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    paying = commands.add_parser("cost")
    paying.add_argument("--rounds", type=int, default=9)
    commands.add_parser("overhead").add_argument("--rounds", type=int, default=9)
    front = commands.add_parser("front")
    front.add_argument("--only", nargs="+", choices=METHODS, metavar="METHOD", default=list(METHODS))
    front.add_argument("--processes", type=int, default=2)
    front.add_argument("--plot", action="store_true", help="run nothing")
    front.add_argument("--smoke", action="store_true", help="a few seconds a method, to see that all of it runs")
    options = parser.parse_args()
    if options.command == "cost":
        cost(options.rounds)
    elif options.command == "overhead":
        overhead(options.rounds)
    elif options.smoke:
        smoke(options.only)
    else:
        compare(options)


# --- cost ---


def cost(rounds: int) -> None:
    torch.set_num_threads(2)
    images, labels = data()["train"]
    rows: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # the Trainer without the callback, the callback
        "one micro-batch of 64": ({}, {"eta": 1e9}),
        "4 micro-batches of 16": ({"accumulate_grad_batches": 4}, {"eta": 1e9, "b0": 64, "max_micro": 16}),
    }

    def fit(batch_size: int, callback: dict[str, Any] | None, clock: StepClock, **options: Any) -> None:
        torch.manual_seed(0)
        callbacks = [clock] if callback is None else [AdaptiveBatchSize(**callback), clock]
        loader = ResumableLoader(TensorDataset(images, labels), batch_size, shuffle=True)
        quiet_trainer(max_steps=clock.last + 1, callbacks=callbacks, **options).fit(Model(ResNet(), 0.1), loader)

    found: dict[str, Any] = {}
    for name, (without, callback) in rows.items():
        size = callback.get("max_micro", 64)
        times = paired_fits(
            {
                "without": partial(fit, size, None, **without),
                "with": partial(fit, size, callback),
                "again": partial(fit, size, None, **without),
            },
            rounds,
        )["wall"]
        found[name] = {
            "step_ms": 1000 * statistics.median(times["without"]),
            "with_over_without": ratio_summary(times, "with", "without"),
            "noise": ratio_summary(times, "again", "without"),
        }
        print(name, json.dumps(found[name]), flush=True)
    write_result("adaptive_batch_size_cost", {"rounds": rounds, "results": found})


class OneWeight(pl.LightningModule):
    """A step that costs next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.weight * batch[0].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


def overhead(rounds: int) -> None:
    torch.set_num_threads(1)
    data_set = Whole(torch.ones(100_000, 4))

    def fit(callbacks: list[pl.Callback], clock: StepClock) -> None:
        fitting = quiet_trainer(max_steps=clock.last + 1, callbacks=[*callbacks, clock])
        fitting.fit(OneWeight(), ResumableLoader(data_set, 64, shuffle=True))

    times = paired_fits(
        {
            "without": lambda clock: fit([], clock),
            "with": lambda clock: fit([AdaptiveBatchSize(eta=1e9, test_interval=10**6)], clock),
        },
        rounds,
        steps=1000,
    )["cpu"]
    more = statistics.median(b - a for a, b in zip(times["without"], times["with"], strict=True))
    print(
        f"a step takes {1e6 * statistics.median(times['without']):.0f} us, with the callback {1e6 * more:.0f} us more"
    )


# --- the front ---


class Model(Classifier):
    """SGD with a rate that falls linearly over the samples."""

    def __init__(self, net: nn.Module, lr: float, batch_size: int = 0, samples: int = 0) -> None:
        super().__init__(net)
        self.lr, self.batch_size, self.samples = lr, batch_size, samples

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=SETTINGS["momentum"])
        if not self.samples:
            return optimizer
        schedule = SampleBasedLR(optimizer, self.batch_size, lr_decay_samples=self.samples, decay="linear")
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class LinearRate(pl.Callback):
    """The rate of the schedule times the growth of the batch; AdaptiveBatchSize(lr_scale=...) takes no schedule."""

    def __init__(self, adaptive: AdaptiveBatchSize, start: int) -> None:
        self.adaptive, self.start = adaptive, start

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        for group, rate in zip(trainer.optimizers[0].param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate * max(self.adaptive.batch_size, self.start) / self.start


@cache
def data() -> dict[str, tuple[Tensor, Tensor]]:
    """Images and labels of the three splits."""
    return whole_splits(FashionMNIST(train_size=SETTINGS["train_size"], val_size=SETTINGS["val_size"]))


class Whole(TensorDataset):
    """A batch is one indexing operation, so that reading does not hide what a step takes."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return tuple(tensor[indices] for tensor in self.tensors)


def run(method: str, number: int, seed: int, epochs: int | None = None, images: int | None = None) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    epochs = epochs or SETTINGS["epochs"]
    x, y = (tensor[:images] for tensor in data()["train"])
    batch_size, options, _ = METHODS[method]
    net = MLP(in_features=784, hidden=tuple(SETTINGS["hidden"]))
    model = Model(net, rate_1_3_10(number), batch_size, epochs * len(x))
    callbacks: list[pl.Callback] = []
    adaptive = None
    if options is not None:
        own = {key: value for key, value in options.items() if key != "lr_scale"}
        adaptive = AdaptiveBatchSize(**{**own, "b_max": min(own["b_max"], len(x))})
        callbacks = [adaptive]
        if "lr_scale" in options:
            callbacks.append(LinearRate(adaptive, batch_size))
    fitting = quiet_trainer(max_epochs=epochs, callbacks=callbacks)
    begin = time.perf_counter()
    fitting.fit(model, ResumableLoader(Whole(x, y), batch_size, shuffle=True, seed=seed))
    seconds = time.perf_counter() - begin
    train_loss, _ = loss_and_accuracy(net, x, y)
    return {
        "method": method,
        "number": number,
        "lr": rate_1_3_10(number),
        "seed": seed,
        "steps": fitting.global_step,
        "last_batch": adaptive.batch_size if adaptive is not None else batch_size,
        "val_accuracy": loss_and_accuracy(net, *data()["val"])[1],
        "test_accuracy": loss_and_accuracy(net, *data()["test"])[1],
        "train_loss": train_loss if math.isfinite(train_loss) else None,
        "seconds": round(seconds, 2),
    }


def smoke(methods: list[str]) -> None:
    for method in methods:
        row = run(method, METHODS[method][2], 0, epochs=2, images=1000)
        print(f"{method:<20}{row['steps']:>6} steps, last batch {row['last_batch']:>5}, {row['val_accuracy']:.2%}")


def compare(options: argparse.Namespace) -> None:
    rows = on_file()
    if not options.plot:
        with process_pool(options.processes) as pool:

            def done(row: Row) -> None:
                print(f"{row['method']:<20}{row['lr']:<8.2g} seed {row['seed']}: ", end="")
                print(f"{row['steps']:>5} steps, {row['val_accuracy']:.2%}", flush=True)
                write(rows)

            run_all = partial(run_missing, pool, run, rows=rows, done=done)
            search(rows).widen({(method,): METHODS[method][2] for method in options.only}, run_all)
            search(rows).confirm([(method,) for method in options.only], SEEDS, run_all)
        write(rows)
    results = summary(rows)
    for method, r in results.items():
        accuracy = f"{r['test_accuracy']:.2%} ± {r['test_accuracy_std']:.2%}"
        word = ", with 1024 ".join(r[key]["verdict"] for key in ("beside", "beside_finer") if key in r)
        print(f"{method:<20}{r['lr']:>8.2g}{r['steps']:>8.0f} steps{accuracy:>18}   {word}")
    draw(results)


def search(rows: dict[Key, Row]) -> RateSearch:
    """Keys are method, number of the rate, seed."""
    return RateSearch(rows, score=lambda row: row["val_accuracy"])


def on_file() -> dict[Key, Row]:
    old = read_result("adaptive_batch_size")
    rows = old["runs"] if old.get("settings") == _settings() else []
    return {(row["method"], row["number"], row["seed"]): row for row in rows}


def write(rows: dict[Key, Row]) -> None:
    ordered = sorted(rows.values(), key=lambda row: (list(METHODS).index(row["method"]), row["number"], row["seed"]))
    write_result("adaptive_batch_size", {"settings": _settings(), "results": summary(rows), "runs": ordered})


def _settings() -> dict[str, Any]:
    return json.loads(json.dumps({**SETTINGS, "methods": METHODS}))


def summary(rows: dict[Key, Row]) -> dict[str, dict[str, Any]]:
    """For each method that is done: its rate, steps and accuracies, and for growing batches how far from the front."""
    done: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        if runs := search(rows).finished((method,), SEEDS):
            accuracies = [r["test_accuracy"] for r in runs]
            done[method] = {
                "lr": runs[0]["lr"],
                "steps": statistics.mean(r["steps"] for r in runs),
                "test_accuracy": statistics.mean(accuracies),
                "test_accuracy_std": statistics.stdev(accuracies),
                "seconds": statistics.mean(r["seconds"] for r in runs),
                "test_accuracies": accuracies,
                "steps_by_seed": [r["steps"] for r in runs],
            }
    for key, front in (("beside", FRONT), ("beside_finer", FIXED)):
        if all(name in done for name in front):
            for method in done.keys() - FIXED:
                done[method][key] = verdict(done[method], [done[name] for name in front])
    return done


def verdict(ours: dict[str, Any], fixed: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean height above the front, seed by seed, its standard error, and what to call it."""
    heights = []
    for index, (steps, accuracy) in enumerate(zip(ours["steps_by_seed"], ours["test_accuracies"], strict=True)):
        points = sorted((math.log(f["steps_by_seed"][index]), f["test_accuracies"][index]) for f in fixed)
        heights.append(accuracy - interpolate(points, math.log(steps)))
    mean, error = statistics.mean(heights), statistics.stdev(heights) / math.sqrt(len(heights))
    word = "beyond the front" if mean > error else "behind the front" if mean < -error else "on the front"
    return {"height": mean, "standard_error": error, "verdict": word}


def interpolate(points: list[tuple[float, float]], x: float) -> float:
    """Linear between the points, constant beyond them."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def draw(results: dict[str, dict[str, Any]]) -> None:
    """Test accuracy against steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    fixed = [results[name] for name in FRONT if name in results]
    if fixed:
        axes.plot([r["steps"] for r in fixed], [100 * r["test_accuracy"] for r in fixed], "-", color="0.6", zorder=1)
    for method, r in results.items():
        axes.errorbar(
            r["steps"],
            100 * r["test_accuracy"],
            100 * r["test_accuracy_std"],
            marker="o" if method in FIXED else "*",
            ms=6 if method in FIXED else 12,
            color="0.4" if method in FIXED else None,
            ls="",
            capsize=2,
            label=None if method in FIXED else method,
        )
        if method in FIXED:
            place = {"xytext": (6, -12), "textcoords": "offset points"}
            axes.annotate(method, (r["steps"], 100 * r["test_accuracy"]), fontsize=8, color="0.4", **place)
    axes.set(xscale="log", xlabel="optimizer steps", ylabel="test accuracy (%)")
    axes.set_title("Fashion-MNIST, MLP, 10,000 images, 10 epochs, SGD, each rate chosen on validation", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=120, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
