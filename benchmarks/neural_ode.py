"""What local regularization of a neural ODE gives, and costs, beside the global regularizers, STEER and TayNODE.

    python benchmarks/neural_ode.py front            every coefficient of every method; some 50 minutes of one core
    python benchmarks/neural_ode.py front --only digits          one data set
    python benchmarks/neural_ode.py front --smoke    a few steps a method, to see that all of it runs; writes nothing
    python benchmarks/neural_ode.py time             prediction, solver, whole training runs; 4 minutes, behind front
    python benchmarks/neural_ode.py latent           a latent ODE with and without; some 7 minutes of one core
    python benchmarks/neural_ode.py pictures         the pictures of the card, behind front; a minute

MNIST and Fashion-MNIST need their files: see ``lightning_opt.data``.

**front**: a ``NeuralODEClassifier`` in float64, solved by Tsit5 at tolerance 1e-7, trained with Adam at a constant rate
through the Trainer. scikit-learn's digits: 64 pixels, hidden width 50, 30 epochs of 1,200 images in batches of 128.
MNIST and Fashion-MNIST: means over 2x2 pixels, 196 in all, hidden width 64, 10 epochs of 10,000 images in batches of
256; 5,000 others to choose by, all 10,000 test images. The rate is the one of three with which the model without
regularization is best on validation images, seed 0 (Fashion-MNIST takes that of MNIST); every method has it. Each
method then runs with all its coefficients on seed 0, on the larger images with fewer. Its own coefficient is the one
with the fewest evaluations on validation images among those that lose at most 0.25 points of validation accuracy (of
digits one image), or else the most accurate; with it all seeds run.
Error terms fall exponentially during training, local ones to 0.4 of the start and global ones to 0.1, as the authors
have them; stiffness terms are constant. One method adds its term in every other step alone. Every run is written to
``benchmarks/results/neural_ode.json`` when it ends and is skipped from then on; its weights stay in
``runs/neural_ode``. Seconds are processor time of one thread.

**time** loads these weights. *prediction*: 1,000 test images (digits: all 360) in one batch, all methods in turn, the
order turning; for each seed the ratio of times and that of evaluations. *solver*: the same weights by our Tsit5 and
Dopri5 and by torchdiffeq's Dopri5 at the same tolerances: prediction, and forward with backward. torchdiffeq's error
weights are 2/3 of Dormand and Prince's, so that it takes somewhat fewer steps. *training*: whole runs, one of each
method in turn.
"""

import argparse
import json
import math
import statistics
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from _fits import quiet_trainer
from _grid import Key, Row, process_pool, run_missing, whole_splits
from _runner import paired_times, ratio_summary, read_result, write_result
from torch import Tensor, nn

from lightning_opt.data import MNIST, CoupledOscillators, Digits, FashionMNIST
from lightning_opt.models import LatentODE, NeuralODEClassifier
from lightning_opt.ode import (
    NeuralODE,
    global_regularization,
    local_error,
    local_regularization,
    steer_end,
    taynode_regularization,
)

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "runs" / "neural_ode"
PICTURES = ROOT / "docs" / "methods" / "img"
SETTINGS: dict[str, Any] = {
    "tolerance": 1e-7,
    "precision": "64-true",
    "optimizer": "Adam",
    "margin": 0.0025,  # of validation accuracy
    "data": {
        "digits": {"in_features": 64, "hidden": [50], "pool": 1, "epochs": 30, "batch_size": 128, "val_size": 237},
        "mnist": {"in_features": 784, "hidden": [64], "pool": 2, "epochs": 10, "batch_size": 256, "val_size": 5000},
        "fashion_mnist": {
            "in_features": 784,
            "hidden": [64],
            "pool": 2,
            "epochs": 10,
            "batch_size": 256,
            "val_size": 5000,
        },
    },
    "train_size": 10_000,
}
RATES = {"digits": [1e-3, 3e-3, 6e-3], "mnist": [1e-3, 3e-3, 6e-3], "fashion_mnist": [3e-3]}
DATA: dict[str, Any] = {"digits": Digits, "mnist": MNIST, "fashion_mnist": FashionMNIST}
METHODS: dict[str, dict[str, Any]] = {
    "vanilla": {"kind": "none", "coeffs": [0.0]},
    "local unbiased, error": {
        "kind": "local",
        "options": {"sampling": "unbiased", "estimate": "error"},
        "coeffs": [0.05, 0.2, 0.5, 1.0, 5.0],
        "fewer": [0.05, 0.2, 0.5, 1.0],
        "falls_to": 0.4,
    },
    "local biased, error": {
        "kind": "local",
        "options": {"sampling": "biased", "estimate": "error"},
        "coeffs": [0.05, 0.2, 0.5, 1.0, 5.0],
        "fewer": [0.2, 0.5, 1.0],
        "falls_to": 0.4,
    },
    "local unbiased, error, every other step": {
        "kind": "local",
        "options": {"sampling": "unbiased", "estimate": "error"},
        "every": 2,
        "coeffs": [0.4, 1.0, 2.0],
        "fewer": [0.4, 1.0],
        "falls_to": 0.4,
    },
    "local unbiased, stiffness": {
        "kind": "local",
        "options": {"sampling": "unbiased", "estimate": "stiffness"},
        "coeffs": [0.1, 1.0, 10.0],
        "fewer": [1.0, 10.0],
        "falls_to": 1.0,
    },
    "local biased, stiffness": {
        "kind": "local",
        "options": {"sampling": "biased", "estimate": "stiffness"},
        "coeffs": [1.0, 10.0],
        "fewer": [1.0],
        "falls_to": 1.0,
    },
    "ERNODE": {
        "kind": "global",
        "options": {"estimate": "error"},
        "coeffs": [0.2, 1.0, 5.0],
        "fewer": [0.2, 0.5, 1.0],
        "falls_to": 0.1,
    },
    "SRNODE": {
        "kind": "global",
        "options": {"estimate": "stiffness"},
        "coeffs": [0.1, 1.0, 10.0],
        "fewer": [1.0],
        "falls_to": 1.0,
    },
    "STEER": {"kind": "steer", "coeffs": [0.5]},
    "TayNODE": {"kind": "taynode", "coeffs": [0.1, 1.0], "fewer": [1.0], "falls_to": 1.0},
}
ORDER = [["vanilla", "local unbiased, error"], ["local biased, error", "ERNODE"], list(METHODS)]
SEEDS = 3


def coeffs(data: str, method: str) -> list[float]:
    """All of a method's coefficients on digits, fewer on the larger images."""
    own = METHODS[method]
    return own["coeffs"] if data == "digits" else own.get("fewer", own["coeffs"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    front = commands.add_parser("front")
    front.add_argument("--only", nargs="+", choices=DATA, metavar="DATA", default=list(DATA))
    front.add_argument("--processes", type=int, default=1)
    front.add_argument("--smoke", action="store_true")
    timing = commands.add_parser("time")
    timing.add_argument("--rounds", type=int, default=15, help="of predictions and solves")
    timing.add_argument("--fits", type=int, default=3, help="whole runs of a method on digits; one on the others")
    commands.add_parser("latent").add_argument("--processes", type=int, default=1)
    commands.add_parser("pictures")
    options = parser.parse_args()
    if options.command == "front":
        smoke() if options.smoke else compare(options.only, options.processes)
    elif options.command == "time":
        measure_times(options.rounds, options.fits)
    elif options.command == "latent":
        latent(options.processes)
    else:
        pictures()


# --- training ---


class Model(NeuralODEClassifier):
    """A classifier with one of the regularizers."""

    def __init__(self, data: str, method: str, coeff: float, rate: float, seed: int) -> None:
        own = SETTINGS["data"][data]
        tolerance = SETTINGS["tolerance"]
        super().__init__(own["in_features"], tuple(own["hidden"]), pool=own["pool"], rtol=tolerance, atol=tolerance)
        self.kind = METHODS[method]["kind"]
        self.options = METHODS[method].get("options", {})
        self.every = METHODS[method].get("every", 1)
        self.coeff, self.falls_to, self.rate = coeff, METHODS[method].get("falls_to", 1.0), rate
        self.generator = torch.Generator().manual_seed(seed)
        self.ode.keep_graph = self.kind in ("global", "taynode")
        self.evaluations: list[int] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        if self.kind == "steer":
            self.ode.t_span = (0.0, steer_end(0.0, 1.0, self.coeff, self.generator))
        loss = super().training_step(batch)
        self.ode.t_span = (0.0, 1.0)
        assert self.ode.last_solve is not None
        self.evaluations.append(self.ode.last_solve.nfe_forward)
        if self.kind in ("none", "steer") or self.global_step % self.every:
            return loss
        if self.kind == "local":
            term = local_regularization(self.ode, generator=self.generator, **self.options)
        elif self.kind == "global":
            term = global_regularization(self.ode, **self.options)
        else:
            term = taynode_regularization(self.ode)
        progress = self.global_step / self.trainer.estimated_stepping_batches
        return loss + self.coeff * self.falls_to**progress * term

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.rate)


def data_module(data: str, seed: int = 0) -> Any:
    own = SETTINGS["data"][data]
    size = {} if data == "digits" else {"train_size": SETTINGS["train_size"]}
    return DATA[data](batch_size=own["batch_size"], val_size=own["val_size"], seed=seed, **size)


@cache
def splits(data: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Images, in float64, and labels of the three splits."""
    return {name: (x.double(), y) for name, (x, y) in whole_splits(data_module(data)).items()}


def fit(data: str, method: str, coeff: float, rate: float, seed: int, **options: Any) -> tuple[Model, float, float]:
    """The trained model, its processor and wall seconds."""
    torch.manual_seed(seed)
    model = Model(data, method, coeff, rate, seed)
    module = data_module(data, seed)
    options = {"max_epochs": SETTINGS["data"][data]["epochs"], "precision": SETTINGS["precision"], **options}
    trainer = quiet_trainer(limit_val_batches=0, **options)
    module.setup("fit")
    cpu, wall = time.process_time(), time.perf_counter()
    trainer.fit(model, module)
    return model, time.process_time() - cpu, time.perf_counter() - wall


def run(data: str, method: str, coeff: float, rate: float, seed: int, **options: Any) -> Row:
    torch.set_num_threads(1)
    model, cpu, wall = fit(data, method, coeff, rate, seed, **options)
    row = {
        "data": data,
        "method": method,
        "coeff": coeff,
        "rate": rate,
        "seed": seed,
        "cpu_seconds": round(cpu, 2),
        "wall_seconds": round(wall, 2),
        "train_nfe": statistics.mean(model.evaluations),
    }
    for split in ("val", "test"):
        accuracy, nfe = evaluate(model, *splits(data)[split])
        row |= {f"{split}_accuracy": accuracy, f"{split}_nfe": nfe}
    if not options:
        WEIGHTS.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), weights_path(data, method, coeff, rate, seed))
    return row


@torch.no_grad()
def evaluate(model: NeuralODEClassifier, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy, and evaluations of a batch of 1,000, mean over batches."""
    model.eval()
    correct, evaluations = 0, []
    for x, y in zip(images.split(1000), labels.split(1000), strict=True):
        correct += int((model(x).argmax(dim=1) == y).sum())
        assert model.ode.last_solve is not None
        evaluations.append(model.ode.last_solve.nfe_forward)
    return correct / len(labels), statistics.mean(evaluations)


def weights_path(data: str, method: str, coeff: float, rate: float, seed: int) -> Path:
    return WEIGHTS / f"{data}-{method.replace(', ', '-').replace(' ', '-')}-{coeff:g}-{rate:g}-{seed}.pt"


def trained(data: str, method: str, coeff: float, rate: float, seed: int) -> Model:
    """The model with the weights of a finished run."""
    model = Model(data, method, coeff, rate, seed).double()
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
        for methods in ORDER:
            for data in names:
                run_all([(data, "vanilla", 0.0, rate, 0) for rate in RATES[data]])
                search = Search(rows, data)
                run_all([search.key(method, coeff, 0) for method in methods for coeff in coeffs(data, method)])
                run_all([search.key(m, search.coeff(m), seed) for m in methods for seed in range(1, SEEDS)])
    write(rows)
    for data, result in summary(rows).items():
        for method, r in result["methods"].items():
            accuracy = f"{r['test_accuracy']:.2%} ± {r['test_accuracy_std']:.2%}"
            print(f"{data:<14}{method:<40}{r['coeff']:>7g}{r['test_nfe']:>8.1f}{r['nfe_ratio']:>8.3f}{accuracy:>18}")


class Search:
    """What the finished runs of one data set say."""

    def __init__(self, rows: dict[Key, Row], data: str) -> None:
        self.rows, self.data = rows, data
        tried = [rate for rate in RATES[data] if (data, "vanilla", 0.0, rate, 0) in rows]
        self.rate = max(tried, key=lambda rate: rows[data, "vanilla", 0.0, rate, 0]["val_accuracy"])

    def key(self, method: str, coeff: float, seed: int) -> Key:
        return (self.data, method, coeff, self.rate, seed)

    def front(self, method: str) -> list[Row]:
        """The runs of seed 0, one a coefficient."""
        keys = [self.key(method, coeff, 0) for coeff in coeffs(self.data, method)]
        return [self.rows[key] for key in keys if key in self.rows]

    def coeff(self, method: str) -> float:
        """The method's own coefficient, by validation images of seed 0."""
        front = self.front(method)
        margin = max(SETTINGS["margin"], 1 / SETTINGS["data"][self.data]["val_size"])
        needed = self.rows[self.key("vanilla", 0.0, 0)]["val_accuracy"] - margin
        accurate = [row for row in front if row["val_accuracy"] >= needed - 1e-9]
        if accurate:
            return min(accurate, key=lambda row: (row["val_nfe"], -row["val_accuracy"]))["coeff"]
        return max(front, key=lambda row: row["val_accuracy"])["coeff"]

    def finished(self, method: str) -> list[Row] | None:
        """The runs with the method's own coefficient, one a seed; ``None`` if some of its runs are missing."""
        if len(self.front(method)) < len(coeffs(self.data, method)):
            return None
        keys = [self.key(method, self.coeff(method), seed) for seed in range(SEEDS)]
        return [self.rows[key] for key in keys] if all(key in self.rows for key in keys) else None


def summary(rows: dict[Key, Row]) -> dict[str, Any]:
    """For each data set: the rate, the front of seed 0, and each finished method on all seeds beside vanilla."""
    found: dict[str, Any] = {}
    for data in DATA:
        if any((data, "vanilla", 0.0, rate, 0) not in rows for rate in RATES[data]):
            continue
        search = Search(rows, data)
        columns = ("coeff", "val_accuracy", "val_nfe", "test_accuracy", "test_nfe", "train_nfe", "cpu_seconds")
        front = {method: [{c: row[c] for c in columns} for row in search.front(method)] for method in METHODS}
        found[data] = {"rate": search.rate, "front": front, "methods": {}}
        plain = search.finished("vanilla")
        for method in METHODS:
            own = search.finished(method)
            if own is not None and plain is not None:
                found[data]["methods"][method] = beside(own, plain)
    return found


def beside(own: list[Row], plain: list[Row]) -> dict[str, Any]:
    """Means over seeds, and ratios and differences paired by seed."""
    pairs = list(zip(own, plain, strict=True))
    gains = [100 * (a["test_accuracy"] - b["test_accuracy"]) for a, b in pairs]
    return {
        "coeff": own[0]["coeff"],
        "test_nfe": statistics.mean(row["test_nfe"] for row in own),
        "nfe_ratio": statistics.mean(a["test_nfe"] / b["test_nfe"] for a, b in pairs),
        "test_accuracy": statistics.mean(row["test_accuracy"] for row in own),
        "test_accuracy_std": statistics.stdev(row["test_accuracy"] for row in own),
        "points_gained": statistics.mean(gains),
        "points_standard_error": statistics.stdev(gains) / math.sqrt(len(gains)),
        "train_nfe": statistics.mean(row["train_nfe"] for row in own),
        "cpu_seconds": statistics.mean(row["cpu_seconds"] for row in own),
    }


def in_words(row: Row) -> str:
    name = f"{row['data']:<14}{row['method']:<40}{row['coeff']:>7g} rate {row['rate']:g} seed {row['seed']}:"
    return f"{name} {row['test_nfe']:>6.1f} evaluations, {row['test_accuracy']:.2%}, {row['cpu_seconds']:.1f} s"


def on_file() -> dict[Key, Row]:
    """Finished runs of methods that are as they were; more coefficients, rates or methods leave them as they are."""
    old = read_result("neural_ode")
    now, then = _settings(), old.get("settings", {})
    same = [name for name in METHODS if then.get("methods", {}).get(name) == now["methods"][name]]
    if {**then, "methods": 0} != {**now, "methods": 0}:
        same = []
    rows = [row for row in old.get("runs", []) if row["method"] in same]
    return {(row["data"], row["method"], row["coeff"], row["rate"], row["seed"]): row for row in rows}


def write(rows: dict[Key, Row]) -> None:
    def place(row: Row) -> tuple[Any, ...]:
        return list(DATA).index(row["data"]), list(METHODS).index(row["method"]), *list(row.values())[2:5]

    ordered = sorted(rows.values(), key=place)
    write_result("neural_ode", {"settings": _settings(), "results": summary(rows), "runs": ordered})


def _settings() -> dict[str, Any]:
    """What a run depends on, but for coefficient and rate."""
    methods = {name: {k: v for k, v in own.items() if k not in ("coeffs", "fewer")} for name, own in METHODS.items()}
    return json.loads(json.dumps({**SETTINGS, "methods": methods}))


def smoke() -> None:
    for data in DATA:
        for method, own in METHODS.items():
            print(in_words(run(data, method, own["coeffs"][-1], 3e-3, 0, max_steps=3)))


# --- time ---


def measure_times(rounds: int, fits: int) -> None:
    torch.set_num_threads(1)
    rows = on_file()
    found: dict[str, Any] = {}
    for data in DATA:
        search = Search(rows, data)
        images, labels = (tensor[:1000] for tensor in splits(data)["test"])
        found[data] = {
            "images": len(images),
            "prediction": prediction_times(search, images, rounds),
            "solver": solver_times(search, images, labels, rounds),
            "training": training_times(search, fits if data == "digits" else 1),
        }
        print(data, json.dumps(found[data], indent=1), flush=True)
        write_result("neural_ode_time", {"rounds": rounds, "results": found})


def prediction_times(search: Search, images: Tensor, rounds: int) -> dict[str, Any]:
    """For each method, by seed: evaluations and time relative to vanilla, and the share of the gain that is felt."""
    methods = [method for method in METHODS if search.finished(method)]
    gains: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for seed in range(SEEDS):
        models = {m: trained(search.data, m, search.coeff(m), search.rate, seed) for m in methods}
        with torch.no_grad():
            times = paired_times({m: partial(models[m], images) for m in methods}, rounds)
        nfe = {m: models[m].ode.last_solve.nfe_forward for m in methods}  # type: ignore[union-attr]
        for method in methods:
            ratio, speedup = nfe[method] / nfe["vanilla"], ratio_summary(times, "vanilla", method)
            gains[method].append(
                {
                    "ms": 1000 * statistics.median(times[method]),
                    "nfe": nfe[method],
                    "nfe_ratio": ratio,
                    "speedup": speedup["median"],
                    "speedup_q10": speedup["q10"],
                    "speedup_q90": speedup["q90"],
                    "speedup_times_nfe_ratio": speedup["median"] * ratio,
                }
            )
    return {m: {key: statistics.mean(g[key] for g in rows) for key in rows[0]} for m, rows in gains.items()}


def solver_times(search: Search, images: Tensor, labels: Tensor, rounds: int) -> dict[str, Any]:
    """Our solver beside torchdiffeq's, on the model without regularization and the one with."""
    found: dict[str, Any] = {}
    for method in ("vanilla", "local unbiased, error"):
        model = trained(search.data, method, search.coeff(method), search.rate, 0)
        blocks = {
            name: NeuralODE(model.ode.func, rtol=model.ode.rtol, atol=model.ode.atol, method=pair, solver=solver)
            for name, pair, solver in (
                ("tsit5", "tsit5", "lightning_opt"),
                ("dopri5", "dopri5", "lightning_opt"),
                ("torchdiffeq dopri5", "dopri5", "torchdiffeq"),
            )
        }
        states, head = model.net[:2](images), model.net[-1]
        for name, timed in (("prediction", predict), ("forward and backward", gradients)):
            solves = {n: partial(timed, block, head, states, labels) for n, block in blocks.items()}
            times = paired_times(solves, rounds)
            nfe = {n: block.last_solve.nfe_forward for n, block in blocks.items()}  # type: ignore[union-attr]
            found[f"{method}: {name}"] = {
                "nfe": nfe,
                "ms": {n: 1000 * statistics.median(times[n]) for n in blocks},
                "torchdiffeq_over_tsit5": ratio_summary(times, "torchdiffeq dopri5", "tsit5"),
                "torchdiffeq_over_dopri5": ratio_summary(times, "torchdiffeq dopri5", "dopri5"),
            }
    return found


@torch.no_grad()
def predict(block: NeuralODE, head: nn.Module, states: Tensor, labels: Tensor) -> None:
    head(block.eval()(states))


def gradients(block: NeuralODE, head: nn.Module, states: Tensor, labels: Tensor) -> None:
    block.zero_grad()
    nn.functional.cross_entropy(head(block.train()(states)), labels).backward()


def training_times(search: Search, fits: int) -> dict[str, Any]:
    """Whole runs, one of each method in turn."""

    def whole(method: str) -> None:
        fit(search.data, method, search.coeff(method), search.rate, 0)

    methods = ["vanilla", "local unbiased, error", "local biased, error", "ERNODE"]
    times = paired_times({m: partial(whole, m) for m in methods}, fits, warmup=0)
    ratios = {
        f"{method} over {other}": ratio_summary(times, method, other)
        for method in methods[1:3]
        for other in ("vanilla", "ERNODE")
    }
    return {"fits": fits, "seconds": {m: statistics.median(times[m]) for m in methods}, **ratios}


# --- a latent ODE ---

LATENT: dict[str, Any] = {
    "model": {"latent": 8, "encoder_hidden": 32, "hidden": [32], "sigma": 0.1, "rtol": 1e-6, "atol": 1e-6},
    "precision": "64-true",
    "rate": 3e-2,
    "steps": 1000,
    "coeffs": [0.0, 0.3, 3.0],
    "falls_to": 0.1,
    "margin": 0.05,  # of the squared error on validation series, relative
}


class LatentModel(LatentODE):
    """A latent ODE with local regularization, unbiased, of the error."""

    def __init__(self, coeff: float, seed: int) -> None:
        super().__init__(4, **LATENT["model"], seed=seed)
        self.coeff = coeff
        self.generator = torch.Generator().manual_seed(seed)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if not self.coeff:
            return loss
        progress = self.global_step / LATENT["steps"]
        term = local_regularization(self.ode, generator=self.generator)
        return loss + self.coeff * LATENT["falls_to"] ** progress * term

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adamax(self.parameters(), LATENT["rate"])
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, LATENT["steps"])
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def run_latent(coeff: float, seed: int) -> Row:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, data = LatentModel(coeff, seed), CoupledOscillators(seed=seed)
    options = {"max_steps": LATENT["steps"], "max_epochs": -1, "precision": LATENT["precision"]}
    trainer = quiet_trainer(limit_val_batches=0, **options)
    begin = time.process_time()
    trainer.fit(model, data)
    row: Row = {"coeff": coeff, "seed": seed, "cpu_seconds": round(time.process_time() - begin, 2)}
    tester = quiet_trainer(precision=LATENT["precision"])
    row |= tester.validate(model, data, verbose=False)[0] | tester.test(model, data, verbose=False)[0]
    return row


def latent(processes: int) -> None:
    old = read_result("neural_ode_latent")
    runs = old["runs"] if old.get("settings") == json.loads(json.dumps(LATENT)) else []
    rows: dict[Key, Row] = {(row["coeff"], row["seed"]): row for row in runs}

    def done(row: Row) -> None:
        print(json.dumps(row), flush=True)
        ordered = [rows[key] for key in sorted(rows)]
        write_result("neural_ode_latent", {"settings": LATENT, "results": latent_summary(rows), "runs": ordered})

    with process_pool(processes) as pool:
        run_all = partial(run_missing, pool, run_latent, rows=rows, done=done)
        run_all([(coeff, 0) for coeff in LATENT["coeffs"]])
        run_all([(coeff, seed) for seed in range(1, SEEDS) for coeff in (0.0, latent_coeff(rows))])
    print(json.dumps(latent_summary(rows), indent=1))


def latent_coeff(rows: dict[Key, Row]) -> float:
    """The coefficient with the fewest evaluations whose error on validation series is within the margin."""
    needed = (1 + LATENT["margin"]) * rows[0.0, 0]["val/mse"]
    regularized = [rows[coeff, 0] for coeff in LATENT["coeffs"] if coeff]
    accurate = [row for row in regularized if row["val/mse"] <= needed]
    if accurate:
        return min(accurate, key=lambda row: (row["val/nfe"], row["val/mse"]))["coeff"]
    return min(regularized, key=lambda row: row["val/mse"])["coeff"]


def latent_summary(rows: dict[Key, Row]) -> dict[str, Any]:
    """With and without, means over the seeds that are there."""
    if any((coeff, 0) not in rows for coeff in LATENT["coeffs"]):
        return {}
    found = {}
    for name, coeff in (("vanilla", 0.0), ("local unbiased, error", latent_coeff(rows))):
        own = [rows[coeff, seed] for seed in range(SEEDS) if (coeff, seed) in rows]
        means = {key: statistics.mean(row[key] for row in own) for key in ("test/mse", "test/nfe", "cpu_seconds")}
        spread = statistics.stdev(row["test/mse"] for row in own) if len(own) > 1 else 0.0
        found[name] = {"coeff": coeff, "seeds": len(own), **means, "test/mse_std": spread}
    return found


# --- pictures ---


def pictures() -> None:
    """The front, the learned trajectories, and the steps that they allow."""
    import matplotlib

    matplotlib.use("Agg")
    rows = on_file()
    draw_front(rows)
    draw_trajectories(Search(rows, "mnist"))


def draw_front(rows: dict[Key, Row]) -> None:
    import matplotlib.pyplot as plt

    found = summary(rows)
    figure, places = plt.subplots(1, len(found), figsize=(4.6 * len(found), 5), squeeze=False, layout="constrained")
    marks = dict(zip(METHODS, "*osDv^<>Phd", strict=False))
    for axes, (data, result) in zip(places[0], found.items(), strict=True):
        for number, (method, front) in enumerate(result["front"].items()):
            x, y = [row["test_nfe"] for row in front], [100 * row["test_accuracy"] for row in front]
            size = 14 if method == "vanilla" else 6
            style = "-" if method.startswith("local") else ":"
            axes.plot(x, y, marks[method] + style, ms=size, lw=1, label=method, color=f"C{number}", alpha=0.85)
        plain = result["front"]["vanilla"][0]
        axes.axvline(0.556 * plain["test_nfe"], color="0.6", lw=1, ls="--")
        axes.axhline(100 * plain["test_accuracy"] - 0.5, color="0.6", lw=1, ls="--")
        axes.set(xlabel="function evaluations of a prediction", ylabel="test accuracy, %", title=data)
    figure.legend(*places[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    _save(figure, "local-ode-regularization-front.png")


@torch.no_grad()
def draw_trajectories(search: Search) -> None:
    """Per image: the state's first principal component over time, and the step that its own error allows there."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    images, labels = (tensor[:300] for tensor in splits(search.data)["test"])
    times = torch.linspace(0, 1, 41, dtype=torch.float64)
    found = {}
    for method in ("vanilla", "local unbiased, error"):
        model = trained(search.data, method, search.coeff(method), search.rate, 0)
        states = model.ode(model.net[:2](images), times=times)
        model.ode(states[0])
        record = model.ode.last_solve
        assert record is not None
        steps = torch.stack([allowed_step(model.ode, t, y) for t, y in zip(times.tolist(), states, strict=True)])
        found[method] = (model, states, steps, record)
    figure, places = plt.subplots(
        3, 2, figsize=(11, 9.5), sharex=True, height_ratios=[1, 1, 0.6], sharey="row", layout="constrained"
    )
    every = torch.cat([steps.flatten() for _, _, steps, _ in found.values()])
    norm = LogNorm(float(every.quantile(0.01)), float(every.quantile(0.99)))
    for column, (method, (_, states, steps, record)) in enumerate(found.items()):
        centred = states - states.mean(dim=(0, 1))
        axis = torch.linalg.svd(centred.flatten(0, 1), full_matrices=False).Vh[0]
        height = (centred @ axis).T
        height = height * height[labels == 0, -1].mean().sign()  # the sign of a component means nothing
        upper, middle, lower = places[:, column]
        for digit in range(10):
            upper.plot(times, height[labels == digit][:8].T, color=f"C{digit}", lw=0.8, alpha=0.8)
        upper.set_title(f"{method}: {record.nfe_forward} evaluations")
        field = middle.scatter(times.expand_as(height), height, c=steps.T, norm=norm, s=7, cmap="viridis")
        lower.step([*record.t, 1.0], [*record.dt, record.dt[-1]], where="post", color="k")
        lower.plot(record.t, record.dt, "k.", ms=5)
        lower.set(yscale="log", xlabel="time")
    places[0, 0].set_ylabel("first principal component\n(color: digit)")
    places[1, 0].set_ylabel("the same\n(color: the step this image allows)")
    places[2, 0].set_ylabel("accepted steps")
    figure.colorbar(
        field,
        ax=places[1].tolist(),
    )
    _save(figure, "local-ode-regularization-trajectories.png")


def allowed_step(block: NeuralODE, t: float, y: Tensor, dt: float = 0.02) -> Tensor:
    """For each sample the step whose local error would be the tolerance, by the fifth root law of Tsit5."""
    step = block.step(t, y, dt)
    error = local_error(step.error, y, step.y1, block.rtol, block.atol, norm="sample")
    return dt * error.clamp_min(1e-12) ** -0.2


def _save(figure: Any, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURES / name, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
