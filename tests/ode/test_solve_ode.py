import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt.ode import BOSH3, DOPRI5, TSIT5, SolveError, SolveRecord, first_step_size, solve_ode
from lightning_opt.ode.tableau import ADAPTIVE_HEUN
from tests.reference.runge_kutta import adaptive

PAIRS = [TSIT5, DOPRI5, BOSH3]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8).double(), nn.Linear(8, 3).double()
        for p in self.parameters():
            p.data.mul_(3)

    def forward(self, t, y):
        return self.outer(torch.tanh(self.inner(torch.cat([y, t.expand(len(y), 1)], dim=1))))


def rotation(t, y):
    return torch.stack([-y[..., 1], y[..., 0]], dim=-1)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
@pytest.mark.parametrize("gradients", [False, True])
def test_the_steps_are_those_of_the_loops(pair, gradients):
    net, y = Net(), torch.randn(5, 3, dtype=torch.float64)

    def in_numpy(t, x):
        return net(torch.tensor(t, dtype=torch.float64), torch.from_numpy(x)).detach().numpy()

    record = SolveRecord(0.0, 2.0)
    with torch.set_grad_enabled(gradients):
        end = solve_ode(net, y, [0.0, 2.0], tableau=pair, rtol=1e-5, atol=1e-5, record=record)[-1]
    steps, rejected, last = adaptive(in_numpy, y.numpy(), 0.0, 2.0, pair, 1e-5)
    assert record.accepted == len(steps)
    assert record.rejected == rejected
    # a ratio of 1e-2 of a difference of stages has 1e-13 of it left, and each step size follows the ones before
    np.testing.assert_allclose(np.array([record.t, record.dt]).T, steps, rtol=0, atol=1e-8)
    np.testing.assert_allclose(end.detach(), last, rtol=0, atol=1e-10)
    assert record.accepted > 4


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
@pytest.mark.parametrize("end", [3.0, -3.0])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_rotation_at_many_times_in_both_directions(pair, end, gradients):
    y0 = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    times = [0.0, 0.01 * end, 0.011 * end, 0.5 * end, end]
    record = SolveRecord(0.0, end)
    with torch.set_grad_enabled(gradients):
        states = solve_ode(rotation, y0, times, tableau=pair, rtol=1e-8, atol=1e-8, record=record)
    assert torch.equal(states[0], y0)
    for t, state in zip(times, states, strict=True):
        turned = torch.tensor([[math.cos(t), math.sin(t)], [-2 * math.sin(t), 2 * math.cos(t)]], dtype=torch.float64)
        # errors of steps add up over a time of 3, and a tolerance is 1e-8 (1 + |y|)
        assert (state - turned).abs().max() < 3e-7
    assert all(d * end > 0 for d in record.dt)
    assert record.t[-1] + record.dt[-1] == pytest.approx(end, abs=1e-15)
    assert all(t + d == pytest.approx(t1) for t, d, t1 in zip(record.t, record.dt, record.t[1:], strict=False))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_errors_follow_the_tolerance(pair):
    y0, errors = torch.tensor([[1.0, 0.0]], dtype=torch.float64), []
    exact = torch.tensor([[math.cos(3.0), math.sin(3.0)]], dtype=torch.float64)
    for tolerance in (1e-4, 1e-6, 1e-8):
        end = solve_ode(rotation, y0, [0.0, 3.0], tableau=pair, rtol=tolerance, atol=tolerance)[-1]
        errors.append((end - exact).abs().max().item() / tolerance)
    assert max(errors) < 10
    assert min(errors) > 1e-3


def test_a_step_that_is_rejected_leaves_nothing_behind():
    """A kick at t = 0.5 that steps must shrink to, with and without the buffer."""

    def kicked(t, y):
        return -y + 50 * torch.exp(-(((t - 0.5) / 0.02) ** 2))

    y0 = torch.ones(1, 2, dtype=torch.float64)
    ends = []
    for gradients in (False, True):
        record = SolveRecord(0.0, 1.0)
        with torch.set_grad_enabled(gradients):
            ends.append(solve_ode(kicked, y0, [0.0, 1.0], rtol=1e-7, atol=1e-7, record=record)[-1])
        assert record.rejected > 0
    fine = solve_ode(kicked, y0, [0.0, 1.0], rtol=1e-11, atol=1e-11)[-1]
    assert (ends[0] - ends[1]).abs().max() < 1e-12
    assert (ends[0] - fine).abs().max() < 1e-6


def test_gradients_through_the_steps():
    net, y = Net(), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda y: torch.stack(solve_ode(net, y, [0.0, 0.3, 1.0], rtol=1e-9, atol=1e-9)), (y,), atol=1e-6
    )


def test_the_first_step_by_hand():
    """Hairer's for y' = -2 y from 1: d0 = 1 / s, d1 = 2 / s, h0 = 0.005, d2 = 4 / s with s = 2e-4."""
    h = first_step_size(lambda t, y: -2 * y, 0.0, torch.ones(3, dtype=torch.float64), 1.0, TSIT5, 1e-4, 1e-4)
    assert h == pytest.approx(min(0.5, (0.01 * 2e-4 / 4) ** 0.2))
    rest = first_step_size(lambda t, y: 0 * y, 0.0, torch.ones(3, dtype=torch.float64), 1.0, TSIT5, 1e-4, 1e-4)
    assert rest == pytest.approx(1e-6)
    assert first_step_size(lambda t, y: -2 * y, 0.0, torch.ones(3), -1e-9, TSIT5, 1e-4, 1e-4) == 1e-9


@pytest.mark.parametrize("gradients", [False, True])
def test_steps_shrink_before_dynamics_that_end(gradients):
    """No step beyond t = 1.5 has a finite error, so ever shorter ones are tried up to there."""
    record = SolveRecord(0.0, 2.0)
    with torch.set_grad_enabled(gradients), pytest.raises(SolveError, match=r"the state is not finite at t = 1\.5 of"):
        solve_ode(
            lambda t, y: torch.where(t > 1.5, torch.inf, -y),
            torch.ones(1, 1, dtype=torch.float64),
            [0.0, 2.0],
            record=record,
        )
    assert record.rejected > 10


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_states_that_are_not_finite(value):
    y0 = torch.ones(1, 2)
    with pytest.raises(SolveError, match="not finite at t = 0 of the solve from 0.0 to 1.0"):
        solve_ode(lambda t, y: y * value, y0, [0.0, 1.0])
    with pytest.raises(SolveError, match="not finite at t = 0"):
        solve_ode(lambda t, y: -y, y0 * value, [0.0, 1.0])


def test_too_many_steps_and_steps_too_small():
    y0 = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(SolveError, match=r"took 5 steps and reached t = 0\.\d+: raise max_steps"):
        solve_ode(lambda t, y: -50 * y, y0, [0.0, 1.0], max_steps=5)
    with pytest.raises(SolveError, match="the step became too small at t = "):
        # a jump is steeper than any step
        solve_ode(lambda t, y: torch.where(t > 0.5, 1e12, 0.0) + 0 * y, y0, [0.0, 1.0], rtol=1e-12, atol=1e-12)


def test_what_the_solver_refuses():
    y0 = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"derivative of shape \(2, 1\) for a state of \(2, 3\)"):
        solve_ode(lambda t, y: y[:, :1], y0, [0.0, 1.0])
    with pytest.raises(ValueError, match="the solver runs tsit5, dopri5 and bosh3, not adaptive_heun"):
        solve_ode(lambda t, y: y, y0, [0.0, 1.0], tableau=ADAPTIVE_HEUN)
    with pytest.raises(ValueError, match="max_steps must be >= 1"):
        solve_ode(lambda t, y: y, y0, [0.0, 1.0], max_steps=0)
