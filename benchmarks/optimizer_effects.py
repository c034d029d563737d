"""What is special about each optimizer, on scikit-learn's handwritten digits; about 3 minutes on 2 cores.

    python benchmarks/optimizer_effects.py

- AdaBelief and DiffGrad: training loss of a small CNN beside Adam's at the same, and at half the rate, 3 seeds.
- Lion: the largest weight of an MLP against 1 / weight_decay, beside AdamW with the same decay.
- Exponentiated gradient: accuracy, sign flips, distance of the weights to a log-normal distribution, and accuracy
  after the smallest 80% of the weights are removed, beside the additive optimizers, 3 seeds.

Writes ``benchmarks/results/optimizer_effects.json`` and pictures in ``docs/methods/img/``.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _runner import write_result
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_opt.callbacks.dale_law_monitor import weight_statistics
from lightning_opt.optim import AdaBelief, DiffGrad, ExponentiatedAdamW, ExponentiatedSGD, Lion, lognormal_init_

PICTURES = Path(__file__).parents[1] / "docs" / "methods" / "img"
SEEDS = (0, 1, 2)
Make = Callable[[nn.Module], torch.optim.Optimizer]


def main() -> None:
    torch.set_num_threads(1)
    write_result("optimizer_effects", {"cnn": cnn(), "box": box(), "dale": dale()})


# --- AdaBelief and DiffGrad ---


def cnn() -> dict[str, dict[str, Any]]:
    """Two convolutions and a linear layer, 15 epochs, batches of 64."""
    makers: dict[str, Make] = {
        "Adam 5e-4": lambda net: torch.optim.Adam(net.parameters(), 5e-4),
        "Adam 1e-3": lambda net: torch.optim.Adam(net.parameters(), 1e-3),
        "AdaBelief 1e-3": lambda net: AdaBelief(net.parameters(), 1e-3),
        "DiffGrad 1e-3": lambda net: DiffGrad(net.parameters(), 1e-3),
        "DiffGrad 2e-3": lambda net: DiffGrad(net.parameters(), 2e-3),
        "DiffGrad 1e-3 relative": lambda net: DiffGrad(net.parameters(), 1e-3, friction="relative"),
    }
    results: dict[str, dict[str, Any]] = {}
    print(f"{'CNN':<24}{'training loss':>24}{'validation accuracy':>28}{'mean friction':>16}")
    for name, make in makers.items():
        runs = []
        for seed in SEEDS:
            torch.manual_seed(seed)
            net = nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(16, 16, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(256, 10),
            )
            frictions: list[float] = []
            optimizer = make(net)
            if isinstance(optimizer, DiffGrad):
                optimizer.register_update_pre_hook(lambda o, to=frictions: to.append(_friction(o)))
            train, test = digits((1, 8, 8))
            fit(net, optimizer, train, epochs=15, seed=seed)
            loss, _ = evaluate(net, *train)
            _, accuracy = evaluate(net, *test)
            runs.append((loss, accuracy, statistics.mean(frictions[1:]) if frictions else None))
        losses, accuracies, xi = (list(column) for column in zip(*runs, strict=True))
        results[name] = {"train_loss": losses, "val_accuracy": accuracies, "mean_friction": xi}
        friction = f"{statistics.mean(xi):.3f}" if xi[0] else ""
        print(f"{name:<24}{_show(losses, '.4f'):>24}{_show(accuracies, '.1%'):>28}{friction:>16}")
    return results


def _friction(optimizer: Any) -> float:
    return optimizer.statistics()["xi_mean"].item() if optimizer.state else 0.0


# --- Lion ---


def box() -> dict[str, dict[str, float]]:
    """An MLP 64-64-10, 30 epochs, batches of 64, rate 1e-3."""
    makers: dict[str, Make] = {
        f"Lion, decay {decay}": lambda net, decay=decay: Lion(net.parameters(), 1e-3, weight_decay=decay)
        for decay in (0, 2, 10, 20)
    }
    makers["AdamW, decay 10"] = lambda net: torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=10)
    results, weights = {}, {}
    train, test = digits((64,))
    print(f"\n{'MLP':<20}{'largest weight':>16}{'at 1/decay':>12}{'training loss':>16}{'test accuracy':>15}")
    for name, make in makers.items():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = make(net)
        fit(net, optimizer, train, epochs=30, seed=0)
        w = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
        loss, _ = evaluate(net, *train)
        _, accuracy = evaluate(net, *test)
        decay = optimizer.param_groups[0]["weight_decay"]
        results[name] = {
            "largest_weight": w.abs().max().item(),
            "at_bound": (decay * w.abs() > 0.99).float().mean().item(),
            "train_loss": loss,
            "test_accuracy": accuracy,
        }
        weights[name] = w
        r = results[name]
        print(f"{name:<20}{r['largest_weight']:>16.4f}{r['at_bound']:>12.1%}{loss:>16.4f}{accuracy:>15.1%}")

    def histograms(axes: Any) -> None:
        for name in ("Lion, decay 2", "Lion, decay 10", "AdamW, decay 10"):
            axes.hist(weights[name].numpy(), bins=121, range=(-0.55, 0.55), histtype="step", lw=1.3, label=name)
        for radius in (0.5, 0.1):
            for edge in (-radius, radius):
                axes.axvline(edge, color="0.7", lw=0.8, ls=":", zorder=0)
        axes.set(yscale="log", xlabel="weight", ylabel="number of weights")
        axes.set_title("Lion keeps every weight within 1 / weight_decay (dotted)", fontsize=10)

    _draw("lion_box", histograms)
    return results


# --- exponentiated gradient ---


def dale() -> dict[str, dict[str, list[float]]]:
    """An MLP 64-128-128-10, log-normal start of the hidden layers, 40 epochs, batches of 64."""

    def groups(net: nn.Module) -> list[dict[str, Any]]:
        return ExponentiatedSGD.param_groups_for(net)

    makers: dict[str, Make] = {
        "SGD 0.05": lambda net: torch.optim.SGD(net.parameters(), 0.05, momentum=0.9),
        "sign-frozen SGD 0.05": lambda net: ExponentiatedSGD(groups(net), 0.05, momentum=0.9, variant="gd_sign"),
        "ExponentiatedSGD 0.1": lambda net: ExponentiatedSGD(groups(net), 0.1, momentum=0.9),
        "ExponentiatedSGD 0.3": lambda net: ExponentiatedSGD(groups(net), 0.3, momentum=0.9),
        "Adam 1e-3": lambda net: torch.optim.Adam(net.parameters(), 1e-3),
        "ExponentiatedAdamW 0.01": lambda net: ExponentiatedAdamW(groups(net), 0.01, weight_decay=0.0),
        "ExponentiatedAdamW 0.03": lambda net: ExponentiatedAdamW(groups(net), 0.03, weight_decay=0.0),
    }
    results, last = {}, {}
    train, test = digits((64,))
    print(f"\n{'MLP':<26}{'test accuracy':>22}{'sign flips':>20}{'KS distance':>22}{'80% removed':>22}")
    for name, make in makers.items():
        columns: dict[str, list[float]] = {"test_accuracy": [], "sign_flips": [], "ks_lognormal": [], "pruned": []}
        for seed in SEEDS:
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
            lognormal_init_(net, skip=["4"])
            hidden = {"0": net[0].weight, "2": net[2].weight}
            signs = {n: w.detach().sign().to(torch.int8) for n, w in hidden.items()}
            fit(net, make(net), train, epochs=40, seed=seed)
            values = weight_statistics({n: (w, signs[n], 1e-18) for n, w in hidden.items()})
            columns["test_accuracy"].append(evaluate(net, *test)[1])
            columns["sign_flips"].append(values["sign_flips"].item())
            columns["ks_lognormal"].append(values["ks_lognormal"].item())
            last[name] = torch.cat([w.detach().abs().log().reshape(-1) for w in hidden.values()])
            for w in hidden.values():
                w.data[w.abs() < w.abs().reshape(-1).quantile(0.8)] = 0
            columns["pruned"].append(evaluate(net, *test)[1])
        results[name] = columns
        formats = {"test_accuracy": ".1%", "sign_flips": ".0f", "ks_lognormal": ".3f", "pruned": ".1%"}
        shown = [_show(columns[column], form) for column, form in formats.items()]
        print(f"{name:<26}{shown[0]:>22}{shown[1]:>20}{shown[2]:>22}{shown[3]:>22}")

    def histograms(axes: Any) -> None:
        for name in ("SGD 0.05", "sign-frozen SGD 0.05", "ExponentiatedSGD 0.3", "ExponentiatedAdamW 0.03"):
            axes.hist(last[name].numpy(), bins=80, range=(-11, 1), density=True, histtype="step", lw=1.3, label=name)
        axes.set(yscale="log", ylim=(1e-3, 1), xlabel="log |w| of the hidden layers", ylabel="density")
        axes.set_title("From a log-normal start, multiplicative steps keep the weights log-normal", fontsize=10)

    _draw("exponentiated_weights", histograms)
    return results


# --- what they share ---


def digits(shape: tuple[int, ...]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """1,297 images to train on, 500 to test on."""
    images, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].float().div(16).reshape(-1, *shape), labels[order]
    return (images[:-500], labels[:-500]), (images[-500:], labels[-500:])


def fit(net: nn.Module, optimizer: Any, train: tuple[Tensor, Tensor], *, epochs: int, seed: int) -> None:
    images, labels = train
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=order).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()


@torch.no_grad()
def evaluate(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy."""
    logits = net(images)
    return nn.functional.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def _show(values: list[float], form: str) -> str:
    return " ".join(format(v, form) for v in values)


def _draw(name: str, fill: Callable[[Any], None]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    PICTURES.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(7, 3.5))
    fill(axes)
    axes.legend(fontsize=8)
    figure.savefig(PICTURES / f"{name}.png", dpi=120, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
