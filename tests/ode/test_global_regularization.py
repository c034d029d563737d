import pytest
import torch
from torch import nn

from lightning_opt.ode import (
    NeuralODE,
    global_regularization,
    local_error,
    second_derivative,
    steer_end,
    stiffness,
    taynode_regularization,
)
from lightning_opt.ode.coefficient import check_coefficient, coefficient

SOLVERS = ["lightning_opt", "torchdiffeq"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8).double(), nn.Linear(8, 3).double()

    def forward(self, t, y):
        return self.outer(torch.tanh(3 * self.inner(torch.cat([y, t.expand(len(y), 1)], dim=1))))


def solved(solver="lightning_opt", **options):
    torch.manual_seed(0)
    block = NeuralODE(Net(), method="dopri5", solver=solver, **{"rtol": 1e-4, "atol": 1e-4, **options})
    block.keep_graph = True
    y0 = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    block(y0)
    return block, y0


@pytest.mark.parametrize("solver", SOLVERS)
def test_sums_over_the_steps_by_hand(solver):
    block, _ = solved(solver)
    record = block.last_solve
    errors, stiff = [], []
    for t, y, dt in zip(record.t, record.states, record.dt, strict=True):
        step = block.step(t, y, dt)
        errors.append(dt * local_error(step.error, y, step.y1, 1e-4, 1e-4))
        stiff.append(stiffness(step, block.tableau))
    errors, stiff = torch.stack(errors), torch.stack(stiff)
    assert len(errors) > 2
    for estimate, reduction, expected in [
        ("error", None, errors.mean()),
        ("error", "sum", errors.sum()),
        ("stiffness", None, stiff.max()),
        ("stiffness", "mean", stiff.mean()),
    ]:
        value = global_regularization(block, estimate=estimate, reduction=reduction)
        assert value.item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("term", ["error", "stiffness", "taynode"])
def test_the_gradient_through_the_solver_beside_finite_differences(solver, term):
    """Of fixed steps, as step sizes are constants; but the first one of torchdiffeq, unless it is told."""
    block, y0 = solved(solver, options={"first_step": 0.05} if solver == "torchdiffeq" else None)
    times, sizes = list(block.last_solve.t), list(block.last_solve.dt)
    weight = block.func.outer.weight

    def value():
        """The same steps by hand."""
        y, total = y0.detach(), 0.0
        for t, dt in zip(times, sizes, strict=True):
            step = block.step(t, y, dt)
            if term == "error":
                total = total + dt * local_error(step.error, y, step.y1, 1e-4, 1e-4) / len(times)
            elif term == "stiffness":
                total = total + stiffness(step, block.tableau) / len(times)
            else:
                total = total + min(dt, 1 - t) * second_derivative(block.func, t, y).square().mean()
            y = step.y1
        return total

    regularizer = (
        taynode_regularization(block)
        if term == "taynode"
        else global_regularization(block, estimate=term, reduction="mean")
    )
    assert regularizer.item() == pytest.approx(value().item(), rel=1e-8)
    gradient_of_input, gradient = torch.autograd.grad(regularizer, (y0, weight))
    assert gradient_of_input.abs().sum() > 0
    direction, step = torch.randn_like(weight), 1e-5
    with torch.no_grad():
        weight.add_(step * direction)
        above = value().item()
        weight.sub_(2 * step * direction)
        below = value().item()
    assert (gradient * direction).sum().item() == pytest.approx((above - below) / (2 * step), rel=1e-5)


def test_the_second_derivative_is_that_of_the_trajectory():
    net, y = Net(), torch.randn(5, 3, dtype=torch.float64)
    ode = NeuralODE(net, rtol=1e-12, atol=1e-12).eval()
    h = 1e-3
    with torch.no_grad():
        ahead, behind = ode(y, [0.4, 0.4 + h])[-1], ode(y, [0.4, 0.4 - h])[-1]
    difference = (ahead - 2 * y + behind) / h**2
    # fourth derivatives of up to 100 times h^2 / 12
    assert (second_derivative(net, 0.4, y) - difference).abs().max() < 1e-4


def test_the_integral_of_a_known_trajectory():
    """y = exp(2 t): the mean of the squared second derivative, 16 exp(4 t), integrates to 4 (exp(4) - 1)."""

    class Growth(nn.Module):
        def forward(self, t, y):
            return 2 * y

    block = NeuralODE(Growth(), rtol=1e-10, atol=1e-10, method="bosh3")
    block.keep_graph = True
    block(torch.ones(3, 1, dtype=torch.float64))
    # a sum over starts of steps is below, by about half a step of the growth
    exact, steps = 4 * (torch.tensor(4.0).exp().item() - 1), block.last_solve.accepted
    assert steps > 300
    assert taynode_regularization(block).item() == pytest.approx(exact, rel=4 / steps)


def test_what_is_refused():
    block, _ = solved(adjoint=True)
    for call in (global_regularization, taynode_regularization):
        with pytest.raises(ValueError, match="build the block with adjoint=False"):
            call(block)
    block, y0 = solved()
    block.keep_graph = False
    block(y0)
    for call in (global_regularization, taynode_regularization):
        with pytest.raises(ValueError, match="set keep_graph of the block to True"):
            call(block)
    with pytest.raises(ValueError, match="reduction must be one of"):
        global_regularization(block, reduction="median")


def test_random_ends():
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([steer_end(0.0, 1.0, 0.5, generator) for _ in range(2000)])
    assert ends.min() >= 0.5
    assert ends.max() < 1.5
    assert abs(ends.mean() - 1) < 4 * 0.5 / 3**0.5 / 2000**0.5  # of a uniform distribution
    assert ends.std() == pytest.approx(0.5 / 3**0.5, rel=0.05)
    assert steer_end(1.0, 0.0, 0.0) == 0.0
    with pytest.raises(ValueError, match=r"b must be in \[0, 1\.0\), got 1\.0"):
        steer_end(0.0, 1.0, 1.0)


def test_coefficients_over_training():
    assert coefficient(0, 100, 2.5, 1.0) == 2.5
    assert coefficient(100, 100, 2.5, 1.0) == pytest.approx(1.0)
    assert coefficient(50, 100, 2.5, 1.0) == pytest.approx((2.5 * 1.0) ** 0.5)
    assert coefficient(200, 100, 2.5, 1.0) == pytest.approx(1.0)
    assert coefficient(50, 100, 2.5, 1.0, "constant") == 2.5
    assert coefficient(50, 100, 0.0, 1.0) == 0.0
    check_coefficient(0.0, 0.0, "constant")
    for wrong, message in [
        ((-1.0, 1.0, "constant"), "coeff must be >= 0"),
        ((1.0, 0.0, "exponential"), "coeff_end must be > 0"),
        ((1.0, 1.0, "linear"), "decay must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_coefficient(*wrong)
