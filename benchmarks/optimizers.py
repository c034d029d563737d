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
import json
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _runner import RESULTS, write_result
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
SEEDS = (0, 1, 2)
LOWEST = 76  # percent, of the pictures
Key = tuple[str, int, int]
"""Method, number of the rate, seed."""

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
        with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:

            def run_all(keys: list[Key]) -> None:
                waiting = [pool.submit(run, *key) for key in keys if key not in rows]
                for done in as_completed(waiting):
                    row = done.result()
                    rows[row["method"], row["number"], row["seed"]] = row
                    print(
                        f"{row['method']:<20}{row['lr']:<8.2g} seed {row['seed']}: {row['val_accuracy']:.2%}",
                        flush=True,
                    )
                    write(rows)

            wanted = {method: grid(method) for method in options.only}
            while any(wanted.values()):
                run_all([(method, number, 0) for method, numbers in wanted.items() for number in numbers])
                wanted = {method: beyond_the_edge(method, rows) for method in options.only}
            run_all([key for method in options.only for key in around_the_best(method, rows)])
        write(rows)
    results = summary(rows)
    print_table(results)
    draw(rows, results)


# --- which runs ---


def rate(method: str, number: int) -> float:
    """1, 3, 10, 30, ... times a power of ten, by number."""
    return float(f"{METHODS[method][2] * (3 if number % 2 else 1) * 10.0 ** (number // 2):.1g}")


def grid(method: str) -> list[int]:
    centre = METHODS[method][1]
    return list(range(centre - 2, centre + 3))


def beyond_the_edge(method: str, rows: dict[Key, dict[str, Any]]) -> list[int]:
    """The next rate if the best on seed 0 is the smallest or largest so far."""
    numbers = [number for name, number, seed in rows if name == method and seed == 0]
    best = best_number(method, rows)
    return [best - 1] if best == min(numbers) else [best + 1] if best == max(numbers) else []


def best_number(method: str, rows: dict[Key, dict[str, Any]], seeds: tuple[int, ...] = (0,)) -> int:
    """The rate with the best mean validation accuracy among those that ran on all these seeds."""
    numbers = {number for name, number, _ in rows if name == method}
    means = {
        number: statistics.mean(rows[method, number, seed]["val_accuracy"] for seed in seeds)
        for number in sorted(numbers)
        if all((method, number, seed) in rows for seed in seeds)
    }
    return max(means, key=lambda number: means[number])


def around_the_best(method: str, rows: dict[Key, dict[str, Any]]) -> list[Key]:
    best = best_number(method, rows)
    return [(method, number, seed) for number in (best, best - 1, best + 1) for seed in SEEDS]


# --- one run ---


@cache
def data() -> dict[str, tuple[Tensor, Tensor]]:
    """Images and labels of the three splits."""
    module = FashionMNIST(train_size=SETTINGS["train_size"], val_size=SETTINGS["val_size"])
    module.prepare_data()
    module.setup()
    splits = {"train": module.train_set, "val": module.val_set, "test": module.test_set}
    return {name: split.__getitems__(range(len(split))) for name, split in splits.items() if split is not None}


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
    train_loss, _ = evaluate(net, *data()["train"])
    return {
        "method": method,
        "number": number,
        "lr": rate(method, number),
        "seed": seed,
        "val_accuracy": evaluate(net, *data()["val"])[1],
        "test_accuracy": evaluate(net, *data()["test"])[1],
        "train_loss": train_loss if math.isfinite(train_loss) else None,
        "seconds": round(seconds, 2),
    }


@torch.no_grad()
def evaluate(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy."""
    logits = net(images)
    loss = nn.functional.cross_entropy(logits, labels)
    return loss.item(), (logits.argmax(dim=1) == labels).float().mean().item()


# --- results ---


def on_file() -> dict[Key, dict[str, Any]]:
    path = RESULTS / "optimizers.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    rows = old["runs"] if old.get("settings") == SETTINGS else []
    return {(r["method"], r["number"], r["seed"]): {**r, "lr": rate(r["method"], r["number"])} for r in rows}


def write(rows: dict[Key, dict[str, Any]]) -> None:
    ordered = sorted(rows.values(), key=lambda row: (list(METHODS).index(row["method"]), row["number"], row["seed"]))
    results = {"results": summary(rows), "diffgrad_and_adam": twins(rows)}
    write_result("optimizers", {"settings": SETTINGS, **results, "runs": ordered})


def summary(rows: dict[Key, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each method that is done: its rate, and mean and standard deviation over the seeds."""
    done = {}
    for method in METHODS:
        started = any(name == method and seed == 0 for name, _, seed in rows)
        if started and all(key in rows for key in around_the_best(method, rows)):
            number = best_number(method, rows, SEEDS)
            runs = [rows[method, number, seed] for seed in SEEDS]
            done[method] = {
                "lr": rate(method, number),
                **{name: _mean([r[name] for r in runs]) for name in ("test_accuracy", "val_accuracy", "train_loss")},
                "test_accuracy_std": statistics.stdev(r["test_accuracy"] for r in runs),
                "seconds": _mean([r["seconds"] for r in runs]),
                "test_accuracies": [r["test_accuracy"] for r in runs],
            }
    for result in done.values():
        result["beside"] = {name: verdict(result, done[name]) for name in ("Adam", "SGD") if name in done}
    return done


def verdict(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """The mean difference of test accuracy, its standard error, and what to call it."""
    differences = [a - b for a, b in zip(ours["test_accuracies"], theirs["test_accuracies"], strict=True)]
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    word = "tie" if abs(mean) <= error else "better" if mean > 0 else "worse"
    return {"difference": mean, "standard_error": error, "verdict": word}


def twins(rows: dict[Key, dict[str, Any]]) -> list[dict[str, float]]:
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


def draw(rows: dict[Key, dict[str, Any]], results: dict[str, dict[str, Any]]) -> None:
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
            for number in sorted({n for name, n, _ in rows if name == method}):
                values = [100 * rows[method, number, s]["test_accuracy"] for s in SEEDS if (method, number, s) in rows]
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
