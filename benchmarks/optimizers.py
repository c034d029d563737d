"""Compare our optimizers with Adam and SGD on Fashion-MNIST, all tuned alike.

    python benchmarks/optimizers.py                    all methods; about 15 minutes on 2 cores
    python benchmarks/optimizers.py --only Lion Adam   some of them
    python benchmarks/optimizers.py --plot             only draw the pictures again

An MLP (784-256-128-10), 10,000 training images, 10,000 others to choose by, batches of 128, 10 epochs with a rate that
falls linearly to zero (at a constant one the last iterates jump by more than the methods differ), no weight decay. For
each method 5 learning rates a factor of about 3 apart, centred on its usual one, on seed 0; while the best is at an
edge, one more there. The best and its neighbors then run on three seeds, and the rate with the best validation accuracy
is the method's. A seed sets the initial weights and the order of the images, the same for all methods. Two methods are
tied if their mean test accuracies differ by at most one standard error of the difference, paired by seed.

Every run is written to ``benchmarks/results/optimizers.json`` when it ends, and is skipped until a setting changes.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from _grid import (
    Key,
    RateSearch,
    Row,
    loss_and_accuracy,
    paired_verdict,
    process_pool,
    rate_1_3_10,
    run_missing,
    whole_splits,
)
from _runner import read_result, write_result
from torch import Tensor, nn

from lightning_opt.data import FashionMNIST
from lightning_opt.models import MLP
from lightning_opt.optim import AdaBelief, DiffGrad, ExponentiatedAdamW, ExponentiatedSGD, Lion

PICTURES = Path(__file__).parents[1] / "docs" / "methods" / "img"
SETTINGS = {
    "hidden": [256, 128],
    "train_size": 10_000,
    "val_size": 10_000,
    "batch_size": 128,
    "epochs": 10,
    "schedule": "linear to zero",
}
SEEDS = 3
LOWEST = 76  # percent, of the pictures

Make = Callable[[nn.Module, float], torch.optim.Optimizer]
METHODS: dict[str, tuple[Make, int, float]] = {  # how to make it, the number of its usual rate, a factor of all rates
    "SGD": (lambda net, lr: torch.optim.SGD(net.parameters(), lr, momentum=0.9, fused=True), -3, 1),
    "Adam": (lambda net, lr: torch.optim.Adam(net.parameters(), lr, fused=True), -6, 1),
    "AdaBelief": (lambda net, lr: AdaBelief(net.parameters(), lr), -6, 1),
    "DiffGrad": (lambda net, lr: DiffGrad(net.parameters(), lr), -6, 2),  # twice the rates of Adam
    "DiffGrad relative": (lambda net, lr: DiffGrad(net.parameters(), lr, friction="relative"), -6, 1),
    "Lion": (lambda net, lr: Lion(net.parameters(), lr), -8, 1),
    "ExponentiatedSGD": (
        lambda net, lr: ExponentiatedSGD(ExponentiatedSGD.param_groups_for(net), lr, momentum=0.9),
        -1,
        1,
    ),
    "ExponentiatedAdamW": (
        lambda net, lr: ExponentiatedAdamW(ExponentiatedAdamW.param_groups_for(net), lr, weight_decay=0.0),
        -4,
        1,
    ),
}
CARDS = {  # picture: the methods that are drawn beside Adam and SGD
    "optimizers": ["AdaBelief", "DiffGrad", "DiffGrad relative", "Lion", "ExponentiatedSGD", "ExponentiatedAdamW"],
    "adabelief": ["AdaBelief"],
    "diffgrad": ["DiffGrad", "DiffGrad relative"],
    "lion": ["Lion"],
    "exponentiated-gradient": ["ExponentiatedSGD", "ExponentiatedAdamW"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=METHODS, metavar="METHOD", default=list(METHODS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--plot", action="store_true", help="run nothing")
    options = parser.parse_args()
    rows = on_file()
    if not options.plot:
        with process_pool(options.processes) as pool:

            def done(row: Row) -> None:
                print(f"{row['method']:<20}{row['lr']:<8.2g} seed {row['seed']}: {row['val_accuracy']:.2%}", flush=True)
                write(rows)

            run_all = partial(run_missing, pool, run, rows=rows, done=done)
            search(rows).widen({(method,): METHODS[method][1] for method in options.only}, run_all)
            search(rows).confirm([(method,) for method in options.only], SEEDS, run_all)
        write(rows)
    results = summary(rows)
    print_table(results)
    draw(rows, results)


def search(rows: dict[Key, Row]) -> RateSearch:
    """Keys are method, number of the rate, seed."""
    return RateSearch(rows, score=lambda row: row["val_accuracy"])


def rate(method: str, number: int) -> float:
    return rate_1_3_10(number, METHODS[method][2])


# --- one run ---


@cache
def data() -> dict[str, tuple[Tensor, Tensor]]:
    """Images and labels of the three splits."""
    return whole_splits(FashionMNIST(train_size=SETTINGS["train_size"], val_size=SETTINGS["val_size"]))


def run(method: str, number: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    images, labels = data()["train"]
    net = MLP(in_features=784, hidden=tuple(SETTINGS["hidden"]))
    optimizer = METHODS[method][0](net, rate(method, number))
    order = torch.Generator().manual_seed(seed)
    total = SETTINGS["epochs"] * math.ceil(len(images) / SETTINGS["batch_size"])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total)
    begin = time.perf_counter()
    for _ in range(SETTINGS["epochs"]):
        for batch in torch.randperm(len(images), generator=order).split(SETTINGS["batch_size"]):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - begin
    train_loss, _ = loss_and_accuracy(net, *data()["train"])
    return {
        "method": method,
        "number": number,
        "lr": rate(method, number),
        "seed": seed,
        "val_accuracy": loss_and_accuracy(net, *data()["val"])[1],
        "test_accuracy": loss_and_accuracy(net, *data()["test"])[1],
        "train_loss": train_loss if math.isfinite(train_loss) else None,
        "seconds": round(seconds, 2),
    }


# --- results ---


def on_file() -> dict[Key, Row]:
    old = read_result("optimizers")
    rows = old["runs"] if old.get("settings") == SETTINGS else []
    return {(r["method"], r["number"], r["seed"]): {**r, "lr": rate(r["method"], r["number"])} for r in rows}


def write(rows: dict[Key, Row]) -> None:
    ordered = sorted(rows.values(), key=lambda row: (list(METHODS).index(row["method"]), row["number"], row["seed"]))
    results = {"results": summary(rows), "diffgrad_and_adam": twins(rows)}
    write_result("optimizers", {"settings": SETTINGS, **results, "runs": ordered})


def summary(rows: dict[Key, Row]) -> dict[str, dict[str, Any]]:
    """For each method that is done: its rate, and mean and standard deviation over the seeds."""
    done = {}
    for method in METHODS:
        if runs := search(rows).finished((method,), SEEDS):
            done[method] = {
                "lr": runs[0]["lr"],
                **{name: _mean([r[name] for r in runs]) for name in ("test_accuracy", "val_accuracy", "train_loss")},
                "test_accuracy_std": statistics.stdev(r["test_accuracy"] for r in runs),
                "seconds": _mean([r["seconds"] for r in runs]),
                "test_accuracies": [r["test_accuracy"] for r in runs],
            }
    for result in done.values():
        ours = result["test_accuracies"]
        result["beside"] = {
            name: paired_verdict(ours, done[name]["test_accuracies"], larger_is_better=True)
            for name in ("Adam", "SGD")
            if name in done
        }
    return done


def twins(rows: dict[Key, Row]) -> list[dict[str, float]]:
    """DiffGrad beside Adam at half its rate, on the same seed."""
    return [
        {
            "diffgrad_lr": ours["lr"],
            "adam_lr": adam["lr"],
            "seed": seed,
            **{f"diffgrad_{name}": ours[name] for name in ("train_loss", "test_accuracy")},
            **{f"adam_{name}": adam[name] for name in ("train_loss", "test_accuracy")},
        }
        for (method, number, seed), ours in sorted(rows.items())
        if method == "DiffGrad" and (adam := rows.get(("Adam", number, seed))) is not None
    ]


def print_table(results: dict[str, dict[str, Any]]) -> None:
    head = f"\n{'method':<20}{'rate':>8}{'test accuracy':>18}{'train loss':>12}{'seconds':>9}   beside Adam / SGD"
    print(head)
    for method, r in results.items():
        accuracy = f"{r['test_accuracy']:.2%} ± {r['test_accuracy_std']:.2%}"
        words = " / ".join(b["verdict"] for name, b in r["beside"].items() if name != method)
        print(f"{method:<20}{r['lr']:>8.2g}{accuracy:>18}{r['train_loss']:>12.4f}{r['seconds']:>9.1f}   {words}")


def draw(rows: dict[Key, Row], results: dict[str, dict[str, Any]]) -> None:
    """Test accuracy against learning rate: seed 0, and mean and standard deviation where there are three seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = dict(zip(METHODS, ["0.6", "0.2", "C0", "C1", "C3", "C2", "C4", "C5"], strict=True))
    PICTURES.mkdir(parents=True, exist_ok=True)
    for picture, methods in CARDS.items():
        figure, axes = plt.subplots(figsize=(7, 4))
        for method in ["SGD", "Adam", *methods]:
            points = []
            for number in search(rows).numbers((method,)):
                keys = [(method, number, seed) for seed in range(SEEDS)]
                values = [100 * rows[key]["test_accuracy"] for key in keys if key in rows]
                shown = len(values) > 1 and statistics.mean(values) > LOWEST
                spread = statistics.stdev(values) if shown else 0.0
                points.append((rate(method, number), statistics.mean(values), spread))
            if points:
                x, y, spread = zip(*points, strict=True)
                style = "--" if method in ("SGD", "Adam") else "-"
                line = axes.errorbar(x, y, spread, marker="o", ms=4, ls=style, color=colors[method], capsize=2)
                line.set_label(method)
            if method in results:
                best = results[method]
                axes.plot(best["lr"], 100 * best["test_accuracy"], "*", ms=13, color=colors[method])
        axes.set(xscale="log", xlabel="learning rate", ylabel="test accuracy (%)", ylim=(LOWEST, 89))
        axes.set_title("Fashion-MNIST, MLP, 10,000 images, 10 epochs; star: chosen on validation", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower center", ncols=2)
        figure.savefig(PICTURES / f"{picture}.png", dpi=120, bbox_inches="tight")
        plt.close(figure)


def _mean(values: list[float | None]) -> float | None:
    return statistics.mean(v for v in values if v is not None) if None not in values else None


if __name__ == "__main__":
    main()
