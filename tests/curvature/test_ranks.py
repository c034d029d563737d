"""Curvature over two ranks: one pair of processes for all of it."""

import datetime
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from lightning_opt.curvature import (
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
    hutchinson_trace,
    lanczos,
    mean_over_ranks,
    slq_density,
    top_eigenpairs,
    xtrace,
)
from lightning_opt.testing._ranks import on_two_ranks

SHARES = [slice(0, 5), slice(5, 12)]  # ranks hold different numbers of samples


def measure(share: slice, **options) -> dict[str, Tensor]:
    """Everything that is computed on an operator, on a share of the data."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    batch = x[share], torch.arange(12)[share] % 3
    forward = lambda b: (net(b[0]), b[1])  # noqa: E731
    data = [*net.parameters()], [batch]
    weights = {"weights": [len(batch[0])], **options}
    hessian = HessianOperator(lambda b: functional.cross_entropy(*forward(b)), *data, **weights)
    ggn = GGNOperator(forward, functional.cross_entropy, *data, **weights)
    fisher = EmpiricalFisherOperator(forward, functional.cross_entropy, *data, **weights)
    difference = HessianOperator(
        lambda b: functional.cross_entropy(*forward(b)), *data, method="finite_difference", **weights
    )
    seed = lambda: torch.Generator().manual_seed(7)  # noqa: E731
    run = lanczos(hessian, 10, generator=seed())
    return {
        "hessian": hessian.to_dense(),
        "ggn": ggn.to_dense(),
        "fisher": fisher.to_dense(),
        "difference": difference.to_dense(),
        "ritz values": run.ritz_values,
        "weights": run.weights,
        "eigenvalues": top_eigenpairs(hessian, 3, tol=1e-8, generator=seed()).eigenvalues,
        "trace": hutchinson_trace(fisher, 5, generator=seed()).samples,
        "xtrace": xtrace(ggn, 10, generator=seed()).samples,
        "nodes": slq_density(ggn, 4, 2, generator=seed()).nodes,
    }


def measure_on_rank(timeout: int) -> dict[str, Tensor]:
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=timeout))
    return measure(SHARES[rank], reduce=mean_over_ranks)


def test_two_ranks_are_one_process_with_all_samples():
    ranks = on_two_ranks(measure_on_rank, 60)
    alone = measure(slice(0, 12))
    for name, expected in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        # rounding; that of central differences over their step
        atol = 1e-9 if name == "difference" else 1e-11
        torch.testing.assert_close(ranks[0][name], expected, rtol=1e-9, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_without_ranks_the_mean_is_the_value():
    value = torch.tensor([1.0, 2.0])
    assert mean_over_ranks(value) is value
