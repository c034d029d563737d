"""The schedules of ``lightning_opt.schedules`` on small convex problems, each at its own best rate of a grid.

- L1 regression, one row a step, and the same under heavy-tailed noise of the gradient: the last iterate's gap;
- softmax regression on 6 and on 10 principal components of the digits, batch 16: the final training loss, the refined
  schedule being made of the norms of the best linear run of the same seed;
- ridge logistic regression on the breast cancer table, batch 16, where strong convexity gives the rate: nothing tuned.

A method's rate is the one that is best on the mean over all seeds of the problem.

    python benchmarks/convex_schedules.py        # about two minutes on one thread
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from _runner import write_result
from scipy.optimize import linprog, minimize
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.decomposition import PCA

from lightning_opt.schedules import LastIterateLR, refine_schedule

Losses = dict[str, np.ndarray]  # by shape: [seed, rate]


def main() -> None:
    problems = {
        "l1_regression": l1_regression(range(10)),
        "l1_regression_heavy_tails": l1_regression(range(40), degrees=1.5),
        "softmax_pca6": softmax_regression(6, range(3)),
        "softmax_pca10": softmax_regression(10, range(3)),
        "ridge_mu0.1": ridge_logistic(0.1, range(3)),
        "ridge_mu0.01": ridge_logistic(0.01, range(3)),
    }
    torch.set_num_threads(1)
    for problem, rows in problems.items():
        print(f"\n{problem}")
        for name, row in rows.items():
            print(f"  {name:<26}{row['mean']:>12.6f} ± {row['standard_error']:.6f}   rate {row['rate']}")
    write_result("convex_schedules", {"problems": problems})


def l1_regression(seeds: Sequence[int], degrees: float | None = None) -> dict[str, Any]:
    """Mean absolute error above its minimum; with ``degrees`` Student's noise is added to the gradient."""
    total, rates = 2000, [2.0**k for k in range(-15, 2)]
    shapes = {kind: shape(kind, total) for kind in ("linear", "sqrt", "constant")}
    shapes |= {"cosine": cosine(total), "heavy_tail p=1.4": shape("heavy_tail", total, p=1.4)}
    losses: Losses = {name: np.zeros((len(seeds), len(rates))) for name in [*shapes, "average of constant"]}
    for i, seed in enumerate(seeds):
        generator = np.random.default_rng(seed)
        a, x_star = generator.standard_normal((200, 20)), generator.standard_normal(20)
        b = a @ x_star + generator.standard_t(2, 200)
        best = least_absolute(a, b)
        order = generator.integers(200, size=total)
        noise = np.zeros((total, 20)) if degrees is None else generator.standard_t(degrees, (total, 20))
        for name, factors in shapes.items():
            x, mean = np.zeros((len(rates), 20)), np.zeros((len(rates), 20))  # all rates at once
            for t, (factor, row, z) in enumerate(zip(factors, order, noise, strict=True)):
                g = np.sign(x @ a[row] - b[row])[:, None] * a[row] + z
                x = x - factor * np.array(rates)[:, None] * g
                mean += (x - mean) / (t + 1)
            losses[name][i] = np.abs(x @ a.T - b).mean(1) - best
            if name == "constant":
                losses["average of constant"][i] = np.abs(mean @ a.T - b).mean(1) - best
    return summary(losses, rates)


def softmax_regression(components: int, seeds: Sequence[int]) -> dict[str, Any]:
    """The training loss of the last iterate."""
    total, rates = 3000, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    x, labels = load_digits(return_X_y=True)
    x = PCA(components, random_state=0).fit_transform(x)
    x, y = np.hstack([(x - x.mean(0)) / x.std(0), np.ones((len(x), 1))]), np.eye(10)[labels]

    def train(factors: np.ndarray, rate: float, order: np.ndarray) -> tuple[float, np.ndarray]:
        w, norms = np.zeros((components + 1, 10)), np.zeros(total)
        for t, (factor, rows) in enumerate(zip(factors, order, strict=True)):
            g = x[rows].T @ (softmax(x[rows] @ w) - y[rows]) / len(rows)
            norms[t] = np.linalg.norm(g)
            w = w - rate * factor * g
        return -np.log((softmax(x @ w) * y).sum(1)).mean(), norms

    names = ["linear", "cosine", "step", "sqrt", "constant", "refined"]
    losses: Losses = {name: np.zeros((len(seeds), len(rates))) for name in names}
    peaks = []
    steps = np.where(np.arange(total) < total / 2, 1.0, np.where(np.arange(total) < 0.75 * total, 0.1, 0.01))
    shapes = {kind: shape(kind, total) for kind in ("linear", "sqrt", "constant")}
    shapes |= {"cosine": cosine(total), "step": steps}
    for i, seed in enumerate(seeds):
        order = np.random.default_rng(seed).integers(len(x), size=(total, 16))
        runs = [train(shapes["linear"], rate, order) for rate in rates]
        best = min(range(len(rates)), key=lambda k: runs[k][0])
        refined = refine_schedule(torch.from_numpy(runs[best][1])).numpy()
        peaks.append(round(refined.argmax() / total, 3))
        for name, factors in {**shapes, "refined": refined}.items():
            losses[name][i] = [train(factors, rate, order)[0] for rate in rates]
    rows = summary(losses, rates)
    rows["refined"]["peak_at"] = peaks
    return rows


def ridge_logistic(mu: float, seeds: Sequence[int]) -> dict[str, Any]:
    """The gap of the last iterate, with rates from the constants alone."""
    x, y = load_breast_cancer(return_X_y=True)
    x, y = (x - x.mean(0)) / x.std(0), 2.0 * y - 1
    smooth = 0.25 * np.linalg.eigvalsh(x.T @ x / len(x)).max() + mu
    total, limit = 4000, 0.5 / smooth

    def loss(w: np.ndarray) -> float:
        return np.logaddexp(0, -y * (x @ w)).mean() + mu / 2 * w @ w

    def gradient(w: np.ndarray, rows: Any = slice(None)) -> np.ndarray:
        margin = y[rows] * (x[rows] @ w)
        return -x[rows].T @ (y[rows] / (1 + np.exp(margin))) / len(margin) + mu * w

    best = minimize(loss, np.zeros(30), jac=gradient, options={"gtol": 1e-10}).fun
    kinds = ("strongly_convex", "strongly_convex_squared", "two_phase")
    shapes = {kind: shape(kind, total, mu=mu, lipschitz=smooth) for kind in kinds}
    shapes |= {"linear from 1/(2L)": limit * shape("linear", total), "constant 1/(2L)": np.full(total, limit)}
    losses: Losses = {name: np.zeros((len(seeds), 1)) for name in shapes}
    for i, seed in enumerate(seeds):
        order = np.random.default_rng(seed).integers(len(x), size=(total, 16))
        for name, rates in shapes.items():
            w = np.zeros(30)
            for rate, rows in zip(rates, order, strict=True):
                w = w - rate * gradient(w, rows)
            losses[name][i] = loss(w) - best
    return summary(losses, ["from the constants"])


def shape(kind: Any, total: int, **constants: float) -> np.ndarray:
    """The rates of a kind at lr = 1."""
    scheduler = LastIterateLR(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), kind, total, **constants)
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return np.array(rates)


def cosine(total: int) -> np.ndarray:
    return (1 + np.cos(math.pi * np.arange(total) / total)) / 2


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def least_absolute(a: np.ndarray, b: np.ndarray) -> float:
    """The minimum of mean |A x - b|, by linear programming."""
    n, d = a.shape
    cost = np.concatenate([np.zeros(d), np.ones(n)]) / n
    rows = np.block([[a, -np.eye(n)], [-a, -np.eye(n)]])
    return linprog(cost, rows, np.concatenate([b, -b]), bounds=[(None, None)] * d + [(0, None)] * n).fun


def summary(losses: Losses, rates: Sequence[Any]) -> dict[str, Any]:
    rows = {}
    for name, values in losses.items():
        best = int(values.mean(0).argmin())
        chosen = values[:, best]
        spread = chosen.std(ddof=1) / math.sqrt(len(chosen)) if len(chosen) > 1 else 0.0
        rows[name] = {
            "mean": float(chosen.mean()),
            "standard_error": float(spread),
            "rate": rates[best],
            "seeds": [float(value) for value in chosen],
        }
    return rows


if __name__ == "__main__":
    main()
