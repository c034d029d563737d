"""What local regularization of a neural SDE gives: evaluations, quality and seconds, beside the global regularizer.

    python benchmarks/neural_sde.py front            every coefficient of every method; some 25 minutes of one core
    python benchmarks/neural_sde.py front --only spiral          one data set
    python benchmarks/neural_sde.py front --smoke    a few steps a method, to see that all of it runs; writes nothing
    python benchmarks/neural_sde.py tolerances       the same weights at tighter tolerances, behind front; two minutes
    python benchmarks/neural_sde.py layer            evaluations and time of the layer beside torchsde alone; a minute
    python benchmarks/neural_sde.py picture          the picture of the card, behind front; a minute

MNIST needs its files: see ``lightning_opt.data``.

**front**: Stratonovich equations, solved by torchsde's midpoint method with adaptive steps at tolerance 0.01, trained
with Adam, whose rate falls linearly to 0, through the Trainer and the library's callbacks with constant coefficients.
scikit-learn's digits and 10,000 images of MNIST: ``NeuralSDEClassifier`` (state 32, hidden 64), 600 and 1,500 steps of
128 images. Spiral: ``NeuralSDEMoments`` (hidden 50), 600 steps of 200 trajectories at 6 times, all of which a solve
has to step on. The rate is the one of three or four with which the model without regularization is best on validation
data, seed 0; every method has it. Each method then runs with all its coefficients on seed 0. Its own coefficient is
the one with the fewest evaluations on validation data among those that lose at most 0.5 points of accuracy, or 10 % of
the moment error of the spiral, there, or else the best; with it all seeds run. A seed sets weights, order and noise.
Every run is written to ``benchmarks/results/neural_sde.json`` when it ends and is skipped from then on; its weights
stay in ``runs/neural_sde``. torchsde does not choose the first step of a solve, and lets a step grow by 1.4 at most;
so each model, also the one without regularization, predicts with the first step, out of four or five, that needs the
fewest evaluations on validation data. Evaluations are those of the drift in a batch of 1,000 images or 2,000
trajectories; the midpoint method evaluates the diffusion as often. Seconds are processor time of one thread.
``test_moment_error_fine`` is the moment error of the same model at a tenth of the tolerance.

**tolerances**: evaluations and quality of the models of the front, on the first 1,000 images or all trajectories of
the test set, at the tolerance of training and at tighter ones, each with its best first step. ``drift`` and
``diffusion`` are root mean squares of the two over the starts and entries of that batch.

**layer**: one adaptive solve of the MNIST network, at random weights, for 256 states: evaluations of drift and
diffusion that torchsde asks for and that ``NeuralSDE`` makes, and the time of forward and backward, in turn.
"""

import argparse
import json
import math
import statistics
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torchsde
from _fits import quiet_trainer
from _grid import Key, Row, process_pool, run_missing, whole_splits
from _runner import paired_times, ratio_summary, read_result, write_result
from torch import Tensor, nn

from lightning_opt.callbacks import GlobalODERegularization, LocalODERegularization
from lightning_opt.data import MNIST, Digits, SpiralSDE
from lightning_opt.models import NeuralSDEClassifier, NeuralSDEMoments
from lightning_opt.ode import NeuralSDE
from lightning_opt.schedules import LinearDecayLR

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "runs" / "neural_sde"
PICTURE = ROOT / "docs" / "methods" / "img" / "neural_sde.png"
SETTINGS: dict[str, Any] = {
    "tolerance": 1e-2,
    "sde_type": "stratonovich",
    "method": "midpoint",
    "data": {
        "digits": {"steps": 600, "first_step": 0.3, "first_steps": [0.1, 0.2, 0.3, 0.5, 1.0]},
        "mnist": {"steps": 1500, "first_step": 0.3, "first_steps": [0.1, 0.2, 0.3, 0.5, 1.0]},
        "spiral": {"steps": 600, "first_step": 0.05, "first_steps": [0.02, 0.05, 0.1, 0.2]},
    },
    "batch_size": {"digits": 128, "mnist": 128, "spiral": 200},
    "margin": {"digits": 0.005, "mnist": 0.005, "spiral": 0.1},
}
RATES = {"digits": [3e-3, 1e-2, 3e-2], "mnist": [3e-3, 1e-2, 3e-2], "spiral": [1e-2, 2e-2, 4e-2, 8e-2]}
COEFFS = {
    "digits": [0.1, 0.3, 1.0, 3.0, 10.0],
    "mnist": [0.1, 0.3, 1.0, 3.0, 10.0],
    "spiral": [0.1, 0.25, 0.5, 1.0, 2.0],
}
GLOBAL_COEFFS = {"digits": [0.3, 1.0, 3.0], "mnist": [0.3, 1.0, 3.0], "spiral": [0.25, 1.0]}
METHODS = ("vanilla", "local unbiased", "local biased", "global")
SEEDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    front = commands.add_parser("front")
    front.add_argument("--only", nargs="+", choices=RATES, metavar="DATA", default=list(RATES))
    front.add_argument("--processes", type=int, default=1)
    front.add_argument("--smoke", action="store_true")
    commands.add_parser("tolerances")
    commands.add_parser("layer")
    commands.add_parser("picture")
    options = parser.parse_args()
    if options.command == "front":
        smoke() if options.smoke else compare(options.only, options.processes)
    elif options.command == "tolerances":
        measure_tolerances()
    elif options.command == "layer":
        measure_layer()
    else:
        picture()


# --- training ---


def make_model(data: str, seed: int) -> Any:
    tolerance = SETTINGS["tolerance"]
    solver = {"sde_type": SETTINGS["sde_type"], "method": SETTINGS["method"], "rtol": tolerance, "atol": tolerance}
    solver |= {"dt": SETTINGS["data"][data]["first_step"], "seed": seed}
    torch.manual_seed(seed)
    if data == "spiral":
        return NeuralSDEMoments(**solver)
    return NeuralSDEClassifier(in_features=64 if data == "digits" else 784, **solver)


def data_module(data: str, seed: int = 0) -> Any:
    size = SETTINGS["batch_size"][data]
    if data == "digits":
        return Digits(batch_size=size, val_size=237, seed=seed)
    if data == "mnist":
        return MNIST(batch_size=size, val_size=5000, train_size=10_000, seed=seed)
    return SpiralSDE(batch_size=size, num_times=6, val_size=2000, seed=seed)


@cache
def splits(data: str) -> dict[str, tuple[Tensor, Tensor]]:
    return whole_splits(data_module(data))


class Evaluations(pl.Callback):
    """Counts the evaluations of the drift in training."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        self.counts.append(pl_module.sde.last_solve.nfe_forward)


def regularizer(method: str, coeff: float, seed: int) -> list[pl.Callback]:
    if method == "vanilla":
        return []
    if method == "global":
        return [GlobalODERegularization(coeff=coeff, decay="constant")]
    return [LocalODERegularization(coeff=coeff, decay="constant", sampling=method.split()[1], seed=seed)]  # type: ignore[arg-type]


def run(data: str, method: str, coeff: float, rate: float, seed: int, steps: int | None = None) -> Row:
    torch.set_num_threads(1)
    model, module, counter = make_model(data, seed), data_module(data, seed), Evaluations()
    total = steps or SETTINGS["data"][data]["steps"]
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = {"scheduler": LinearDecayLR(optimizer, total), "interval": "step"}
    model.configure_optimizers = lambda: {"optimizer": optimizer, "lr_scheduler": schedule}
    trainer = quiet_trainer(
        limit_val_batches=0, max_steps=total, max_epochs=-1, callbacks=[*regularizer(method, coeff, seed), counter]
    )
    module.prepare_data()
    module.setup("fit")
    begin = time.process_time()
    trainer.fit(model, module)
    seconds = time.process_time() - begin
    row = {"data": data, "method": method, "coeff": coeff, "rate": rate, "seed": seed}
    row |= {"cpu_seconds": round(seconds, 2), "train_nfe": statistics.mean(counter.counts)}
    row["first_step"] = choose_first_step(data, model)
    for split in ("val", "test"):
        row |= {f"{split}_{name}": value for name, value in evaluate(data, model, split).items()}
    if data == "spiral":
        model.sde.rtol = model.sde.atol = SETTINGS["tolerance"] / 10
        row["test_moment_error_fine"] = evaluate(data, model, "test")["moment_error"]
    if steps is None:
        WEIGHTS.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), weights_path(data, method, coeff, rate, seed))
    return row


def choose_first_step(data: str, model: Any) -> float:
    """Give a model the first step of a prediction with which it needs the fewest evaluations on validation data."""
    needed = {}
    for size in SETTINGS["data"][data]["first_steps"]:
        model.sde.dt = size
        needed[size] = evaluate(data, model, "val")["nfe"]
    model.sde.dt = min(needed, key=lambda size: needed[size])
    return model.sde.dt


@torch.no_grad()
def evaluate(data: str, model: Any, split: str) -> dict[str, float]:
    """Accuracy or moment error, evaluations of a batch, and processor seconds of all of them."""
    model.eval()
    inputs, targets = splits(data)[split]
    begin, evaluations = time.process_time(), []
    if data == "spiral":
        quality = {"moment_error": float(model._compare((inputs, targets))[1])}
        evaluations.append(model.sde.last_solve.nfe_forward)
    else:
        correct = 0
        for x, y in zip(inputs.split(1000), targets.split(1000), strict=True):
            correct += int((model(x).argmax(dim=1) == y).sum())
            evaluations.append(model.sde.last_solve.nfe_forward)
        quality = {"accuracy": correct / len(targets)}
    return {**quality, "nfe": statistics.mean(evaluations), "seconds": round(time.process_time() - begin, 4)}


def weights_path(data: str, method: str, coeff: float, rate: float, seed: int) -> Path:
    return WEIGHTS / f"{data}-{method.replace(' ', '-')}-{coeff:g}-{rate:g}-{seed}.pt"


def trained(data: str, method: str, coeff: float, rate: float, seed: int) -> Any:
    """The model with the weights of a finished run."""
    model = make_model(data, seed)
    model.load_state_dict(torch.load(weights_path(data, method, coeff, rate, seed), weights_only=True))
    return model.eval()


# --- the front ---


def compare(names: list[str], processes: int) -> None:
    rows = on_file()
    with process_pool(processes) as pool:

        def done(row: Row) -> None:
            print(in_words(row), flush=True)
            write(rows)

        run_all = partial(run_missing, pool, run, rows=rows, done=done)
        for data in names:
            run_all([(data, "vanilla", 0.0, rate, 0) for rate in RATES[data]])
            search = Search(rows, data)
            run_all([search.key(method, coeff, 0) for method in METHODS for coeff in coeffs(data, method)])
            run_all([search.key(m, search.coeff(m), seed) for seed in range(1, SEEDS) for m in METHODS])
    write(rows)
    for data, result in summary(rows).items():
        for method, r in result["methods"].items():
            quality = f"{r['test_quality']:.4f} ± {r['test_quality_std']:.4f}"
            print(f"{data:<10}{method:<18}{r['coeff']:>7g}{r['test_nfe']:>8.1f}{r['nfe_ratio']:>8.3f}{quality:>20}")


def coeffs(data: str, method: str) -> list[float]:
    return {"vanilla": [0.0], "global": GLOBAL_COEFFS[data]}.get(method, COEFFS[data])


class Search:
    """What the finished runs of one data set say."""

    def __init__(self, rows: dict[Key, Row], data: str) -> None:
        self.rows, self.data = rows, data
        tried = [rate for rate in RATES[data] if (data, "vanilla", 0.0, rate, 0) in rows]
        self.rate = max(tried, key=lambda rate: self.score(rows[data, "vanilla", 0.0, rate, 0]))

    def score(self, row: Row) -> float:
        """Of validation data; the larger the better."""
        return -row["val_moment_error"] if self.data == "spiral" else row["val_accuracy"]

    def key(self, method: str, coeff: float, seed: int) -> Key:
        return (self.data, method, coeff, self.rate, seed)

    def front(self, method: str) -> list[Row]:
        """The runs of seed 0, one a coefficient."""
        keys = [self.key(method, coeff, 0) for coeff in coeffs(self.data, method)]
        return [self.rows[key] for key in keys if key in self.rows]

    def coeff(self, method: str) -> float:
        """The method's own coefficient, by validation data of seed 0."""
        front, margin = self.front(method), SETTINGS["margin"][self.data]
        plain = self.score(self.rows[self.key("vanilla", 0.0, 0)])
        needed = plain * (1 + margin) if self.data == "spiral" else plain - margin
        good = [row for row in front if self.score(row) >= needed - 1e-9]
        if good:
            return min(good, key=lambda row: (row["val_nfe"], -self.score(row)))["coeff"]
        return max(front, key=self.score)["coeff"]

    def finished(self, method: str) -> list[Row] | None:
        """The runs with the method's own coefficient, one a seed; ``None`` if some of its runs are missing."""
        if len(self.front(method)) < len(coeffs(self.data, method)):
            return None
        keys = [self.key(method, self.coeff(method), seed) for seed in range(SEEDS)]
        return [self.rows[key] for key in keys] if all(key in self.rows for key in keys) else None


def summary(rows: dict[Key, Row]) -> dict[str, Any]:
    """For each data set: the rate, the front of seed 0, and each finished method on all seeds beside vanilla."""
    found: dict[str, Any] = {}
    for data in RATES:
        if any((data, "vanilla", 0.0, rate, 0) not in rows for rate in RATES[data]):
            continue
        search, quality = Search(rows, data), "moment_error" if data == "spiral" else "accuracy"
        columns = ("coeff", f"val_{quality}", "val_nfe", f"test_{quality}", "test_nfe", "train_nfe", "cpu_seconds")
        front = {method: [{c: row[c] for c in columns} for row in search.front(method)] for method in METHODS}
        found[data] = {"rate": search.rate, "quality": quality, "front": front, "methods": {}}
        plain = search.finished("vanilla")
        for method in METHODS:
            own = search.finished(method)
            if own is not None and plain is not None:
                found[data]["methods"][method] = beside(own, plain, f"test_{quality}")
    return found


def beside(own: list[Row], plain: list[Row], quality: str) -> dict[str, Any]:
    """Means over seeds, and ratios and differences paired by seed."""
    pairs = list(zip(own, plain, strict=True))
    gains = [a[quality] - b[quality] for a, b in pairs]

    def ratio(name: str) -> float:
        return statistics.mean(a[name] / b[name] for a, b in pairs)

    result = {
        "coeff": own[0]["coeff"],
        "test_nfe": statistics.mean(row["test_nfe"] for row in own),
        "nfe_ratio": ratio("test_nfe"),
        "test_quality": statistics.mean(row[quality] for row in own),
        "test_quality_std": statistics.stdev(row[quality] for row in own),
        "gained": statistics.mean(gains),
        "gained_standard_error": statistics.stdev(gains) / math.sqrt(len(gains)),
        "train_nfe": statistics.mean(row["train_nfe"] for row in own),
        "train_seconds_ratio": ratio("cpu_seconds"),
        "prediction_seconds_ratio": ratio("test_seconds"),
    }
    if "test_moment_error_fine" in own[0]:
        result["test_moment_error_fine"] = statistics.mean(row["test_moment_error_fine"] for row in own)
    return result


def in_words(row: Row) -> str:
    quality = f"error {row['test_moment_error']:.4f}" if row["data"] == "spiral" else f"{row['test_accuracy']:.2%}"
    name = f"{row['data']:<8}{row['method']:<16}{row['coeff']:>6g} rate {row['rate']:g} seed {row['seed']}:"
    return f"{name} {row['test_nfe']:>6.1f} evaluations, {quality}, {row['cpu_seconds']:.1f} s"


def on_file() -> dict[Key, Row]:
    """Finished runs of the same settings."""
    old = read_result("neural_sde")
    runs = old.get("runs", []) if old.get("settings") == json.loads(json.dumps(SETTINGS)) else []
    return {(row["data"], row["method"], row["coeff"], row["rate"], row["seed"]): row for row in runs}


def write(rows: dict[Key, Row]) -> None:
    def place(row: Row) -> tuple[Any, ...]:
        return list(RATES).index(row["data"]), METHODS.index(row["method"]), *list(row.values())[2:5]

    others = {name: part for name, part in read_result("neural_sde").items() if name in ("tolerances", "layer")}
    content = {"settings": SETTINGS, "results": summary(rows), **others, "runs": sorted(rows.values(), key=place)}
    write_result("neural_sde", content)


def write_part(name: str, part: dict[str, Any]) -> None:
    """Put what another command found beside the front."""
    kept = {key: value for key, value in read_result("neural_sde").items() if key not in ("command", "date", "machine")}
    write_result("neural_sde", {**kept, name: part})


def smoke() -> None:
    for data in RATES:
        for method in METHODS:
            print(in_words(run(data, method, coeffs(data, method)[-1], 1e-2, 0, steps=3)))


# --- tolerances ---


@torch.no_grad()
def measure_tolerances() -> None:
    torch.set_num_threads(1)
    rows, found = on_file(), {}
    for data in summary(rows):
        search = Search(rows, data)
        for method in METHODS:
            if search.finished(method) is None:
                continue
            parts = [parts_of(data, trained(data, method, search.coeff(method), search.rate, s)) for s in range(SEEDS)]
            names = ("drift", "diffusion")
            found.setdefault(data, {})[method] = {n: statistics.mean(part[n] for part in parts) for n in names}
            for factor in (1, 0.3, 0.1):
                tolerance, needed, qualities = factor * SETTINGS["tolerance"], [], []
                for seed in range(SEEDS):
                    model = trained(data, method, search.coeff(method), search.rate, seed)
                    model.sde.rtol = model.sde.atol = tolerance
                    nfe, quality = min(one_batch(data, model, size) for size in SETTINGS["data"][data]["first_steps"])
                    needed.append(nfe)
                    qualities.append(quality)
                found[data][method][f"{tolerance:g}"] = {
                    "nfe": statistics.mean(needed),
                    "nfe_by_seed": needed,
                    "quality": statistics.mean(qualities),
                }
                print(data, method, tolerance, needed, qualities, flush=True)
    write_part("tolerances", found)


def parts_of(data: str, model: Any) -> dict[str, float]:
    """Root mean squares of drift and diffusion where trajectories of the test set start."""
    inputs, targets = splits(data)["test"]
    starts = targets[:, 0] if data == "spiral" else model.net[:2](inputs[:1000])
    t = torch.zeros(())
    return {n: float(getattr(model.sde, n)(t, starts).square().mean().sqrt()) for n in ("drift", "diffusion")}


def one_batch(data: str, model: Any, first_step: float) -> tuple[int, float]:
    """Evaluations and quality on a batch of the test set."""
    model.sde.dt = first_step
    inputs, targets = splits(data)["test"]
    if data == "spiral":
        quality = float(model._compare((inputs, targets))[1])
    else:
        quality = float((model(inputs[:1000]).argmax(dim=1) == targets[:1000]).float().mean())
    return model.sde.last_solve.nfe_forward, quality


# --- the layer ---


def measure_layer(rounds: int = 15) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for sde_type, method in (("ito", "euler"), ("ito", "srk"), ("stratonovich", "midpoint")):
        torch.manual_seed(0)
        block = NeuralSDEClassifier(sde_type=sde_type, method=method, dt=0.1).sde
        y0 = torch.randn(256, 32)
        plain, levy = Plain(block), "space-time" if method == "srk" else "none"
        path = partial(torchsde.BrownianInterval, 0.0, 1.0, y0.shape, entropy=0, levy_area_approximation=levy)

        options = {"method": method, "dt": 0.1, "adaptive": True, "rtol": block.rtol, "atol": block.atol}

        def by_torchsde(plain: nn.Module = plain, y0: Tensor = y0, path: Any = path, options: Any = options) -> None:
            end = torchsde.sdeint(plain, y0, torch.tensor([0.0, 1.0]), bm=path(), **options)[-1]
            end.square().sum().backward()

        def by_layer(block: NeuralSDE = block, y0: Tensor = y0, path: Any = path) -> None:
            block(y0, noise=path()).square().sum().backward()

        by_torchsde()
        asked = dict(plain.asked)
        by_layer()
        record = block.last_solve
        assert record is not None
        times = paired_times({"torchsde": by_torchsde, "NeuralSDE": by_layer}, rounds, clock=time.process_time)
        found[f"{sde_type} {method}"] = {
            "accepted": record.accepted,
            "rejected": record.rejected,
            "torchsde": asked,
            "NeuralSDE": {"drift": record.nfe_forward, "diffusion": record.diffusion_forward},
            "speedup": ratio_summary(times, "torchsde", "NeuralSDE"),
        }
    print(json.dumps(found, indent=1))
    write_part("layer", found)


class Plain(nn.Module):
    """The equation of a block as torchsde's users write it, counting what is asked."""

    def __init__(self, block: NeuralSDE) -> None:
        super().__init__()
        self.noise_type, self.sde_type = block.noise_type, block.sde_type
        self.drift, self.diffusion = block.drift, block.diffusion
        self.asked = {"drift": 0, "diffusion": 0}

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        self.asked["drift"] += 1
        return self.drift(t, y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        self.asked["diffusion"] += 1
        return self.diffusion(t, y)


# --- the picture ---


@torch.no_grad()
def picture() -> None:
    """The spiral with and without, its moments, step sizes, and the fronts."""
    import matplotlib.pyplot as plt

    rows = on_file()
    search = Search(rows, "spiral")
    colors = {"vanilla": "C3", "local unbiased": "C0", "local biased": "C2", "global": "C1"}
    labels = {"vanilla": "no regularization", "local unbiased": "local, unbiased"}
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.6), layout="constrained")
    inputs, targets = splits("spiral")["test"]
    grid = torch.linspace(0, 1, 41)
    module = SpiralSDE(num_times=41, num_steps=1000, train_size=2, val_size=2)
    module.setup()
    truth = module.test_set.trajectories  # type: ignore[union-attr]
    steps = axes[1, 0]
    for axis, method in zip(axes[0], ("vanilla", "local unbiased"), strict=False):
        model = trained("spiral", method, search.coeff(method), search.rate, 0)
        model.sde.dt = rows[search.key(method, search.coeff(method), 0)]["first_step"]
        model(targets[:, 0], inputs[0])
        record = model.sde.last_solve
        starts = torch.tensor([2.0, 0.0]).expand(2000, 2)
        paths = model(starts, grid)
        for path in truth[:12]:
            axis.plot(*path.T, color="0.8", lw=0.8)
        for path in paths[:12]:
            axis.plot(*path.T, color=colors[method], lw=0.8, alpha=0.6)
        axis.plot(*truth.mean(dim=0).T, "k--", lw=1.5, label="mean of the data")
        axis.plot(*paths.mean(dim=0).T, color=colors[method], lw=2, label="mean of the model")
        axis.set(title=f"spiral, {labels[method]}: {record.nfe_forward} evaluations", xlabel="x", ylabel="y")
        axis.legend(fontsize=8)
        steps.step(
            [*record.t, 1.0], [*record.dt, record.dt[-1]], where="post", color=colors[method], label=labels[method]
        )
        for entry, style in ((0, "-"), (1, "--")):
            moments = axes[0, 2]
            moments.plot(
                grid,
                paths[..., entry].std(dim=0),
                style,
                color=colors[method],
                label=f"{labels[method]}, {'xy'[entry]}",
            )
    for entry, style in ((0, "-"), (1, "--")):
        axes[0, 2].plot(grid, truth[..., entry].std(dim=0), style, color="k", label=f"data, {'xy'[entry]}")
    axes[0, 2].set(title="spiral, standard deviation over trajectories", xlabel="time")
    axes[0, 2].legend(fontsize=7)
    steps.set(title="spiral, accepted step sizes", xlabel="time", yscale="log")
    steps.legend(fontsize=8)
    for axis, data in zip(axes[1, 1:], ("mnist", "spiral"), strict=True):
        own = Search(rows, data)
        quality = "test_moment_error" if data == "spiral" else "test_accuracy"
        for method in METHODS:
            front = own.front(method)
            x, y = [row["test_nfe"] for row in front], [row[quality] for row in front]
            axis.plot(x, y, "o" if method == "vanilla" else "o-", ms=4, lw=1, color=colors[method], label=method)
            if method.startswith("local u"):
                for row in front:
                    axis.annotate(
                        f"{row['coeff']:g}",
                        (row["test_nfe"], row[quality]),
                        fontsize=7,
                        xytext=(3, 3),
                        textcoords="offset points",
                    )
        name = {"mnist": "MNIST, test accuracy", "spiral": "spiral, moment error"}[data]
        axis.set(title=f"{name}, by coefficient (seed 0)", xlabel="evaluations of a prediction")
        axis.legend(fontsize=8)
    figure.savefig(PICTURE, dpi=110)
    print(PICTURE)


if __name__ == "__main__":
    main()
