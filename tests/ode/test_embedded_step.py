import itertools
import math

import numpy as np
import pytest
import torch
import torchode
from scipy.integrate import RK45, solve_ivp
from scipy.integrate._ivp.rk import rk_step
from torch import nn
from torchdiffeq._impl.dopri5 import _DORMAND_PRINCE_SHAMPINE_TABLEAU
from torchdiffeq._impl.misc import _PerturbFunc
from torchdiffeq._impl.rk_common import _runge_kutta_step

from lightning_opt.ode import BOSH3, DOPRI5, TSIT5, embedded_step, local_error, stiffness
from lightning_opt.ode.tableau import ADAPTIVE_HEUN, TABLEAUS
from tests.reference.runge_kutta import step

PAIRS = list(TABLEAUS.values())


class Net(nn.Module):
    """Nonlinear and time-dependent; takes a time for each sample too."""

    def __init__(self, size=4):
        super().__init__()
        self.inner, self.outer = nn.Linear(size + 1, 8).double(), nn.Linear(8, size).double()

    def forward(self, t, y):
        t = t.expand(len(y)) if t.ndim == 0 else t
        return self.outer(torch.tanh(self.inner(torch.cat([y, t[:, None]], dim=1)))) - 0.5 * y**3


def pendulum(t, y):
    return torch.stack([y[..., 1], -torch.sin(y[..., 0])], dim=-1)


def riccati(t, y):
    return y**2 * torch.cos(t)


def lotka_volterra(t, y):
    prey, predator = y[..., 0], y[..., 1]
    return torch.stack([1.5 * prey - prey * predator, -3 * predator + prey * predator], dim=-1)


def in_numpy(func):
    return lambda t, y: func(torch.tensor(t, dtype=torch.float64), torch.from_numpy(y)).detach().numpy()


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_a_step_is_that_of_the_loops(pair):
    net, y = Net(), 0.5 * torch.randn(3, 4, dtype=torch.float64)
    ours = embedded_step(net, 0.2, y, 0.3, pair)
    y1, error, stages = step(in_numpy(net), 0.2, y.numpy(), 0.3, pair)
    np.testing.assert_allclose(ours.y1.detach(), y1, rtol=0, atol=1e-14)  # 7 terms of size 1
    np.testing.assert_allclose(ours.error.detach(), error, rtol=0, atol=1e-14)
    np.testing.assert_allclose(torch.stack(ours.stages).detach(), np.stack(stages), rtol=0, atol=1e-13)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
@pytest.mark.parametrize(
    ("func", "start", "end"), [(riccati, [0.6], 4.0), (lotka_volterra, [3.0, 2.0], 2.0)], ids=["riccati", "prey"]
)
def test_observed_orders_of_step_and_estimate(pair, func, start, end):
    """Far above rounding, orders approach their limit as the step size does: the limit is extrapolated from two."""
    y0 = torch.tensor([start], dtype=torch.float64)
    exact = solve_ivp(in_numpy(func), (0, end), start, method="DOP853", rtol=1e-13, atol=1e-14)
    last = torch.from_numpy(exact.y[:, -1])
    errors, estimates = [], []
    for count in (40, 80, 160):
        h, y = end / count, y0
        for i in range(count):
            y = embedded_step(func, i * h, y, h, pair).y1
        errors.append((y[0] - last).norm().item())
        estimates.append(embedded_step(func, 0.3, y0, h / 4, pair).error.norm().item())
    assert errors[-1] > 3e-13
    assert limit(errors) == pytest.approx(pair.order, abs=0.1)
    assert limit(estimates) == pytest.approx(pair.order, abs=0.1)


def limit(values):
    coarse, fine = (math.log2(a / b) for a, b in itertools.pairwise(values))
    return 2 * fine - coarse


def test_local_error_beside_scipy():
    net, y, h = Net(), torch.randn(3, 4, dtype=torch.float64), 0.25

    def flat(t, x):
        return in_numpy(net)(t, x.reshape(3, 4)).ravel()

    k = np.empty((7, 12))
    y1, _ = rk_step(flat, 0.1, y.numpy().ravel(), flat(0.1, y.numpy().ravel()), h, RK45.A, RK45.B, RK45.C, k)
    ours = embedded_step(net, 0.1, y, h, DOPRI5)
    np.testing.assert_allclose(ours.y1.detach().ravel(), y1, rtol=0, atol=1e-10)
    # scipy's weights are those of the embedded step less ours
    np.testing.assert_allclose(ours.error.detach().ravel(), -(k.T @ RK45.E) * h, rtol=0, atol=1e-10)
    assert ours.error.abs().max() > 1e-7


@pytest.mark.parametrize(("pair", "theirs", "share"), [(TSIT5, "Tsit5", 1.0), (DOPRI5, "Dopri5", 1.5)])
def test_local_error_beside_torchode(pair, theirs, share):
    net, y = Net(), 0.5 * torch.randn(3, 4, dtype=torch.float64)
    t, h = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64)
    term = torchode.ODETerm(net, with_stats=False)
    method = getattr(torchode, theirs)(term)
    problem = torchode.InitialValueProblem(y, t, t + 1)
    state = method.init(term, problem, None, stats={}, args=None)
    with torch.no_grad():
        result = method.step(term, torch.ones(3, dtype=torch.bool), y, t, h, state, stats={}, args=None)[0]
        ours = embedded_step(net, t, y, h, pair)
    assert (ours.y1 - result.y).abs().max() < 1e-10
    assert (ours.error.abs() - share * result.error_estimate.abs()).abs().max() < 1e-10
    assert ours.error.abs().max() > 1e-7


def test_local_error_beside_torchdiffeq_is_three_halves_of_theirs():
    net, y = Net(), 0.5 * torch.randn(3, 4, dtype=torch.float64)
    t, h = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.25, dtype=torch.float64)
    tableau = _DORMAND_PRINCE_SHAMPINE_TABLEAU
    y1, _, error, _ = _runge_kutta_step(_PerturbFunc(net), y, net(t, y), t, h, t + h, tableau)
    ours = embedded_step(net, 0.1, y, 0.25, DOPRI5)
    assert (ours.y1 - y1).abs().max() < 1e-10
    assert (ours.error.abs() - 1.5 * error.abs()).abs().max() < 1e-10
    assert ours.error.abs().max() > 1e-7


@pytest.mark.parametrize("pair", [TSIT5, BOSH3], ids=["tsit5", "bosh3"])
def test_gradients_reach_state_time_size_and_parameters(pair):
    net = Net(2)

    def values(y, t, h, weight):
        func = lambda t, y: torch.tanh(y @ weight) * (1 + t)  # noqa: E731
        taken = embedded_step(func, t, y, h, pair)
        return taken.y1, 1e3 * taken.error, stiffness(taken, pair) if pair is TSIT5 else taken.y1

    y = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    t, h = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.3, 0.4))
    assert torch.autograd.gradcheck(values, (y, t, h, net.outer.weight[:, :2].detach().requires_grad_()))


def test_a_batch_of_times_and_sizes_is_as_many_steps():
    net, y = Net(), 0.5 * torch.randn(3, 4, dtype=torch.float64)
    t, h = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    batch = embedded_step(net, t, y, h)
    for i in range(3):
        alone = embedded_step(net, t[i].item(), y[i : i + 1], h[i].item())
        assert (batch.y1[i] - alone.y1[0]).abs().max() < 1e-14
        assert (batch.error[i] - alone.error[0]).abs().max() < 1e-15


@pytest.mark.parametrize("pair", [TSIT5, DOPRI5], ids=["tsit5", "dopri5"])
@pytest.mark.parametrize("rate", [-50.0, -10.0, -1.0, 3.0])
def test_stiffness_of_a_linear_equation_is_its_rate(pair, rate):
    taken = embedded_step(lambda t, y: rate * y, 0.0, torch.ones(2, 1, dtype=torch.float64), 0.1, pair)
    assert (stiffness(taken, pair) * pair.stability_size).item() == pytest.approx(abs(rate), rel=1e-10)
    each = stiffness(taken, pair, norm="sample") * pair.stability_size
    assert each.tolist() == pytest.approx([abs(rate)] * 2, rel=1e-10)


def test_stiffness_finds_the_fastest_direction():
    rates = torch.tensor([-1.0, -3.0, -40.0], dtype=torch.float64)
    taken = embedded_step(lambda t, y: rates * y, 0.0, torch.ones(1, 3, dtype=torch.float64), 0.1)
    assert (stiffness(taken) * TSIT5.stability_size).item() == pytest.approx(40, rel=1e-6)


def test_a_state_at_rest_is_not_stiff_and_has_no_error():
    weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
    y = torch.ones(2, 3, dtype=torch.float64)
    taken = embedded_step(lambda t, y: weight * y, 0.0, y, 0.1)
    total = stiffness(taken) + local_error(taken.error, y, taken.y1, 1e-3, 1e-3)
    total.backward()
    assert total == 0
    assert weight.grad == 0


def test_stiffness_is_refused_where_stages_do_not_show_it():
    taken = embedded_step(pendulum, 0.0, torch.ones(1, 2), 0.1, ADAPTIVE_HEUN)
    with pytest.raises(ValueError, match="stages of adaptive_heun do not show stiffness"):
        stiffness(taken, ADAPTIVE_HEUN)
    with pytest.raises(ValueError, match="this step has no stages"):
        stiffness(taken._replace(argument=None), TSIT5)


def test_local_error_by_hand():
    error = torch.tensor([[3e-3, 0.0], [0.0, 4e-3]], dtype=torch.float64)
    y0 = torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    y1 = torch.tensor([[-2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    # scales: 1e-3 (1 + 2) and 1e-3 (1 + 3), so scaled errors 1, 0, 0, 1
    assert local_error(error, y0, y1, 1e-3, 1e-3).item() == pytest.approx(math.sqrt(0.5))
    assert local_error(error, y0, y1, 1e-3, 1e-3, norm="sample").tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    with pytest.raises(ValueError, match="norm must be one of"):
        local_error(error, y0, y1, 1e-3, 1e-3, norm="max")
