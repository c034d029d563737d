"""Stability of SGD and flatness of what it finds: arXiv:2305.17490 at a size of minutes, with our batch-aware bound.

    python benchmarks/stability.py

1. Diagonal linear networks f(x) = <a * b, x>, 200 weights each, from 80 samples of a sparse target (three ones), from
   N(0, 1), trained to a loss of 1e-12: batches of 1 and 8, and gradient descent, over learning rates.
2. The digits 0 and 1, 100 training images, a tanh MLP 64-64-1 from 2.5 times the usual weights, half the squared error,
   until the loss is 1e-4 or 200,000 steps are over: batches of 1 and 8, and gradient descent, over learning rates.

Trace and largest eigenvalue are exact, of the Gauss-Newton matrix of all training data. Results, and whether thresholds
hold, go to ``benchmarks/results/stability.json``, the picture to ``docs/methods/img/dynamical-stability.png``.
"""

import statistics
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from _runner import write_result
from torch import Tensor, nn

from lightning_opt.curvature import stability
from lightning_opt.data import Digits

PICTURE = Path(__file__).parents[1] / "docs" / "methods" / "img" / "dynamical-stability.png"
SEEDS = (0, 1, 2)
DIAGONAL = {1: (0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03), 8: (0.05, 0.1), 80: (0.01, 0.03, 0.1, 0.3)}
DIGITS = {1: (0.003, 0.01, 0.03, 0.1), 8: (0.01, 0.03, 0.1, 0.3), 100: (0.01, 0.03, 0.1, 0.3)}


def main() -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    diagonal = [diagonal_network(lr, size, seed) for size, lrs in DIAGONAL.items() for lr in lrs for seed in SEEDS]
    digits = [digits_network(lr, size, seed) for size, lrs in DIGITS.items() for lr in lrs for seed in SEEDS]
    results = {"diagonal": means(diagonal), "digits": means(digits)}
    payload = {**results, "thresholds": thresholds(diagonal, digits), "runs": {"diagonal": diagonal, "digits": digits}}
    write_result("stability", payload)
    for name, rows in results.items():
        print(
            f"\n{name:<12}{'batch':>6}{'lr':>8}{'converged':>11}{'trace':>9}{'naive':>8}{'rho_tr':>8}{'rho_top':>8}{'test':>9}"
        )
        for r in rows:
            numbers = "".join(
                f"{r[key]:>{width}.3f}" if r[key] is not None else f"{'-':>{width}}"
                for key, width in (("trace", 9), ("naive", 8), ("rho_tr", 8), ("rho_top", 8), ("test_mse", 9))
            )
            print(f"{'':<12}{r['batch_size']:>6}{r['lr']:>8g}{r['converged']:>9}/{len(SEEDS)}{numbers}")
    for name, holds in payload["thresholds"].items():
        print(f"{'holds' if holds['holds'] else 'FAILS':<7}{name}: {holds['value']}")
    draw(diagonal, digits)


# --- diagonal linear networks ---


def diagonal_network(lr: float, batch_size: int, seed: int, d: int = 200, n: int = 80) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    x, x_test = random.uniform(-1, 1, (n, d)), random.uniform(-1, 1, (2000, d))
    target = np.zeros(d)
    target[:3] = 1
    a, b = random.standard_normal(d), random.standard_normal(d)
    converged = _train_diagonal(
        x, x @ target, a, b, lr, batch_size, seed, 400_000 * max(1, 8 // batch_size) // 8, 1e-12
    )
    test = float(np.mean((x_test @ (a * b - target)) ** 2) / 2)
    jacobian = torch.from_numpy(np.concatenate([x * b, x * a], axis=1)) if converged else None
    row = _row(lr, batch_size, n, seed, converged, jacobian, test, replacement=batch_size < n)
    return {**row, "l1": float(np.abs(a * b).sum()) if converged else None}


@numba.njit(cache=False)
def _train_diagonal(x, y, a, b, lr, batch_size, seed, steps, tolerance):  # type: ignore[no-untyped-def]
    np.random.seed(seed)
    n = len(y)
    for step in range(steps):
        if step % 500 == 0:
            residual = x @ (a * b) - y
            loss = np.mean(residual**2) / 2
            if loss < tolerance:
                return True
            if not loss < 1e6:
                return False
        gradient = np.zeros(len(a))
        if batch_size == n:
            gradient += x.T @ (x @ (a * b) - y) / n
        else:
            for _ in range(batch_size):
                i = np.random.randint(n)
                gradient += x[i] * ((x[i] * a * b).sum() - y[i]) / batch_size
        old = a.copy()
        a -= lr * gradient * b
        b -= lr * gradient * old
    return False


# --- digits ---


def digits_network(lr: float, batch_size: int, seed: int, steps: int = 200_000) -> dict[str, Any]:
    images, labels, test_images, test_labels = zeros_and_ones()
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.5)
    parameters = list(net.parameters())
    n, converged = len(images), False
    order = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step % 100 == 0:
            with torch.no_grad():
                loss = (net(images).squeeze(1) - labels).square().mean().item() / 2
            converged = loss < 1e-4
            if converged or not loss < 1e4:
                break
        part = slice(None) if batch_size == n else torch.randint(n, (batch_size,), generator=order)
        _step(net, parameters, images[part], labels[part], lr)
    with torch.no_grad():
        test = (net(test_images).squeeze(1) - test_labels).square().mean().item()
    jacobian = torch.func.vmap(_gradient(net))(images) if converged else None
    row = _row(lr, batch_size, n, seed, converged, jacobian, test, replacement=batch_size < n)
    return {**row, "steps": step}


def zeros_and_ones() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """100 training images of 0 and 1, and the others of the training and test sets; labels -1 and 1."""
    data = Digits(val_size=1)
    data.setup()
    parts = [split.__getitems__(range(len(split))) for split in (data.train_set, data.test_set) if split is not None]
    images, labels = torch.cat([p[0] for p in parts]).flatten(1).double(), torch.cat([p[1] for p in parts])
    images, labels = images[labels < 2], 2.0 * labels[labels < 2] - 1
    return images[:100], labels[:100], images[100:], labels[100:]


def _step(net: nn.Module, parameters: list[Tensor], images: Tensor, labels: Tensor, lr: float) -> None:
    loss = (net(images).squeeze(1) - labels).square().mean() / 2
    with torch.no_grad():
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.sub_(g, alpha=lr)


def _gradient(net: nn.Module) -> Any:
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def output(values: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(net, values, image[None])[0, 0]

    def gradient(image: Tensor) -> Tensor:
        parts = torch.func.grad(output)(parameters, image)
        return torch.cat([part.flatten() for part in parts.values()])

    return gradient


# --- results ---


def _row(
    lr: float,
    batch_size: int,
    n: int,
    seed: int,
    converged: bool,
    jacobian: Tensor | None,
    test: float,
    replacement: bool,
) -> dict[str, Any]:
    row: dict[str, Any] = {"batch_size": batch_size, "lr": lr, "seed": seed, "converged": converged}
    keys = ("trace", "lambda_max", "naive", "rho_tr", "rho_top", "rho_mix", "test_mse")
    if jacobian is None:
        return {**row, **dict.fromkeys(keys)}
    trace = jacobian.square().sum().item() / n
    top = torch.linalg.matrix_norm(jacobian, 2).item() ** 2 / n
    s = stability(trace, top, lr=lr, batch_size=batch_size, dataset_size=None if replacement else n)
    return {**row, **dict(zip(keys, (trace, top, lr * trace / 2, s.rho_tr, s.rho_top, s.rho_mix, test), strict=True))}


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the seeds that converged."""
    results = []
    for batch_size, lr in dict.fromkeys((r["batch_size"], r["lr"]) for r in rows):
        of = [r for r in rows if (r["batch_size"], r["lr"]) == (batch_size, lr) and r["converged"]]
        keys = [key for key, value in rows[0].items() if key not in ("batch_size", "lr", "seed", "converged", "steps")]
        mean = {key: statistics.mean(r[key] for r in of) if of else None for key in keys}
        results.append({"batch_size": batch_size, "lr": lr, "converged": len(of), **mean})
    return results


def thresholds(diagonal: list[dict[str, Any]], digits: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What must come out, and whether it does."""
    found: dict[str, dict[str, Any]] = {}
    for name, rows in (("diagonal", diagonal), ("digits", digits)):
        for quantity in ("rho_tr", "rho_top"):
            largest = max(r[quantity] for r in rows if r["converged"])
            found[f"{name}: {quantity} <= 1 in every run that converges"] = {"value": largest, "holds": largest <= 1}
        naive = max(r["naive"] for r in rows if r["converged"] and r["batch_size"] > 1)
        found[f"{name}: the bare trace bound is exceeded by batches above 1"] = {"value": naive, "holds": naive > 1}
    table = {(r["batch_size"], r["lr"]): r for r in means(diagonal)}
    ratio = table[1, 0.02]["test_mse"] / table[1, 0.002]["test_mse"]
    found["diagonal: test error of SGD at 0.02 <= 0.35 of that at 0.002"] = {"value": ratio, "holds": ratio <= 0.35}
    change = abs(table[80, 0.3]["test_mse"] / table[80, 0.01]["test_mse"] - 1)
    found["diagonal: that of gradient descent changes by < 15%"] = {"value": change, "holds": change < 0.15}
    flat = [r for r in means(digits) if r["batch_size"] == 1 and r["converged"] == len(SEEDS)]
    ratio = flat[-1]["trace"] / flat[0]["trace"]
    name = f"digits: trace at the largest stable rate of SGD ({flat[-1]['lr']:g}) <= 0.85 of that at 0.003"
    found[name] = {"value": ratio, "holds": ratio <= 0.85}
    return found


def draw(diagonal: list[dict[str, Any]], digits: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    for rows, ax, title in ((diagonal, axes[0], "Diagonal networks"), (digits, axes[1], "Digits 0 and 1, tanh MLP")):
        for number, size in enumerate(dict.fromkeys(r["batch_size"] for r in rows)):
            of = [r for r in means(rows) if r["batch_size"] == size and r["converged"]]
            label = "gradient descent" if number == 2 else f"batches of {size}"
            color = ("#4269d0", "#3ca951", "#ff725c")[number]
            lrs = [r["lr"] for r in of]
            ax.plot(lrs, [r["naive"] for r in of], "o--", color=color, ms=4, lw=1)
            ax.plot(lrs, [max(r["rho_tr"], r["rho_top"]) for r in of], "o-", color=color, ms=4, label=label)
        ax.axhline(1, color="black", lw=0.8)
        ax.set(xscale="log", yscale="log", xlabel="learning rate", title=title)
        ax.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("share of the edge; dashed: bare trace bound")
    for number, size in enumerate(DIAGONAL):
        of = [r for r in means(diagonal) if r["batch_size"] == size and r["converged"]]
        color = ("#4269d0", "#3ca951", "#ff725c")[number]
        axes[2].plot([r["lr"] for r in of], [r["test_mse"] for r in of], "o-", color=color, ms=4)
    axes[2].set(xscale="log", yscale="log", xlabel="learning rate", title="Diagonal networks: test error")
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
