"""The spectrum of a small network beside what Lanczos sees of it; a minute on a CPU.

    python benchmarks/curvature_density.py

The Hessian of an MLP 64-24-10 (1,810 parameters) on 1,024 handwritten digits after 300 steps, in float64: all
eigenvalues of the dense matrix beside the density of stochastic Lanczos quadrature, the first four moments over 20
seeds, and the error of the largest eigenvalue against the number of products, beside power iteration.

Writes ``benchmarks/results/curvature_density.json`` and ``docs/methods/img/curvature.png``.
"""

import statistics
from pathlib import Path
from typing import Any

import torch
from _runner import write_result
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from lightning_opt.curvature import HessianOperator, MatrixOperator, SpectralDensity, lanczos, slq_density

PICTURE = Path(__file__).parents[1] / "docs" / "methods" / "img" / "curvature.png"
SEEDS = range(20)
STEPS, PROBES = 20, 10


def main() -> None:
    torch.set_num_threads(1)
    hessian = digits_hessian()
    matrix = hessian.to_dense()
    eigenvalues = torch.linalg.eigvalsh(matrix)
    densities = [slq_density(MatrixOperator(matrix), STEPS, PROBES, generator=generator(seed)) for seed in SEEDS]
    # the picture's are of the operator, not of its matrix
    density = slq_density(hessian, STEPS, PROBES, generator=generator(0))
    curves = errors(matrix, eigenvalues)
    result = {
        "parameters": hessian.size,
        "steps": STEPS,
        "probes": PROBES,
        "largest": float(eigenvalues[-1]),
        "smallest": float(eigenvalues[0]),
        "trace": float(eigenvalues.sum()),
        "wasserstein_1": statistics.mean(wasserstein(d, eigenvalues) for d in densities),
        "standard_deviation": float(eigenvalues.std()),
        "moments": moments(densities, eigenvalues),
        "products_to_1e-3": {name: first_below(curve, 1e-3) for name, curve in curves.items()},
        "products_to_1e-6": {name: first_below(curve, 1e-6) for name, curve in curves.items()},
    }
    for key, value in result.items():
        print(key, value)
    draw(eigenvalues, density, curves)
    print(write_result("curvature_density", result))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def digits_hessian() -> HessianOperator:
    data = load_digits()
    x, y = torch.tensor(data.data[:1024] / 16), torch.tensor(data.target[:1024])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(300):
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return HessianOperator(lambda b: functional.cross_entropy(net(b[0]), b[1]), net.parameters(), [(x, y)])


def moments(densities: list[SpectralDensity], eigenvalues: Tensor) -> list[dict[str, Any]]:
    """The first four: exact, the mean estimate, and the share of seeds within 3 standard errors."""
    rows = []
    for order in range(1, 5):
        exact = float((eigenvalues**order).mean())
        estimates = [d.moment(order) for d in densities]
        rows.append(
            {
                "order": order,
                "exact": exact,
                "mean": statistics.mean(m.value for m in estimates),
                "mean_stderr": statistics.mean(m.stderr for m in estimates),
                "within_3_stderr": statistics.mean(abs(m.value - exact) <= 3 * m.stderr for m in estimates),
            }
        )
    return rows


def wasserstein(density: SpectralDensity, eigenvalues: Tensor) -> float:
    """The area between the two distribution functions."""
    nodes, order = density.nodes.flatten().sort()
    weights = density.weights.flatten()[order] / len(density.nodes)
    points = torch.cat([nodes, eigenvalues]).sort().values
    ours = torch.cat([weights.new_zeros(1), weights.cumsum(0)])[torch.searchsorted(nodes, points, right=True)]
    exact = torch.searchsorted(eigenvalues, points, right=True) / len(eigenvalues)
    return float(((ours - exact).abs()[:-1] * points.diff()).sum())


def errors(matrix: Tensor, eigenvalues: Tensor) -> dict[str, list[list[float]]]:
    """The relative error of the largest eigenvalue after each product, for each seed."""
    curves: dict[str, list[list[float]]] = {"Lanczos": [], "power iteration": []}
    exact = float(eigenvalues[-1])
    for seed in SEEDS:
        row = []
        for steps in range(1, 26):
            top = lanczos(MatrixOperator(matrix), steps, generator=generator(seed)).ritz_values[-1]
            row.append(abs(float(top) / exact - 1))
        curves["Lanczos"].append(row)
        v = torch.randn(len(matrix), generator=generator(seed), dtype=matrix.dtype)
        row = []
        for _ in range(60):
            v = v / v.norm()
            image = matrix @ v
            row.append(abs(float(v @ image) / exact - 1))
            v = image
        curves["power iteration"].append(row)
    return curves


def first_below(curves: list[list[float]], tolerance: float) -> dict[str, float | None]:
    """The number of products after which the error is small, median and worst of the seeds."""
    counts = sorted(next((i for i, e in enumerate(c, start=1) if e < tolerance), 10**9) for c in curves)
    return {"median": statistics.median(counts), "worst": counts[-1]} if counts[-1] < 10**9 else {"worst": None}


def draw(eigenvalues: Tensor, density: SpectralDensity, curves: dict[str, list[list[float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    width = 0.01
    grid = torch.linspace(float(eigenvalues[0]) - 0.05, 1.05 * float(eigenvalues[-1]), 2000, dtype=torch.float64)
    exact = SpectralDensity(eigenvalues[None], torch.full_like(eigenvalues, 1 / len(eigenvalues))[None], 0, 0)
    left.semilogy(grid, exact.density(grid, width), color="0.6", linewidth=3, label="all 1,810 eigenvalues")
    left.semilogy(
        grid, density.density(grid, width), color="C0", linewidth=1.2, label=f"{PROBES} probes of {STEPS} Lanczos steps"
    )
    left.plot(eigenvalues[-12:], torch.full((12,), 1.5e-3), "|", color="0.3", markersize=9, label="12 largest")
    left.set(xlabel="eigenvalue of the Hessian", ylabel="density", ylim=(1e-3, 100))
    left.legend(frameon=False)
    for (name, rows), color in zip(curves.items(), ("C0", "C1"), strict=True):
        for number, row in enumerate(rows):
            right.semilogy(
                range(1, len(row) + 1), row, color=color, alpha=0.4, linewidth=1, label=name if number == 0 else None
            )
    right.axhline(1e-3, color="0.5", linestyle=":", linewidth=1)
    right.set(xlabel="products", ylabel="relative error of the largest eigenvalue", ylim=(1e-15, 2), xlim=(0, 60))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
