import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from lightning_opt.optim import AdaGradNorm
from tests.reference.adagrad_norm import adagrad_norm
from tests.reference.problems import naive_trajectory, noisy_quadratic, trajectory

settings = {"AdaGradNorm": [{"lr": 0.5}, {"lr": 0.5, "v0": 1.0, "weight_decay": 0.01}]}


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_follows_the_naive_reference(foreach, weight_decay):
    start, gradient = noisy_quadratic(100)
    kwargs = {"lr": 0.7, "v0": 0.3, "weight_decay": weight_decay}
    ours = trajectory(lambda p: AdaGradNorm(p, foreach=foreach, **kwargs), start, gradient, 100)
    naive = naive_trajectory(partial(adagrad_norm, **kwargs), start, gradient, 100)
    torch.testing.assert_close(ours, naive, rtol=0, atol=1e-12)  # 100 roundings of numbers of size 1


@pytest.mark.parametrize("groups", [False, True])
def test_the_norm_is_that_of_all_parameters(groups):
    """Cut into tensors and groups, a vector goes the same way."""
    start, gradient = noisy_quadratic(50)
    whole = trajectory(lambda p: AdaGradNorm(p, lr=0.5), start, gradient, 50)
    parts = [nn.Parameter(part.clone()) for part in start.split([3, 9, 8])]
    optimizer = AdaGradNorm([{"params": parts[:1]}, {"params": parts[1:]}] if groups else parts, lr=0.5)
    for t in range(50):
        g = gradient(torch.cat([p.detach() for p in parts]), t)
        for p, part in zip(parts, g.split([3, 9, 8]), strict=True):
            p.grad = part
        optimizer.step()
    torch.testing.assert_close(torch.cat([p.detach() for p in parts]), whole[50], rtol=0, atol=1e-13)
    assert len({group["sum_sq"].item() for group in optimizer.param_groups}) == 1


def test_one_coordinate_is_adagrad():
    start, gradient = noisy_quadratic(30, dim=1)
    ours = trajectory(lambda p: AdaGradNorm(p, lr=0.5, v0=0.25), start, gradient, 30)
    theirs = trajectory(
        lambda p: torch.optim.Adagrad(p, lr=0.5, initial_accumulator_value=0.25, eps=0.0), start, gradient, 30
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_constant_gradients():
    """Behind t steps of one gradient of norm 1 from v0 = 1: the way is the sum of 1 / sqrt(1 + s)."""
    g = torch.tensor([0.6, 0.8], dtype=torch.float64)
    path = trajectory(lambda p: AdaGradNorm(p, lr=1.0, v0=1.0), torch.zeros(2).double(), lambda w, t: g, 40)
    expected = -g * sum(1 / math.sqrt(1 + s) for s in range(1, 41))
    torch.testing.assert_close(path[40], expected, rtol=1e-13, atol=0)


def test_a_gradient_that_is_not_finite_does_not_spread():
    parts = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    optimizer = AdaGradNorm(parts, lr=1.0)
    for p in parts:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before, total = [p.detach().clone() for p in parts], optimizer.param_groups[0]["sum_sq"].item()
    parts[0].grad[1] = math.inf
    optimizer.step()
    assert optimizer.param_groups[0]["sum_sq"].item() == total
    assert parts[0].isnan().tolist() == [False, True, False]
    assert torch.equal(parts[0][[0, 2]], before[0][[0, 2]])
    assert torch.equal(parts[1], before[1])
    parts[0].data[1], parts[0].grad[1] = 0.0, 0.0
    optimizer.step()
    assert parts[1].isfinite().all()
    assert not torch.equal(parts[1], before[1])


def test_a_saved_sum_is_continued():
    start, gradient = noisy_quadratic(20)
    whole = trajectory(lambda p: AdaGradNorm(p, lr=0.5), start, gradient, 20)
    p = nn.Parameter(whole[10].clone())
    first = nn.Parameter(start.clone())
    optimizer = AdaGradNorm([first], lr=0.5)
    for t in range(10):
        first.grad = gradient(first.detach(), t)
        optimizer.step()
    resumed = AdaGradNorm([p], lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.statistics()["step_size"].item() == optimizer.statistics()["step_size"].item() < 0.5 / 0.1
    for t in range(10, 20):
        p.grad = gradient(p.detach(), t)
        resumed.step()
    assert torch.equal(p.detach(), whole[20])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr must be >= 0.0 and finite, got -0.1"),
        ({"v0": 0.0}, "v0 must be > 0.0 and finite, got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0.0 and finite, got -1.0"),
    ],
)
def test_wrong_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AdaGradNorm([nn.Parameter(torch.zeros(2))], **options)
