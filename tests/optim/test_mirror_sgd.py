import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt.optim import MirrorSGD
from lightning_opt.optim.mirror_sgd import norm_gradient
from lightning_opt.schedules import LastIterateLR
from tests.reference import prox as reference
from tests.reference.problems import naive_trajectory, noisy_quadratic, trajectory

settings = {"MirrorSGD": [{"lr": 1e-2}, {"lr": 1e-2, "mirror": "pnorm", "p": 1.5}]}


@pytest.mark.parametrize("p", [1.05, 1.5, 2.0])
def test_parity_in_the_p_norm(p, plain_backend):
    start, gradient = noisy_quadratic(100)
    expected = naive_trajectory(
        lambda w, g, m, t: reference.pnorm_step(w, g, 0.05, p) if p < 2 else w - 0.05 * g, start, gradient, 100
    )
    path = trajectory(lambda ps: MirrorSGD(ps, lr=0.05, mirror="pnorm", p=p, **plain_backend), start, gradient, 100)
    # the map to the dual and back has condition 1 / (p - 1), 20 at most
    torch.testing.assert_close(path, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(6,), (4, 5)])
def test_parity_with_exponentiated_weights(shape, plain_backend):
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(shape, generator=generator, dtype=torch.float64)
    start = start / start.sum(-1, keepdim=True)
    noise = torch.randn(50, *shape, generator=generator, dtype=torch.float64)
    path = trajectory(
        lambda p: MirrorSGD(p, lr=0.3, mirror="entropy", **plain_backend), start, lambda w, t: noise[t], 50
    )
    expected = naive_trajectory(lambda w, g, m, t: reference.entropy_step(w, g, 0.3), start, lambda w, t: noise[t], 50)
    torch.testing.assert_close(path, expected, rtol=1e-11, atol=1e-13)


def test_rows_stay_on_the_simplex_in_float32_over_a_thousand_steps():
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.full((3, 50), 0.02))
    optimizer = MirrorSGD([w], lr=0.5, mirror="entropy")
    for _ in range(1000):
        w.grad = torch.randn(3, 50, generator=generator)
        optimizer.step()
    assert (w >= 0).all()
    assert (w.sum(-1) - 1).abs().max() < 1e-6


def test_it_finds_the_best_of_many_experts():
    """The error of entropy grows with log n: 1000 noisy steps find the best of 500 arms."""
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(500, generator=generator, dtype=torch.float64) * 0.5 + 0.5
    losses[123] = 0.2
    w = nn.Parameter(torch.full((500,), 1 / 500, dtype=torch.float64))
    optimizer = MirrorSGD([w], lr=(np.log(500)) ** 0.5, mirror="entropy")
    scheduler = LastIterateLR(optimizer, "sqrt")
    for _ in range(1000):
        w.grad = losses + 0.3 * torch.randn(500, generator=generator, dtype=torch.float64)
        optimizer.step()
        scheduler.step()
    assert w.argmax() == 123
    assert (w @ losses).item() < 0.21


def test_the_dual_map_and_its_inverse():
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-30, 1.0, 1e30):
        x = scale * torch.randn(40, generator=generator)
        back = norm_gradient(norm_gradient(x, 1.25), 5.0)
        # float32, through powers 0.25 and 4
        torch.testing.assert_close(back / scale, x / scale, rtol=1e-4, atol=1e-5)
    assert torch.equal(norm_gradient(torch.zeros(3), 1.5), torch.zeros(3))
    numbers = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64, requires_grad=True)
    (torch.linalg.vector_norm(numbers, 1.7) ** 2 / 2).backward()
    torch.testing.assert_close(norm_gradient(numbers.detach(), 1.7), numbers.grad, rtol=1e-13, atol=0)


def test_what_is_wrong_shows():
    w = nn.Parameter(torch.full((4,), 0.25))
    w.grad = torch.tensor([0.0, float("inf"), 0.0, 0.0])
    MirrorSGD([w], mirror="entropy").step()
    assert w.isnan().any()


@pytest.mark.parametrize(
    ("weights", "kwargs", "message"),
    [
        (torch.tensor([0.5, -0.1]), {"mirror": "entropy"}, "needs parameters >= 0, got -0.1"),
        (torch.zeros(2, 2), {"mirror": "entropy"}, "a positive number in every row"),
        (torch.ones(2, dtype=torch.complex64), {"mirror": "entropy"}, "does not support complex"),
        (torch.ones(2), {"mirror": "pnorm"}, "p must be given with mirror='pnorm'"),
        (torch.ones(2), {"mirror": "entropy", "p": 1.5}, "with no other, got p=1.5"),
        (torch.ones(2), {"mirror": "pnorm", "p": 1.0}, r"p must be in \(1.0, 2.0\], got 1.0"),
        (torch.ones(2), {"mirror": "euclid"}, "Did you mean 'euclidean'"),
    ],
)
def test_wrong_values(weights, kwargs, message):
    with pytest.raises(ValueError, match=message):
        MirrorSGD([nn.Parameter(weights)], **kwargs)
