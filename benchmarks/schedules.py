"""Compare the refined schedule with constant, step, cosine and linear decay on four problems, all tuned alike.

    python benchmarks/schedules.py                                  all problems; about 20 minutes on 2 cores
    python benchmarks/schedules.py --problems logistic_a8a          some of them
    python benchmarks/schedules.py --plot                           only draw the picture and print the tables again

Logistic regression on LIBSVM's a8a and w8a, an MLP (784-256-128-10) on 10,000 images of Fashion-MNIST, a character
model (CharGPT, 236,000 parameters) in one pass over Tiny Shakespeare; and, where CUDA is available, the small ResNet on
all of Fashion-MNIST. For each problem and schedule 5 peak rates a factor of 2 apart on seed 0; while the best is at an
edge, one more there. The best and its neighbors then run on all seeds of the problem, and the rate with the best
validation score is the schedule's. A seed sets the initial weights and the order of the data, the same for all
schedules. Only the last iterate counts.

The refined schedule comes from the gradient norms of the run with linear decay at its best rate on seed 0, and is then
tuned as every other: it needs that one run more. Two schedules are tied if their mean test scores differ by at most one
standard error of the difference, paired by seed.

Every run is written to ``benchmarks/results/schedules.json`` when it ends, and is skipped until a setting changes; the
norms are in ``benchmarks/results/schedules/``.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Executor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from _grid import Key, RateSearch, Row, RunAll, paired_verdict, process_pool, run_missing, whole_splits
from _runner import RESULTS, read_result, write_result
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, MultiStepLR

from lightning_opt.data import FashionMNIST, LibSVM, TinyShakespeare
from lightning_opt.models import MLP, CharGPT, ResNet
from lightning_opt.schedules import LinearDecayLR, NormRecord, RefinedLR, refine_schedule, smooth_norms

PICTURE = Path(__file__).parents[1] / "docs" / "methods" / "img" / "lr-refinement.png"
NORMS = RESULTS / "schedules"
WARMUP = 0.1  # of the steps


class Problem(NamedTuple):
    """What is trained, how, and what counts."""

    title: str
    data: Callable[[], pl.LightningDataModule]
    net: Callable[[], nn.Module]
    optimizer: str  # SGD, SGD with momentum, Adam
    batch_size: int
    epochs: int
    centre: int  # number of the usual rate
    seeds: int
    score: str  # loss, bits or error; smaller is better
    device: str = "cpu"

    @property
    def method(self) -> str:
        return "adam" if self.optimizer == "Adam" else "sgd"

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("optimizer", "batch_size", "epochs", "score")}


PROBLEMS = {
    "logistic_a8a": Problem(
        "logistic regression, a8a",
        data=lambda: LibSVM("a8a", val_size=0.25),
        net=lambda: MLP(123, (), 2),
        optimizer="SGD",
        batch_size=16,
        epochs=5,
        centre=-3,
        seeds=10,
        score="loss",
    ),
    "logistic_w8a": Problem(
        "logistic regression, w8a",
        data=lambda: LibSVM("w8a", val_size=0.25),
        net=lambda: MLP(300, (), 2),
        optimizer="SGD",
        batch_size=32,
        epochs=5,
        centre=1,
        seeds=10,
        score="loss",
    ),
    "fashion_mlp": Problem(
        "Fashion-MNIST, MLP",
        data=lambda: FashionMNIST(train_size=10_000, val_size=10_000),
        net=lambda: MLP(784, (256, 128)),
        optimizer="SGD with momentum",
        batch_size=128,
        epochs=10,
        centre=-4,
        seeds=5,
        score="error",
    ),
    "char_gpt": Problem(
        "Tiny Shakespeare, CharGPT",
        data=lambda: TinyShakespeare(verify=False),
        net=CharGPT,
        optimizer="Adam",
        batch_size=16,
        epochs=1,
        centre=-9,
        seeds=3,
        score="bits",
    ),
    "fashion_resnet": Problem(
        "Fashion-MNIST, ResNet",
        data=FashionMNIST,
        net=ResNet,
        optimizer="SGD with momentum",
        batch_size=128,
        epochs=10,
        centre=-4,
        seeds=3,
        score="error",
        device="cuda",
    ),
}
Schedule = Callable[[torch.optim.Optimizer, int], LRScheduler]
SCHEDULES: dict[str, Schedule] = {  # how to make one for a number of steps
    "constant": lambda optimizer, steps: ConstantLR(optimizer, 1.0),
    "step": lambda optimizer, steps: MultiStepLR(optimizer, [steps // 2, 3 * steps // 4], 0.1),
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, steps),
    "linear": LinearDecayLR,
    "linear, warm-up": lambda optimizer, steps: LinearDecayLR(optimizer, steps, WARMUP),
}
REFINED = "refined"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    available = [name for name, problem in PROBLEMS.items() if problem.device == "cpu" or torch.cuda.is_available()]
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, metavar="PROBLEM", default=available)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--plot", action="store_true", help="run nothing")
    options = parser.parse_args()
    rows = on_file()
    if not options.plot:
        with process_pool(options.processes) as pool:

            def done(row: Row) -> None:
                score = math.inf if row["val"] is None else row["val"]
                print(f"{row['problem']:<16}{row['schedule']:<17}{row['lr']:<10.3g} seed {row['seed']}: ", end="")
                print(f"{score:.4f}", flush=True)
                write(rows)

            run_all = partial(run_missing, pool, run, rows=rows, done=done)
            for problem in options.problems:
                measure(problem, rows, run_all, pool)
        write(rows)
    print_tables(summary(rows))
    draw(rows)


def measure(problem: str, rows: dict[Key, Row], run_all: RunAll, pool: Executor) -> None:
    """Run what a problem needs and what is not on file."""
    centre = PROBLEMS[problem].centre
    search(rows).widen({(problem, name): centre for name in SCHEDULES}, run_all)
    refresh_norms(problem, search(rows).best((problem, "linear")), rows, pool)
    search(rows).widen({(problem, REFINED): centre}, run_all)
    search(rows).confirm([(problem, name) for name in [*SCHEDULES, REFINED]], PROBLEMS[problem].seeds, run_all)


def search(rows: dict[Key, Row]) -> RateSearch:
    """Keys are problem, schedule, number of the rate, seed."""
    return RateSearch(rows, score=lambda row: None if row["val"] is None else -row["val"])


def rate(number: int) -> float:
    return 2.0**number


# --- one run ---


@cache
def data(problem: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and targets of the three splits, on the problem's device."""
    device = PROBLEMS[problem].device
    return {name: (x.to(device), y.to(device)) for name, (x, y) in whole_splits(PROBLEMS[problem].data()).items()}


def total_steps(problem: str) -> int:
    chosen = PROBLEMS[problem]
    return chosen.epochs * math.ceil(len(data(problem)["train"][0]) / chosen.batch_size)


def make_optimizer(problem: str, net: nn.Module, lr: float) -> torch.optim.Optimizer:
    name = PROBLEMS[problem].optimizer
    if name == "Adam":
        return torch.optim.Adam(net.parameters(), lr, fused=True)
    return torch.optim.SGD(net.parameters(), lr, momentum=0.9 if "momentum" in name else 0.0, fused=True)


def run(problem: str, schedule: str, number: int, seed: int) -> dict[str, Any]:
    begin = time.perf_counter()
    net, _ = train(problem, schedule, number, seed)
    seconds = time.perf_counter() - begin
    scores = {split: evaluate(problem, net, split) for split in ("val", "test", "train")}
    row = {"problem": problem, "schedule": schedule, "number": number, "lr": rate(number), "seed": seed}
    return {**row, **scores, "seconds": round(seconds, 2), "settings": settings_of(problem, schedule)}


def train(problem: str, schedule: str, number: int, seed: int, record: bool = False) -> tuple[nn.Module, list[float]]:
    """Train a network; the gradient norm of each step is returned if it is asked for."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    chosen = PROBLEMS[problem]
    inputs, targets = data(problem)["train"]
    net = chosen.net().to(chosen.device)
    optimizer = make_optimizer(problem, net, rate(number))
    steps = total_steps(problem)
    scheduler = (
        RefinedLR(optimizer, refined(problem), steps) if schedule == REFINED else SCHEDULES[schedule](optimizer, steps)
    )
    order = torch.Generator().manual_seed(seed)
    norms: list[Tensor] = []
    for _ in range(chosen.epochs):
        for batch in torch.randperm(len(inputs), generator=order).to(chosen.device).split(chosen.batch_size):
            optimizer.zero_grad()
            loss(net(inputs[batch]), targets[batch]).backward()
            if record:
                norms.append(gradient_norm(net, chosen.method))
            optimizer.step()
            scheduler.step()
    return net, [norm.item() for norm in norms]


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


def gradient_norm(net: nn.Module, method: str) -> Tensor:
    """L1 for Adam, L2 for SGD."""
    parts = [p.grad.norm(1 if method == "adam" else 2) for p in net.parameters() if p.grad is not None]
    return torch.stack(parts).sum() if method == "adam" else torch.stack(parts).norm()


@torch.no_grad()
def evaluate(problem: str, net: nn.Module, split: str) -> float | None:
    """The score: mean loss in nats, in bits, or the share of errors; None if it is not finite."""
    net.eval()
    inputs, targets = data(problem)[split]
    count = len(inputs)
    if split == "train" and PROBLEMS[problem].score == "bits":  # a part is enough
        count = min(count, 1000)
    total = 0.0
    for x, y in zip(inputs[:count].split(1000), targets[:count].split(1000), strict=True):
        logits = net(x)
        if PROBLEMS[problem].score == "error":
            total += (logits.argmax(dim=-1) != y).double().mean().item() * len(x)
        else:
            total += loss(logits, y).item() * len(x)
    mean = total / count / (math.log(2) if PROBLEMS[problem].score == "bits" else 1)
    diverged = not all(p.isfinite().all() for p in net.parameters())
    return None if diverged or not math.isfinite(mean) else mean


# --- the refined schedule ---


def refresh_norms(problem: str, number: int, rows: dict[Key, Row], pool: Executor) -> None:
    """Record the norms of linear decay at its best rate, unless that is on file; new norms void the refined runs."""
    if (old := norms_on_file(problem)) is not None and old.lr == rate(number):
        return
    for key in [key for key in rows if key[:2] == (problem, REFINED)]:
        del rows[key]
    pool.submit(record_norms, problem, number).result()


def record_norms(problem: str, number: int) -> None:
    _, norms = train(problem, "linear", number, 0, record=True)
    chosen = PROBLEMS[problem]
    NORMS.mkdir(parents=True, exist_ok=True)
    NormRecord(
        torch.tensor(norms),
        "l1" if chosen.method == "adam" else "l2",
        chosen.optimizer,
        rate(number),
        total_steps=len(norms),
        steps=len(norms),
        batch_size=chosen.batch_size,
    ).save(NORMS / f"{problem}.npz")


def norms_on_file(problem: str) -> NormRecord | None:
    path = NORMS / f"{problem}.npz"
    return NormRecord.load(path) if path.exists() else None


def refined(problem: str) -> Tensor:
    record = norms_on_file(problem)
    assert record is not None
    return refine_schedule(record.norms, PROBLEMS[problem].method)


# --- results ---


def settings_of(problem: str, schedule: str) -> dict[str, Any]:
    """What a run depends on besides its key."""
    record = norms_on_file(problem) if schedule == REFINED else None
    return {**PROBLEMS[problem].settings(), **({"norms_at": record.lr} if record else {})}


def on_file() -> dict[Key, Row]:
    return {
        (r["problem"], r["schedule"], r["number"], r["seed"]): r
        for r in read_result("schedules").get("runs", [])
        if r["settings"] == settings_of(r["problem"], r["schedule"])
    }


def write(rows: dict[Key, Row]) -> None:
    names = [*SCHEDULES, REFINED]
    ordered = sorted(rows, key=lambda key: (list(PROBLEMS).index(key[0]), names.index(key[1]), *key[2:]))
    write_result("schedules", {**summary(rows), "runs": [rows[key] for key in ordered]})


def summary(rows: dict[Key, Row]) -> dict[str, Any]:
    """For each problem that is done, each schedule beside the refined one; and the mean ranks over these problems."""
    problems: dict[str, dict[str, Any]] = {}
    for problem, chosen in PROBLEMS.items():
        found = {name: search(rows).finished((problem, name), chosen.seeds) for name in [*SCHEDULES, REFINED]}
        if all(found.values()):
            cells = {}
            for name, runs in found.items():
                scores = [r["test"] for r in runs]
                cells[name] = {
                    "lr": runs[0]["lr"],
                    "test": statistics.mean(scores),
                    "standard_error": statistics.stdev(scores) / math.sqrt(len(scores)),
                    **{split: statistics.mean(r[split] for r in runs) for split in ("val", "train")},
                    "seconds": statistics.mean(r["seconds"] for r in runs),
                    "tests": scores,
                }
            for name, cell in cells.items():
                cell["rank"] = rank(cell["test"], [other["test"] for other in cells.values()])
                if name != REFINED:
                    ours = cells[REFINED]["tests"]
                    cell["refined_beside_it"] = paired_verdict(ours, cell["tests"], larger_is_better=False)
            problems[problem] = {"score": chosen.score, "seeds": chosen.seeds, "schedules": cells}
    ranks = {
        name: statistics.mean(done["schedules"][name]["rank"] for done in problems.values())
        for name in [*SCHEDULES, REFINED]
        if problems
    }
    return {"results": problems, "mean_ranks": ranks}


def rank(score: float, scores: list[float]) -> float:
    """From 1 for the lowest; equal scores share the mean of their ranks."""
    equal = sum(math.isclose(score, other, rel_tol=1e-9) for other in scores)
    below = sum(other < score and not math.isclose(score, other, rel_tol=1e-9) for other in scores)
    return below + (equal + 1) / 2


def print_tables(results: dict[str, Any]) -> None:
    """One table a problem, then all of them as one in Markdown."""
    shown = {"loss": ("test loss", 1, 5), "bits": ("bits per character", 1, 4), "error": ("test error (%)", 100, 2)}
    lines: dict[str, list[str]] = {name: [] for name in [*SCHEDULES, REFINED]}
    for problem, done in results["results"].items():
        title, factor, digits = shown[done["score"]]
        head = f"\n{PROBLEMS[problem].title}, {done['seeds']} seeds\n{'schedule':<17}{'rate':>9}{title:>24}{'train':>9}"
        print(f"{head}{'rank':>6}   refined is")
        for name, cell in done["schedules"].items():
            value = f"{factor * cell['test']:.{digits}f} ± {factor * cell['standard_error']:.{digits}f}"
            beside = cell.get("refined_beside_it", {"verdict": ""})["verdict"]
            train = f"{factor * cell['train']:.{digits}f}"
            print(f"{name:<17}{cell['lr']:>9.3g}{value:>24}{train:>9}{cell['rank']:>6g}   {beside}")
            lines[name].append(f"{value} ({beside})" if beside else value)
    if results["results"]:
        titles = [
            f"{PROBLEMS[problem].title}: {shown[done['score']][0]}" for problem, done in results["results"].items()
        ]
        print(f"\n| schedule | {' | '.join(titles)} | mean rank |\n|{' --- |' * (len(titles) + 2)}")
        for name, values in lines.items():
            print(f"| {name} | {' | '.join(values)} | {results['mean_ranks'][name]:.2f} |")


def draw(rows: dict[Key, Row]) -> None:
    """For each problem the recorded norms, and the schedules that follow from them beside linear decay."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = {p: record for p in PROBLEMS if (record := norms_on_file(p)) is not None}
    if not records:
        return
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(
        2, len(records), figsize=(3 * len(records) + 1, 5), sharex=True, squeeze=False, layout="constrained"
    )
    for (problem, record), (above, below) in zip(records.items(), axes.T, strict=True):
        share = torch.linspace(0, 100, len(record.norms))
        above.plot(share, record.norms, color="0.8", lw=0.5)
        above.plot(share, smooth_norms(record.norms).norms, color="C3")
        name = {"l1": r"$\|g_t\|_1$", "l2": r"$\|g_t\|_2$"}[record.norm]
        above.set(yscale="log", title=PROBLEMS[problem].title)
        above.set_ylabel(f"gradient norm {name}")
        below.plot(share, 1 - share / 100, color="0.5", ls="--", label="linear decay")
        shape = refined(problem)
        below.plot(share, shape, color="C0", label="refined")
        peak = int(shape.argmax())
        below.plot(share[peak], shape[peak], "o", color="C0", ms=4)
        below.annotate(
            f"peak at {share[peak]:.0f} %", (share[peak], 1), xytext=(4, 4), textcoords="offset points", fontsize=8
        )
        below.set(xlabel="% of the run", ylim=(0, 1.15), xlim=(0, 100))
        for panel in (above, below):
            panel.grid(alpha=0.3)
            panel.title.set_fontsize(10)
    axes[1, 0].set_ylabel("share of the peak rate")
    axes[1, 0].legend(fontsize=8, loc="lower left")
    figure.savefig(PICTURE, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
