import copy
import math
import pickle
import sys

import pytest
import torch
from torch import nn

from lightning_opt.ode import NeuralODE, SolveError

SOLVERS = [
    *(("lightning_opt", method) for method in ("tsit5", "dopri5", "bosh3")),
    *(("torchdiffeq", method) for method in ("dopri5", "bosh3", "adaptive_heun", "fehlberg2", "dopri8")),
    *(("torchdiffeq", method) for method in ("euler", "midpoint", "rk4", "explicit_adams")),
]
FIXED = ("euler", "midpoint", "rk4", "explicit_adams")


class Net(nn.Module):
    """Counts its calls by itself."""

    def __init__(self, size=3, dtype=torch.float64):
        super().__init__()
        self.linear = nn.Linear(size, size, dtype=dtype)
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        return torch.tanh(self.linear(y)) * (1 + t)


def block(net=None, **options):
    return NeuralODE(net or Net(), **{"rtol": 1e-4, "atol": 1e-4, **options})


@pytest.mark.parametrize(("solver", "method"), SOLVERS)
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("times", [None, [0.0, 0.4, 0.9]])
def test_every_evaluation_is_counted_forward_and_backward(solver, method, adjoint, times):
    net = Net()
    ode = block(net, method=method, solver=solver, adjoint=adjoint)
    end = ode(torch.randn(4, 3, dtype=torch.float64), times)
    assert end.shape == ((4, 3) if times is None else (3, 4, 3))
    forward = net.calls
    end.square().sum().backward()
    record = ode.last_solve
    assert record.nfe_forward == forward
    assert record.nfe_backward == net.calls - forward
    assert (record.nfe_backward > 0) == adjoint
    assert net.linear.weight.grad.abs().sum() > 0
    if solver == "lightning_opt":
        stages = {"tsit5": 6, "dopri5": 6, "bosh3": 3}[method]
        assert record.nfe_forward == 2 + stages * (record.accepted + record.rejected)


@pytest.mark.parametrize(("solver", "method"), SOLVERS)
@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, -0.5)])
def test_the_record_holds_the_steps_from_start_to_end(solver, method, span):
    ode = block(method=method, solver=solver, t_span=span)
    y0 = torch.randn(4, 3, dtype=torch.float64)
    ode(y0)
    record = ode.last_solve
    assert (record.t0, record.t1) == span
    assert record.t[0] == span[0]
    assert torch.equal(record.states[0], y0)
    assert len(record.t) == len(record.dt) == len(record.states) == record.accepted > 0
    sign = 1 if span[1] > span[0] else -1
    assert all(dt * sign > 0 for dt in record.dt)
    for t, dt, t1 in zip(record.t, record.dt, record.t[1:], strict=False):
        assert t + dt == pytest.approx(t1, abs=1e-12)
    assert (record.t[-1] + record.dt[-1] - span[1]) * sign >= -1e-12
    assert not any(state.requires_grad for state in record.states)
    if method not in FIXED:  # each state is one step of the method behind the last
        step = ode.step(record.t[0], record.states[0], record.dt[0])
        if method != "dopri8":
            assert (step.y1 - record.states[1]).abs().max() < 1e-10


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("solver", ["lightning_opt", "torchdiffeq"])
def test_states_are_kept_only_for_training(adjoint, solver):
    ode = block(method="dopri5", solver=solver, adjoint=adjoint)
    y0 = torch.randn(4, 3, dtype=torch.float64)
    ode(y0)
    assert ode.last_solve.states
    with torch.no_grad():
        ode(y0)
    assert not ode.last_solve.states
    ode.eval()(y0)
    assert not ode.last_solve.states
    assert ode.last_solve.nfe_forward > 0
    assert ode.last_solve.accepted > 0


@pytest.mark.parametrize("times", [None, [0.0, 0.3, 1.0], [1.0, 0.2]])
def test_our_adjoint_beside_the_steps_and_beside_torchdiffeq(times):
    y0 = torch.randn(4, 3, dtype=torch.float64)
    gradients = []
    net = Net()
    for solver, adjoint in [("lightning_opt", False), ("lightning_opt", True), ("torchdiffeq", True)]:
        net.zero_grad()
        x = y0.clone().requires_grad_()
        ode = block(net, method="dopri5", solver=solver, adjoint=adjoint, rtol=1e-10, atol=1e-10)
        weights = torch.linspace(1, 2, 3, dtype=torch.float64)
        (ode(x, times).square() * weights).sum().backward()
        gradients.append([x.grad, net.linear.weight.grad.clone(), net.linear.bias.grad.clone()])
    for steps, ours, theirs in zip(*gradients, strict=True):
        # tolerances of 1e-10 (1 + |y|) for values up to 15, over 10 steps and interpolated states, of one order less
        assert (steps - ours).abs().max() < 1e-7
        assert (ours - theirs).abs().max() < 1e-6


def test_the_adjoint_leaves_frozen_parameters_alone_and_has_no_second_derivative():
    net = Net()
    net.linear.bias.requires_grad_(False)
    ode = block(net, adjoint=True)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(ode(x).square().sum(), x, create_graph=True)
    assert net.linear.bias.grad is None
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@pytest.mark.parametrize("solver", ["lightning_opt", "torchdiffeq"])
def test_autocast_does_not_reach_the_solve(solver):
    net = Net(dtype=torch.float32)
    ode = block(net, method="dopri5", solver=solver)
    y0 = torch.randn(4, 3)
    expected = ode(y0)
    with torch.autocast("cpu", torch.bfloat16):
        again = ode(y0)
        from_short = ode(y0.bfloat16())
    assert torch.equal(again, expected)
    assert from_short.dtype == torch.float32
    assert torch.equal(from_short, ode(y0.bfloat16().float()))


def test_training_may_move_the_end():
    ode = block()
    y0 = torch.randn(4, 3, dtype=torch.float64)
    at_end = ode(y0)
    ode.end_shift = -0.3
    assert torch.equal(ode(y0, [0.0, 0.5, 1.0])[-1], ode(y0, [0.0, 0.5, 1.0])[-1])
    assert ode.last_solve.t1 == pytest.approx(0.7)
    assert torch.equal(ode.eval()(y0), at_end)
    ode.train().end_shift = -0.6
    with pytest.raises(ValueError, match="strictly increasing or strictly decreasing"):
        ode(y0, [0.0, 0.5, 1.0])


def test_copies_and_pickles_with_its_record():
    ode = block()
    y0 = torch.randn(4, 3, dtype=torch.float64)
    end = ode(y0)
    for twin in (copy.deepcopy(ode), pickle.loads(pickle.dumps(ode))):
        assert torch.equal(twin(y0), end)
        assert twin.last_solve.t == ode.last_solve.t
    assert list(ode.state_dict()) == ["func.linear.weight", "func.linear.bias"]


def test_a_compiled_network_around_it_leaves_the_solve_alone():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    net = nn.Sequential(nn.Linear(3, 3).double(), block(), nn.Linear(3, 3).double())
    y0 = torch.randn(4, 3, dtype=torch.float64)
    compiled = torch.compile(net, backend=backend)
    assert torch.equal(compiled(y0), net(y0))
    assert len(graphs) <= 2
    graphs.clear()
    inner = block()
    with torch.no_grad():
        end = inner(y0)
        inner.func = torch.compile(inner.func, backend=backend)
        assert torch.equal(inner(y0), end)
    assert graphs


class NoTime(nn.Module):
    def forward(self, y):
        return y


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"func": NoTime()}, r"func must take time and state, forward\(t, y\), and NoTime.forward takes"),
        ({"func": lambda t, y: y}, "func must be a torch.nn.Module"),
        ({"t_span": (1.0, 1.0)}, "t_span must be two different finite times"),
        ({"t_span": (0.0, float("inf"))}, "t_span must be two different finite times"),
        ({"t_span": (0.0, 1.0, 2.0)}, "t_span must be two different finite times"),
        ({"rtol": -1e-3}, "rtol must be >= 0"),
        ({"atol": 0.0}, "atol must be > 0"),
        ({"max_steps": 0}, "max_steps must be >= 1"),
        ({"method": "tsit4"}, "method must be one of .* Did you mean 'tsit5'"),
        ({"method": "tsit5", "solver": "torchdiffeq"}, "method must be one of"),
        ({"method": "rk4", "solver": "lightning_opt"}, "method must be one of"),
        ({"solver": "diffrax"}, "solver must be one of"),
        ({"options": {"step_size": 0.1}}, "options are for torchdiffeq's solver, and tsit5 is run by our own"),
    ],
)
def test_what_the_constructor_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        NeuralODE(**{"func": Net(), **options})


@pytest.mark.parametrize(
    "times", [[0.0, 0.0], [0.0, 1.0, 0.5], [0.0], [0.0, math.nan], [0.0, math.inf], [-math.inf, 0.0]]
)
def test_times_that_are_refused(times):
    with pytest.raises(ValueError, match="times must be two or more, strictly increasing or strictly decreasing"):
        block()(torch.ones(1, 3, dtype=torch.float64), times)


def test_times_with_a_gradient_or_more_dimensions_are_refused():
    y0 = torch.ones(1, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="a tensor that requires a gradient"):
        block()(y0, torch.tensor([0.0, 1.0], requires_grad=True))
    for shape in ((), (2, 2)):
        with pytest.raises(ValueError, match="a tensor that is not flat"):
            block()(y0, torch.ones(shape))


def test_states_that_are_refused():
    with pytest.raises(ValueError, match=r"the state must be one floating-point tensor, got a tensor of torch.int64"):
        block()(torch.ones(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="the state must be one floating-point tensor, got tuple"):
        block()((torch.ones(1, 3), torch.ones(1, 3)))
    with pytest.raises(ValueError, match=r"the state must have elements, got one of shape \(0, 3\)"):
        block()(torch.ones(0, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="parameters of 16 bits"):
        block(Net(dtype=torch.bfloat16))(torch.ones(1, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize("solver", ["lightning_opt", "torchdiffeq"])
def test_a_solve_that_fails_says_why(solver):
    class Steep(nn.Module):
        def forward(self, t, y):
            return -1e4 * y

    class Wrong(nn.Module):
        def forward(self, t, y):
            return y / (t < 0.5)

    y0 = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(SolveError, match=r"took 20 steps and reached t = .*: raise max_steps or the tolerances"):
        block(Steep(), method="dopri5", solver=solver, max_steps=20)(y0)
    with pytest.raises(SolveError, match=r"is not finite at t = 0\.5|became too small at t = 0\."):
        block(Wrong(), method="dopri5", solver=solver)(y0)


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("method", ["euler", "rk4", "implicit_adams"])
def test_fixed_steps_to_a_state_that_is_not_finite_say_so(method, adjoint):
    with pytest.raises(SolveError, match="the state is not finite"):
        block(method=method, adjoint=adjoint)(torch.full((1, 3), math.nan, dtype=torch.float64))


def test_dynamics_that_give_no_tensor_are_refused():
    class Pair(nn.Module):
        def forward(self, t, y):
            return y, y

    with pytest.raises(ValueError, match="func must give a tensor, got tuple"):
        NeuralODE(Pair())(torch.ones(1, 3))


def test_fixed_steps_of_torchdiffeq():
    ode = block(method="rk4", options={"step_size": 0.25})
    ode(torch.randn(4, 3, dtype=torch.float64))
    assert not ode.adaptive
    assert ode.last_solve.dt == pytest.approx([0.25] * 4)
    assert ode.last_solve.nfe_forward == 16


def test_torchdiffeq_is_asked_for_only_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    y0 = torch.ones(1, 3, dtype=torch.float64)
    assert block(method="dopri5")(y0).isfinite().all()
    with pytest.raises(ImportError, match=r"pip install 'lightning-opt\[ode\]'"):
        block(method="dopri8")(y0)
