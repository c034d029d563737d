"""Consensus-based optimization and hopping: a canyon with many minima, and digits without a gradient.

    python benchmarks/consensus.py canyon            50 runs a method; two minutes on one core
    python benchmarks/consensus.py digits            three seeds a method; two minutes on one core
    python benchmarks/consensus.py plot              only draw the picture again

**canyon**: the function of two variables that the authors of arXiv:2306.09778 draw, with its minimum 0 at the origin,
from (8, 8). Particles and hopping take 250 steps of 200 candidates. Beside them gradient descent (10,000 steps at the
best of three rates, from 50 points around (8, 8), standard deviation 1) and the Langevin dynamics of the paper's
comparison (10,000 steps of 0.001, noise 10 / log(k + 1)). A run counts that ends within 0.5 of the origin.

**digits**: a linear classifier (650 weights), batches of 60, 15 epochs, all through the Trainer; accuracy on the 360
test images behind every epoch. Particles with the settings that the authors train networks with; hopping with a width
of 0.1 and alpha by effective sample size (0.05, 0.1 and 0.2 were tried on seed 0); SGD with momentum 0.9 at the rate of
0.01, 0.03, 0.1, 0.3 that is best on the validation images of seed 0. The time is processor time of the whole fit.
"""

import argparse
import math
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _fits import quiet_trainer
from _runner import read_result, write_result
from torch import Tensor

from lightning_opt.data import Digits
from lightning_opt.models import MLP, Classifier
from lightning_opt.solvers.consensus import ConsensusSettings, Swarm, cbo_minimize
from lightning_opt.strategies import CBOStrategy

PICTURE = Path(__file__).parents[1] / "docs" / "methods" / "img" / "consensus-based-optimization.png"
START = torch.tensor([8.0, 8.0], dtype=torch.float64)
RUNS = 50
CANYON: dict[str, dict[str, Any]] = {
    "cbo": {"n_particles": 200, "dt": 0.01, "lam": 1.0, "sigma": 1.6, "alpha": 100.0, "noise": "isotropic"},
    "hopping": {"scheme": "hopping", "n_particles": 200, "sigma": 0.7, "alpha": 100.0},
}
STEPS = 250
EPOCHS, SEEDS = 15, 3
DIGITS: dict[str, dict[str, Any]] = {
    "cbo": {
        "n_particles": 100,
        "particle_batch": 10,
        "alpha": 50.0,
        "alpha_schedule": "double_per_epoch",
        "sigma": 0.6325,
        "sigma_schedule": "log2",
        "init": "normal",
    },
    "hopping": {"scheme": "hopping", "n_particles": 100, "sigma": 0.1, "alpha_schedule": "ess"},
}
RATES = [0.01, 0.03, 0.1, 0.3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["canyon", "digits", "plot"])
    command = parser.parse_args().command
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*particles drift apart on average")
    if command == "canyon":
        write_result("consensus_canyon", {"runs": RUNS, "settings": CANYON, "steps": STEPS, "results": canyon()})
    elif command == "digits":
        write_result("consensus_digits", {"settings": DIGITS, "epochs": EPOCHS, "results": digits()})
    else:
        draw()


# --- the canyon ---


def height(x: Tensor) -> Tensor:
    a, b = x[..., 0], x[..., 1]
    valley = b - (0.125 * (a - 1) * (a - 4) ** 2 + 2)
    block = -a - 1.6 * b
    ripples = 2 - torch.cos(0.75 * math.pi * a) - torch.cos(0.75 * math.pi * b)
    return (
        25 * (1 - torch.exp(-1.4 * valley**2 * torch.exp(-0.002 * a**4)))
        + 0.4 * a**2
        + 0.2 * b**2
        + 1.1625 * ripples
        + 4 * torch.exp(1 - 2 * valley**4) * ((1 - torch.exp(-9 * block**2)) * block.sign()).clamp(min=0)
    )


def gradient(x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(height(x).sum(), x)[0]


def descend(rate: float) -> Tensor:
    x = START + torch.randn(RUNS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(10_000):
        x = x - rate * gradient(x)
    return x


def langevin(dt: float = 0.001) -> Tensor:
    x, generator = START.repeat(RUNS, 1), torch.Generator().manual_seed(0)
    for k in range(1, 10_001):
        noise = torch.randn(RUNS, 2, dtype=torch.float64, generator=generator)
        x = x - dt * gradient(x) + 10 / math.log(k + 1) * math.sqrt(dt) * noise
    return x


def canyon() -> dict[str, Any]:
    ends = {
        name: torch.stack([cbo_minimize(height, START, steps=STEPS, seed=s, **kwargs).consensus for s in range(RUNS)])
        for name, kwargs in CANYON.items()
    }
    descents = [descend(rate) for rate in (1e-4, 1e-3, 1e-2)]
    ends["gradient descent"] = max(descents, key=lambda x: (reached(x), -height(x).mean().item()))
    ends["langevin"] = langevin()
    results = {name: {"reached": reached(x), "median_height": height(x).median().item()} for name, x in ends.items()}
    print(results)
    return results


def reached(x: Tensor) -> float:
    return (x.norm(dim=1) < 0.5).double().mean().item()


# --- digits ---


class Model(Classifier):
    """A linear classifier with SGD, of which a strategy without gradients only takes the parameters."""

    def __init__(self, lr: float) -> None:
        super().__init__(MLP(in_features=64, hidden=()))
        self.lr = lr

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class TestAccuracy(pl.Callback):
    """Of the module behind every epoch."""

    def __init__(self) -> None:
        self.by_epoch: list[float] = []
        data = Digits(eval_batch_size=1000)
        data.setup("test")
        self.images, self.labels = next(iter(data.test_dataloader()))

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        right = pl_module(self.images).argmax(dim=1) == self.labels
        self.by_epoch.append(right.double().mean().item())


def fit(seed: int, strategy: Any = "auto", lr: float = 0.0) -> dict[str, Any]:
    torch.manual_seed(seed)
    watch, begin = TestAccuracy(), time.process_time()
    trainer = quiet_trainer(strategy=strategy, devices=1, max_epochs=EPOCHS, callbacks=[watch])
    trainer.fit(Model(lr), datamodule=Digits(batch_size=60, seed=seed))
    return {
        "test_accuracy": watch.by_epoch,
        "val_accuracy": trainer.callback_metrics["val/accuracy"].item(),
        "cpu_seconds": time.process_time() - begin,
    }


def digits() -> dict[str, Any]:
    lr = max(RATES, key=lambda rate: fit(0, lr=rate)["val_accuracy"])
    methods = {name: lambda seed, k=kwargs: fit(seed, CBOStrategy(seed=seed, **k)) for name, kwargs in DIGITS.items()}
    methods[f"sgd {lr}"] = lambda seed: fit(seed, lr=lr)
    results: dict[str, Any] = {}
    for name, method in methods.items():
        runs = [method(seed) for seed in range(SEEDS)]
        last = [run["test_accuracy"][-1] for run in runs]
        results[name] = {"mean": statistics.mean(last), "std": statistics.stdev(last), "runs": runs}
        print(name, results[name]["mean"], results[name]["std"], runs[0]["cpu_seconds"], flush=True)
    return results


# --- the picture ---


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), gridspec_kw={"width_ratios": [1.25, 1]})
    a, b = torch.meshgrid(torch.linspace(-3, 11, 400), torch.linspace(-4, 12, 400), indexing="ij")
    shades = height(torch.stack([a, b], dim=-1)).clamp(max=45)
    left.contourf(a, b, shades, levels=30, cmap="Greys", alpha=0.55)
    trail_of_particles(left)
    for name, color in (("cbo", "tab:blue"), ("hopping", "tab:orange")):
        path = torch.cat([START[None], cbo_minimize(height, START, steps=STEPS, seed=0, **CANYON[name]).path])
        label = {"cbo": "consensus of particles", "hopping": "consensus hopping"}[name]
        left.plot(path[:, 0], path[:, 1], color=color, lw=1.8, label=label)
    x, path = START.clone(), [START.clone()]
    for _ in range(10_000):
        x = x - 1e-3 * gradient(x)
        path.append(x)
    trail = torch.stack(path)
    left.plot(trail[:, 0], trail[:, 1], color="tab:red", lw=1.8, label="gradient descent")
    left.plot(*trail[-1], "x", color="tab:red", ms=9, mew=2)
    left.plot(0, 0, "*", color="black", ms=12, label="minimum")
    left.set(xlim=(-3, 11), ylim=(-4, 12), xlabel="$x_1$", ylabel="$x_2$")
    found = read_result("consensus_canyon")["results"]
    shares = ", ".join(f"{words} {found[name]['reached']:.2f}" for name, words in IN_WORDS.items())
    left.set_title(f"reach the minimum, of {RUNS} runs: {shares}", fontsize=9)
    left.legend(loc="upper left", fontsize=8)

    for name, result in read_result("consensus_digits")["results"].items():
        curves = torch.tensor([run["test_accuracy"] for run in result["runs"]])
        color = {"cbo": "tab:blue", "hopping": "tab:orange"}.get(name, "tab:red")
        label = {"cbo": "particles, the authors' settings", "hopping": "hopping"}.get(name, "gradient training (SGD)")
        epochs = range(1, curves.shape[1] + 1)
        right.plot(epochs, curves.mean(dim=0), color=color, label=f"{label}: {result['mean']:.1%}")
        right.fill_between(epochs, curves.min(dim=0).values, curves.max(dim=0).values, color=color, alpha=0.2)
    right.axhline(0.7, color="gray", lw=0.8, ls=":")
    right.set(xlabel="epoch", ylabel="test accuracy", ylim=(0, 1), title="digits, a linear classifier, three seeds")
    right.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)


IN_WORDS = {"cbo": "particles", "hopping": "hopping", "langevin": "Langevin", "gradient descent": "descent"}


def trail_of_particles(axes: Any) -> None:
    swarm = Swarm(ConsensusSettings(**CANYON["cbo"]), START)
    places = [swarm.particles.clone()]
    for _ in range(STEPS):
        swarm.step(height)
        places.append(swarm.particles.clone())
    trails = torch.stack(places)[:, ::10]
    axes.plot(trails[..., 0], trails[..., 1], color="tab:blue", lw=0.4, alpha=0.35)
    axes.plot(trails[0, :, 0], trails[0, :, 1], ".", color="tab:blue", ms=3, alpha=0.6)


if __name__ == "__main__":
    main()
