import math

import numpy as np
import pytest
import torch

from lightning_opt.schedules import LastIterateLR, LinearDecayLR, RefinedLR, linear_decay

settings = {
    "LinearDecayLR": [
        {"total_steps": 12},
        {"total_steps": 12, "warmup_steps": 4, "min_factor": 0.1, "power": 2.0},
        {"total_steps": 12, "warmup_steps": 0.25},
    ]
}


def optimizer(lr=1.0):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


def factors(scheduler, steps):
    """The rates of so many steps, and the one behind them."""
    seen = [scheduler.get_last_lr()[0]]
    for _ in range(steps):
        scheduler.optimizer.step()
        scheduler.step()
        seen.append(scheduler.get_last_lr()[0])
    return seen


def test_the_last_step_is_made_with_one_share_and_zero_comes_behind_it():
    assert factors(LinearDecayLR(optimizer(), 4), 4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert factors(LinearDecayLR(optimizer(), 1), 1) == [1.0, 0.0]


@pytest.mark.parametrize("total", [1, 7, 1000])
def test_there_is_one_linear_decay(total):
    """Three schedulers, one implementation."""
    expected = [linear_decay(step, total) for step in range(total + 1)]
    schedulers = [LinearDecayLR(optimizer(), total), LastIterateLR(optimizer(), "linear", total)]
    schedulers += [LastIterateLR(optimizer(), "heavy_tail_linear", total, p=1.5)]
    for scheduler in [*schedulers, RefinedLR(optimizer(), torch.linspace(1, 0, 11, dtype=torch.float64), total)]:
        # values are at most 1: one rounding of 1e-16 for the interpolation
        assert max(abs(a - b) for a, b in zip(factors(scheduler, total), expected, strict=True)) <= 1e-15


def test_warm_up_rises_evenly_from_the_first_step_to_the_peak():
    seen = factors(LinearDecayLR(optimizer(), 10, warmup_steps=4), 10)
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.0], abs=1e-15)


@pytest.mark.parametrize(
    ("share", "total", "steps"),
    [(0.1, 1000, 100), (0.29, 100, 29), (0.0, 5, 0), (0.1, 1, 0), (0.9, 1, 0), (0.99, 4, 3)],
)
def test_warm_up_as_a_share_of_the_run(share, total, steps):
    """Whole steps, and one at least for the peak, however short the run."""
    scheduler = LinearDecayLR(optimizer(), total, warmup_steps=share)
    assert scheduler.warmup_steps == steps
    assert factors(scheduler, total) == factors(LinearDecayLR(optimizer(), total, warmup_steps=steps), total)
    assert RefinedLR(optimizer(), [1.0, 0.0], total, warmup_steps=share).warmup_steps == steps


def test_min_factor_and_power():
    seen = factors(LinearDecayLR(optimizer(2.0), 4, min_factor=0.2, power=2.0), 4)
    assert seen == pytest.approx([2 * (0.2 + 0.8 * (1 - s / 4) ** 2) for s in range(5)], abs=1e-15)


def test_steps_beyond_the_end():
    scheduler = LinearDecayLR(optimizer(), 3)
    factors(scheduler, 3)
    with pytest.raises(RuntimeError, match=r"made for total_steps=3 and .*\(interval 'step'"):
        scheduler.step()
    assert factors(LinearDecayLR(optimizer(), 3, min_factor=0.1, extend="hold"), 6)[3:] == [0.1] * 4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"total_steps": None}, "total_steps is needed: .*estimated_stepping_batches"),
        ({"total_steps": math.inf}, "total_steps is infinite: .*max_steps"),
        ({"total_steps": 0}, "total_steps must be an integer >= 1, got 0"),
        ({"total_steps": True}, "total_steps must be an integer >= 1, got True"),
        ({"total_steps": 5, "warmup_steps": 5}, "warmup_steps must be below total_steps=5, got 5"),
        ({"total_steps": 5, "warmup_steps": 7}, "got 7; a float is a share of total_steps"),
        ({"total_steps": 5, "warmup_steps": 1.0}, r"a float in \[0, 1\) \(a share of total_steps\), got 1.0"),
        ({"total_steps": 5, "warmup_steps": -0.1}, "got -0.1"),
        ({"total_steps": 5, "min_factor": 1.5}, r"min_factor must be in \[0.0, 1.0\], got 1.5"),
        ({"total_steps": 5, "power": 0.0}, "power must be > 0.0"),
        ({"total_steps": 5, "extend": "stop"}, "extend must be one of 'raise', 'hold'"),
    ],
)
def test_wrong_values(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LinearDecayLR(optimizer(), **kwargs)


def test_a_resumed_schedule_keeps_its_horizon_and_says_so():
    short = LinearDecayLR(optimizer(), 4)
    factors(short, 2)
    long = LinearDecayLR(optimizer(), 8)
    with pytest.warns(UserWarning, match="continues the saved schedule with total_steps=4, not 8"):
        long.load_state_dict(short.state_dict())
    assert factors(long, 2)[1:] == [0.25, 0.0]


def test_a_number_of_steps_may_be_numpys():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = LinearDecayLR(optimizer, total_steps=np.int64(4), warmup_steps=np.int32(1))
    assert (type(scheduler.total_steps), type(scheduler.warmup_steps)) == (int, int)  # a checkpoint holds no others
    assert scheduler.get_last_lr() == [0.5]
