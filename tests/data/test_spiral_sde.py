from typing import Any

import pytest
import torch

from lightning_opt.data import ResumableLoader, SpiralSDE


def ready(**arguments: Any) -> SpiralSDE:
    data = SpiralSDE(**{"train_size": 50, "val_size": 20, "test_size": 30, **arguments})
    data.setup()
    return data


def test_without_noise_it_is_the_spiral() -> None:
    data = SpiralSDE(noise=0.0, num_times=2)

    def derivative(y: torch.Tensor) -> torch.Tensor:
        x, z = y**3
        return torch.stack([-0.1 * x + 2 * z, -2 * x - 0.1 * z])

    y, h = torch.tensor([2.0, 0.0], dtype=torch.float64), 1e-3
    for _ in range(1000):  # the classical Runge-Kutta method
        a = derivative(y)
        b = derivative(y + h / 2 * a)
        c = derivative(y + h / 2 * b)
        y = y + h / 6 * (a + 2 * b + 2 * c + derivative(y + h * c))
    errors = [float((data.simulate(torch.zeros(n, 1, 2).double())[0, -1] - y).norm()) for n in (4000, 8000)]
    assert errors[0] < 0.1
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)  # without noise it is Euler's method, of order 1


def test_the_simulation_converges_with_strong_order_one() -> None:
    data = SpiralSDE(noise=0.5, num_times=2)
    fine = torch.randn(4096, 200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 64
    ends = [data.simulate(fine.unflatten(0, (steps, -1)).sum(dim=1))[:, -1] for steps in (256, 512, 1024, 4096)]
    errors = [float((end - ends[-1]).square().mean().sqrt()) for end in ends[:-1]]
    # of order 1: errors are c (1/n - 1/4096), so 15 : 7 : 3; of order 1/2 they were about 3 : 2.1 : 1.4
    assert errors[0] / errors[1] == pytest.approx(15 / 7, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(7 / 3, rel=0.1)


def test_the_noise_is_multiplicative() -> None:
    """With no drift a coordinate is 2 exp(sigma W - sigma^2 / 2)."""
    data = SpiralSDE(noise=0.4, num_times=2)
    data.matrix = ((0.0, 0.0), (0.0, 0.0))
    increments = torch.randn(4000, 50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 4000**0.5
    exact = 2 * (0.4 * increments.sum(dim=0)[:, 0] - 0.08).exp()
    torch.testing.assert_close(data.simulate(increments)[:, -1, 0], exact, rtol=1e-3, atol=0)


def test_batches_are_times_and_trajectories() -> None:
    data = ready(batch_size=16, num_times=6)
    assert isinstance(data.train_dataloader(), ResumableLoader)
    times, trajectories = next(iter(data.train_dataloader()))
    assert times.shape == (16, 6)
    assert trajectories.shape == (16, 6, 2)
    assert times.dtype == trajectories.dtype == torch.float32
    torch.testing.assert_close(times[3], torch.linspace(0, 1, 6))
    assert (trajectories[:, 0] == torch.tensor([2.0, 0.0])).all()
    one = data.train_set[3]
    assert torch.equal(one[1], data.train_set.trajectories[3])


def test_the_parts_differ_and_repeat() -> None:
    data, again, other = ready(), ready(), ready(split_seed=1)
    assert torch.equal(data.train_set.trajectories, again.train_set.trajectories)
    assert not torch.equal(data.train_set.trajectories, other.train_set.trajectories)
    assert not torch.equal(data.train_set.trajectories[:20], data.val_set.trajectories)
    assert len(data.test_set) == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_size": 1}, "train_size must be >= 2"),
        ({"num_times": 1}, "num_times must be >= 2"),
        ({"noise": -0.1}, "noise must be >= 0"),
        ({"num_steps": 0}, "num_steps must be >= 1"),
        ({"num_steps": 99}, "num_steps must be a multiple of num_times - 1 = 10, got 99"),
        ({"split_seed": -1}, "split_seed must be >= 0"),
    ],
)
def test_wrong_values_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpiralSDE(**arguments)
