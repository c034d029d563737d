"""Curvature beside curvlinops, hessian-eigenthings, PyHessian and a bare double backward; a few minutes on a CPU.

    python benchmarks/curvature.py

- Products: the time of one Hessian product, same network, batch and vector, in turns.
- Lanczos: the time of 20 steps with orthogonalization.
- Top eigenvalue: the products that each method makes until it stops, with a tolerance of 1e-3; the error it then has;
  and the products after which its error stays within 1e-3. 10 seeds.
- Trace: the error at 100 products, 20 seeds.

The peers: ``pip install 'lightning-opt[bench]'`` brings hessian-eigenthings and PyHessian. curvlinops wants BackPACK,
which wants torchvision, though neither uses it here; from another index than torch's it breaks torchmetrics
(``operator torchvision::nms does not exist``). So install it without its dependencies:

    pip install --no-deps curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 \
        einops==0.8.2 einconv==0.1.0 unfoldNd==0.2.3 jaxtyping==0.3.11 wadler-lindig==0.1.8
    pip install linear-operator==0.6.1 opt-einsum==3.4.0

Writes ``benchmarks/results/curvature.json``.
"""

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import torch
from _runner import paired_times, ratio_summary, write_result
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from lightning_opt.curvature import HessianOperator, hutchinson_trace, lanczos, top_eigenpairs, xtrace
from lightning_opt.models import MLP, ResNet

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peers' own
        import curvlinops
        import pyhessian
        from curvlinops import HessianLinearOperator
        from hessian_eigenthings.algorithms.lanczos import lanczos as peer_lanczos
        from hessian_eigenthings.algorithms.lanczos import lanczos_tridiagonal as peer_tridiagonal
        from hessian_eigenthings.operators.hessian import HessianOperator as EigenthingsOperator
except ImportError as error:
    sys.exit(f"{error}: the docstring of this file says how to install the peers")

TOLERANCE = 1e-3
PEERS = ("curvlinops-for-pytorch", "hessian-eigenthings", "PyHessian", "scipy")
Batch = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="timed pairs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result = {
        "peers": {name: metadata.version(name) for name in PEERS},
        "products": products(options.rounds),
        "lanczos": lanczos_times(options.rounds),
        "top_eigenvalue": top_eigenvalue(range(10)),
        "trace": traces(range(20)),
    }
    print(write_result("curvature", result))


def digits_network(kind: str, steps: int) -> tuple[nn.Module, Batch]:
    """A network after some steps of full-batch training on 1,024 digits, in evaluation mode."""
    data = load_digits()
    x, y = torch.tensor(data.data[:1024] / 16, dtype=torch.float32), torch.tensor(data.target[:1024])
    torch.manual_seed(0)
    net = {
        "tanh": lambda: nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)),
        "relu": lambda: MLP(64, hidden=(256, 256, 256)),
        "batch norm": lambda: nn.Sequential(
            *(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU()),
            *(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 10)),
        ),
    }[kind]()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net.eval(), (x, y)


def operator_of(net: nn.Module, batch: Batch, **options: Any) -> HessianOperator:
    return HessianOperator(lambda b: functional.cross_entropy(net(b[0]), b[1]), net.parameters(), [batch], **options)


# --- time ---


def products(rounds: int) -> dict[str, Any]:
    """One product: with the graph built anew, as the peers do, and with the graph kept, the default for one batch."""
    torch.manual_seed(0)
    images = torch.rand(256, 1, 28, 28), torch.randint(0, 10, (256,))
    problems: dict[str, tuple[nn.Module, Batch, int]] = {  # with how many products are timed together
        "MLP 64-24-10, 1,024 digits": (*digits_network("tanh", 300), 20),
        "MLP 784-256-128-10, 256 images": (MLP(), images, 2),
        "ResNet, 32 images": (ResNet().eval(), (images[0][:32], images[1][:32]), 1),
    }
    rows = {}
    print(f"{'one product':34}{'parameters':>11}{'anew':>9}{'kept':>9}  ratios: median (10% to 90%)")
    for name, (net, batch, count) in problems.items():
        functions, size = contestants(net, batch)
        times = paired_times({key: partial(repeat, function, count) for key, function in functions.items()}, rounds)
        pairs = {
            "anew beside curvlinops": ("anew", "curvlinops", 1.03),
            "anew beside hessian-eigenthings": ("anew", "hessian-eigenthings", None),
            "anew beside bare": ("anew", "bare", 1.15),
            "kept beside curvlinops": ("kept", "curvlinops", 1.03),
            "kept beside bare, kept": ("kept", "bare, kept", 1.15),
        }
        rows[name] = {
            "parameters": size,
            "rounds": rounds,
            "median_s": {key: statistics.median(t) / count for key, t in times.items()},
            "ratios": {
                pair: {**ratio_summary(times, of, beside), "target": target}
                for pair, (of, beside, target) in pairs.items()
            },
        }
        medians = rows[name]["median_s"]
        print(f"{name:34}{size:11,}{1e3 * medians['anew']:6.2f} ms{1e3 * medians['kept']:6.2f} ms")
        for pair, row in rows[name]["ratios"].items():
            target = f", at most {row['target']}" if row["target"] else ""
            print(f"    {pair:34}{row['median']:6.2f}  ({row['q10']:.2f} to {row['q90']:.2f}){target}")
    return rows


def repeat(function: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        function()


def contestants(net: nn.Module, batch: Batch) -> tuple[dict[str, Callable[[], Any]], int]:
    """Ways to compute one product; they agree."""
    x, y = batch
    params = list(net.parameters())
    anew, kept = operator_of(net, batch, retain_graph=False), operator_of(net, batch)
    v = torch.randn(anew.size, generator=torch.Generator().manual_seed(0))
    parts = anew.unflatten(v)
    theirs = HessianLinearOperator(net, nn.CrossEntropyLoss(), params, [batch], check_deterministic=False)
    eigen = EigenthingsOperator(net, [batch], lambda net, b: functional.cross_entropy(net(b[0]), b[1]))

    def gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(functional.cross_entropy(net(x), y), params, create_graph=True)

    held = gradient()
    functions = {
        "anew": lambda: anew @ v,
        "kept": lambda: kept @ v,
        "curvlinops": lambda: theirs @ v,
        "hessian-eigenthings": lambda: eigen.matvec(v),
        "bare": lambda: torch.autograd.grad(gradient(), params, parts),
        "bare, kept": lambda: torch.autograd.grad(held, params, parts, retain_graph=True),
    }
    expected = anew.flatten(functions["bare"]())
    for name in ("anew", "kept", "curvlinops", "hessian-eigenthings"):
        error = float((functions[name]() - expected).norm() / expected.norm())
        if error > 1e-5:
            raise AssertionError(f"{name} differs from the bare product by {error:.1e}")
    return functions, anew.size


def lanczos_times(rounds: int) -> dict[str, Any]:
    """20 steps with full reorthogonalization, and the largest eigenvalue through scipy, as curvlinops does it."""
    from scipy.sparse.linalg import eigsh

    net, batch = digits_network("tanh", 300)
    params = list(net.parameters())
    operator = operator_of(net, batch)
    eigen = EigenthingsOperator(net, [batch], lambda net, b: functional.cross_entropy(net(b[0]), b[1]))
    linear = HessianLinearOperator(net, nn.CrossEntropyLoss(), params, [batch], check_deterministic=False)
    times = paired_times(
        {
            "ours": lambda: lanczos(operator, 20, generator=torch.Generator().manual_seed(0)),
            "hessian-eigenthings": lambda: peer_lanczos(eigen, k=10, max_iter=20, seed=0),
            "top": lambda: top_eigenpairs(operator, tol=TOLERANCE, generator=torch.Generator().manual_seed(0)),
            "curvlinops, eigsh": lambda: eigsh(linear.to_scipy(), k=1, which="LA", tol=TOLERANCE),
        },
        rounds,
    )
    row = {
        "rounds": rounds,
        "median_s": {key: statistics.median(t) for key, t in times.items()},
        "20 steps beside hessian-eigenthings": {**ratio_summary(times, "ours", "hessian-eigenthings"), "target": 0.7},
        "top eigenvalue beside curvlinops, eigsh": {**ratio_summary(times, "top", "curvlinops, eigsh"), "target": 0.3},
    }
    for name in list(row)[2:]:
        print(f"{name:45}{row[name]['median']:6.2f}  ({row[name]['q10']:.2f} to {row[name]['q90']:.2f})")
    return row


# --- products needed ---


def top_eigenvalue(seeds: range) -> dict[str, Any]:
    """Products until each method stops, its error then, and the products after which the error stays small."""
    rows: dict[str, Any] = {}
    print(f"\n{'products, mean of 10 seeds':28}{'':14}{'until it stops':>16}{'error then':>12}{'until accurate':>16}")
    for kind in ("tanh", "relu", "batch norm"):
        for steps in (0, 60, 300):
            net, batch = digits_network(kind, steps)
            exact = float(
                top_eigenpairs(
                    operator_of(net, batch), tol=1e-9, generator=torch.Generator().manual_seed(99)
                ).eigenvalues[0]
            )
            runs = {
                "ours": [ours(net, batch, exact, seed) for seed in seeds],
                "eigenthings": [eigenthings_lanczos(net, batch, exact, seed) for seed in seeds],
                "PyHessian": [power_iteration(net, batch, exact, seed) for seed in seeds],
            }
            name = f"{kind}, {steps} steps"
            row: dict[str, Any] = {"eigenvalue": exact}
            for method, results in runs.items():
                stopped, errors, accurate = (list(column) for column in zip(*results, strict=True))
                row[method] = {"stopped": stopped, "error": errors, "accurate": accurate}
                print(
                    f"{name if method == 'ours' else '':28}{method:14}{statistics.mean(stopped):16.1f}"
                    f"{statistics.mean(errors):12.0e}{statistics.mean(accurate):16.1f}"
                )
            rows[name] = row
    summary = {}
    for label, of, beside in [
        ("ours until it stops, beside eigenthings until it stops", "stopped", ("eigenthings", "stopped")),
        ("ours until it stops, beside eigenthings until accurate", "stopped", ("eigenthings", "accurate")),
        ("ours until it stops, beside PyHessian until it stops", "stopped", ("PyHessian", "stopped")),
        ("ours until it stops, beside PyHessian until accurate", "stopped", ("PyHessian", "accurate")),
    ]:
        ratios = [
            statistics.mean(row["ours"][of]) / statistics.mean(row[beside[0]][beside[1]]) for row in rows.values()
        ]
        target = 1.0 if beside[0] == "eigenthings" else 1 / 3
        summary[label] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "target": target}
        print(f"{label:58}{statistics.median(ratios):6.2f}  ({min(ratios):.2f} to {max(ratios):.2f} over networks)")
    return {"tolerance": TOLERANCE, "rows": rows, "ratios": summary}


def ours(net: nn.Module, batch: Batch, exact: float, seed: int) -> tuple[int, float, int]:
    pairs = top_eigenpairs(
        operator_of(net, batch), tol=TOLERANCE, generator=torch.Generator().manual_seed(seed), max_products=500
    )
    run = lanczos(operator_of(net, batch), 60, generator=torch.Generator().manual_seed(seed))
    tops = [float(ritz[-1]) for ritz, _ in _prefixes(run.alphas, run.betas)]
    return pairs.products, abs(float(pairs.eigenvalues[0]) / exact - 1), _accurate(tops, exact)


def eigenthings_lanczos(net: nn.Module, batch: Batch, exact: float, seed: int) -> tuple[int, float, int]:
    """The smallest ``max_iter`` for which it calls the eigenvalue converged: it has no stopping rule of its own."""
    operator = EigenthingsOperator(net, [batch], lambda net, b: functional.cross_entropy(net(b[0]), b[1]))
    start = torch.randn(operator.size, generator=torch.Generator().manual_seed(seed))
    run = peer_tridiagonal(operator, start, 60)
    tops, stopped = [], None
    for steps, (ritz, residuals) in enumerate(_prefixes(run.alphas, [*run.betas.tolist(), run.last_beta]), start=1):
        tops.append(float(ritz[-1]))
        if stopped is None and float(residuals[-1]) < TOLERANCE * abs(tops[-1]):
            stopped = steps
    if stopped is None:
        raise RuntimeError("did not converge in 60 steps")
    return stopped, abs(tops[stopped - 1] / exact - 1), _accurate(tops, exact)


def power_iteration(net: nn.Module, batch: Batch, exact: float, seed: int) -> tuple[int, float, int]:
    """PyHessian's, run on until it is accurate; the estimates are read where it makes its products."""
    module = sys.modules[pyhessian.hessian.__module__]
    original = module.hessian_vector_product
    estimates: list[float] = []

    def watched(gradients: Any, params: Any, v: list[Tensor]) -> Any:
        if len(estimates) > 10 and _accurate(estimates, exact) <= len(estimates) - 10:
            raise StopIteration
        image = original(gradients, params, v)
        estimates.append(float(sum((a * b).sum() for a, b in zip(image, v, strict=True))))
        return image

    module.hessian_vector_product = watched
    torch.manual_seed(seed)
    try:
        pyhessian.hessian(net, functional.cross_entropy, data=batch, cuda=False).eigenvalues(maxIter=2000, tol=0.0)
    except StopIteration:
        pass
    finally:
        module.hessian_vector_product = original
        net.zero_grad()
    relative = [abs(b - a) / (abs(a) + 1e-6) for a, b in zip(estimates, estimates[1:], strict=False)]  # its rule
    stopped = next(i for i, change in enumerate(relative, start=2) if change < TOLERANCE)
    return stopped, abs(estimates[stopped - 1] / exact - 1), _accurate(estimates, exact)


def _prefixes(alphas: Any, betas: Any) -> list[tuple[Tensor, Tensor]]:
    """Ritz values and residuals after each step."""
    alphas, betas = (torch.as_tensor(x, dtype=torch.float64) for x in (alphas, betas))
    rows = []
    for m in range(1, len(alphas) + 1):
        couplings = betas[: m - 1]
        values, vectors = torch.linalg.eigh(
            torch.diag(alphas[:m]) + torch.diag(couplings, 1) + torch.diag(couplings, -1)
        )
        rows.append((values, betas[m - 1] * vectors[-1].abs()))
    return rows


def _accurate(estimates: list[float], exact: float) -> int:
    """The number of products from which on the estimate stays within the tolerance."""
    wrong = [i for i, estimate in enumerate(estimates, start=1) if abs(estimate / exact - 1) > TOLERANCE]
    return wrong[-1] + 1 if wrong else 1


# --- trace ---


def traces(seeds: range) -> dict[str, Any]:
    """Root mean square of the relative error at 99 or 100 products."""
    net, batch = digits_network("tanh", 300)
    net = net.double()
    batch = batch[0].double(), batch[1]
    operator = operator_of(net, batch)
    exact = float(operator.to_dense().trace())
    linear = HessianLinearOperator(
        net, nn.CrossEntropyLoss(), list(net.parameters()), [batch], check_deterministic=False
    )
    generators = {seed: torch.Generator().manual_seed(seed) for seed in seeds}
    rows: dict[str, Any] = {"exact": exact}
    for name, estimator in [("xtrace", xtrace), ("hutchinson", hutchinson_trace)]:
        estimates = [estimator(operator, 100, generator=generators[seed]) for seed in seeds]
        rows[name] = {
            "error": _rms([e.value / exact - 1 for e in estimates]),
            "covered_by_two_standard_errors": statistics.mean(abs(e.value - exact) <= 2 * e.stderr for e in estimates),
        }
    for name, function, count in [
        ("curvlinops xtrace", curvlinops.xtrace, 100),
        ("curvlinops hutch++", curvlinops.hutchpp_trace, 99),
        ("curvlinops hutchinson", curvlinops.hutchinson_trace, 100),
    ]:
        errors = []
        for seed in seeds:
            torch.manual_seed(seed)
            errors.append(float(function(linear, count)) / exact - 1)
        rows[name] = {"error": _rms(errors)}
    print(f"\ntrace {exact:.4f}, 100 products")
    for name in list(rows)[1:]:
        print(f"    {name:24}{rows[name]['error']:8.2%}")
    return rows


def _rms(errors: list[float]) -> float:
    return statistics.mean(e**2 for e in errors) ** 0.5


if __name__ == "__main__":
    main()
