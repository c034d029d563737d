import math
from typing import Any

import pytest
import torch

from lightning_opt.data import CoupledOscillators, ResumableLoader


def ready(**kwargs: Any) -> CoupledOscillators:
    data = CoupledOscillators(**kwargs)
    data.setup()
    return data


def test_the_states_are_two_damped_modes() -> None:
    data = CoupledOscillators(frequency=1.5, coupling=0.5, damping=1.0)
    omega, gamma = 2 * math.pi * 1.5, 1.0
    times = torch.linspace(0, 1, 11, dtype=torch.float64)
    fastest = omega * math.sqrt(2)  # 1 + 2 * coupling = 2
    for sign, rate in ((1, omega), (-1, fastest)):  # together, and against each other
        position, velocity = 0.7, -1.1
        start = torch.tensor([position, sign * position, velocity / fastest, sign * velocity / fastest]).double()
        position, velocity = start[0].item(), start[2].item() * fastest  # as rounded
        wave = math.sqrt(rate**2 - gamma**2 / 4)
        a, b = position, (velocity + gamma / 2 * position) / wave
        decay, cos, sin = (-gamma / 2 * times).exp(), (wave * times).cos(), (wave * times).sin()
        x = decay * (a * cos + b * sin)
        v = decay * ((b * wave - gamma / 2 * a) * cos - (a * wave + gamma / 2 * b) * sin)
        expected = torch.stack([x, sign * x, v / fastest, sign * v / fastest], dim=1)
        # the exponential of a matrix of norm 13 in float64
        torch.testing.assert_close(data.states(start[None], times)[0], expected, rtol=0, atol=1e-12)


def test_observations_are_the_states_and_noise_where_they_are_there() -> None:
    data = ready(train_size=300, noise=0.05)
    assert data.train_set is not None
    times, values, observed = data.train_set.__getitems__(range(300))
    assert torch.equal(values[~observed], torch.zeros(int((~observed).sum())))
    # the start of a series, by least squares, explains it up to the noise
    flows = torch.linalg.matrix_exp(times[0].double()[:, None, None] * data.system)
    residuals, free = 0.0, 0
    for value, there in zip(values.double(), observed, strict=True):
        rows = flows[there]
        fit = torch.linalg.lstsq(rows, value[there][:, None], driver="gelsd").solution
        residuals += float((rows @ fit - value[there][:, None]).square().sum())
        free += len(rows) - 4
    # about 15,000 degrees of freedom: 4 standard errors of sqrt(2 / 15000) are 5 %
    assert free > 14_000
    assert residuals / free == pytest.approx(0.05**2, rel=0.05)


def test_the_grid_is_irregular_and_values_are_missing_as_asked() -> None:
    data = ready(train_size=500, time_rate=0.5, channel_rate=0.7)
    assert data.train_set is not None
    times, _, observed = data.train_set.__getitems__(range(500))
    gaps = times[0].diff()
    assert (times[0][0], times[0][-1]) == (0, 1)
    assert (gaps > 0).all()
    assert gaps.max() > 5 * gaps.min()
    # 20,000 places of a series and time: 4 standard errors of 0.5 / sqrt(20000) are 0.014
    some = observed.any(-1).float().mean()
    assert abs(some - 0.5 * (1 - 0.3**4)) < 0.015
    assert abs(observed.float().mean() - 0.35) < 0.015
    nothing = ready(train_size=3, time_rate=0.0).train_set
    assert nothing is not None
    assert nothing.observed.sum(dim=(1, 2)).tolist() == [1, 1, 1]


def test_the_series_depend_on_their_number_and_the_split_seed_alone() -> None:
    small, large, other = ready(train_size=5), ready(train_size=9, seed=3), ready(train_size=5, split_seed=1)
    for data in (small, large, other):
        assert data.train_set is not None
    assert torch.equal(small.train_set.values, large.train_set.values[:5])
    assert torch.equal(small.train_set.times, large.train_set.times)
    assert not torch.equal(small.train_set.values, other.train_set.values)
    assert small.val_set is not None
    assert not torch.equal(small.train_set.observed, small.val_set.observed[:5])


def test_loaders_resume_and_evaluate_in_order() -> None:
    data = ready(train_size=10, val_size=4, batch_size=4, eval_batch_size=3)
    assert isinstance(data.train_dataloader(), ResumableLoader)
    assert [len(values) for _, values, _ in data.train_dataloader()] == [4, 4, 2]
    assert data.val_set is not None
    assert torch.equal(torch.cat([values for _, values, _ in data.val_dataloader()]), data.val_set.values)
    assert torch.equal(data.val_set[2][1], data.val_set.values[2])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_size", 0),
        ("num_times", 1),
        ("frequency", 0.0),
        ("coupling", -0.1),
        ("damping", -1.0),
        ("noise", -0.1),
        ("time_rate", 1.1),
        ("channel_rate", -0.1),
        ("batch_size", 0),
        ("split_seed", -1),
    ],
)
def test_a_wrong_value_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be "):
        CoupledOscillators(**{name: value})
