import math

import pytest
import torch
from torch import nn

from lightning_opt.ode import (
    DOPRI5,
    NeuralODE,
    Place,
    local_error,
    local_regularization,
    local_term,
    sample_place,
)
from lightning_opt.ode.tableau import ADAPTIVE_HEUN


class Net(nn.Module):
    def __init__(self, *between):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), *between, nn.Tanh(), nn.Linear(8, 3)).double()

    def forward(self, t, y):
        return self.net(torch.cat([y, t.expand(len(y), 1)], dim=1))


def solved(**options):
    torch.manual_seed(1)
    block = NeuralODE(Net(), **{"rtol": 1e-4, "atol": 1e-4, **options})
    for p in block.parameters():
        p.data.mul_(3)
    y0 = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    return block, y0, block(y0)


@pytest.mark.parametrize("sampling", ["unbiased", "biased"])
@pytest.mark.parametrize("estimate", ["error", "stiffness"])
def test_the_gradient_reaches_parameters_only(sampling, estimate):
    block, y0, _ = solved()
    term = local_regularization(block, estimate=estimate, sampling=sampling)
    (of_input,) = torch.autograd.grad(term, y0, allow_unused=True, retain_graph=True)
    assert of_input is None
    term.backward()
    assert all(p.grad.abs().sum() > 0 for p in block.parameters())


@pytest.mark.parametrize("estimate", ["error", "stiffness"])
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("solver", ["lightning_opt", "torchdiffeq"])
def test_the_gradient_of_the_regularized_loss_beside_finite_differences(estimate, adjoint, solver):
    """With place and draws frozen; tolerances of 1e-8 keep the solve's own error out of the comparison."""
    block, y0, _ = solved(method="dopri5", solver=solver, adjoint=adjoint, rtol=1e-8, atol=1e-8)
    place = sample_place(block, sampling="unbiased", draw=0.37, dt=0.2)
    target = torch.randn(5, 3, dtype=torch.float64)

    def loss():
        task = (block(y0) - target).square().mean()
        return task + 0.1 * local_term(block, place, estimate=estimate, rtol=1e-3, atol=1e-3)

    parameters = list(block.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    step = 1e-4
    for p, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn_like(p)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                p.add_(sign * step * direction)
                values.append(loss().item())
                p.sub_(sign * step * direction)
        difference = (values[0] - values[1]) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(difference, rel=1e-5, abs=1e-5)
        assert abs(difference) > 1e-3


@pytest.mark.parametrize("estimate", ["error", "stiffness"])
@pytest.mark.parametrize("sampling", ["unbiased", "biased"])
@pytest.mark.parametrize("solver", ["lightning_opt", "torchdiffeq"])
def test_the_gradient_of_the_term_is_that_of_any_adjoint(estimate, sampling, solver):
    gradients = []
    for adjoint in (False, True):
        block, _, _ = solved(method="dopri5", solver=solver, adjoint=adjoint)
        place = sample_place(block, sampling=sampling, draw=0.6)
        gradients.append(torch.autograd.grad(local_term(block, place, estimate=estimate), list(block.parameters())))
    for a, b in zip(*gradients, strict=True):
        if solver == "torchdiffeq":
            assert torch.equal(a, b)
        else:  # our stages are summed in another order where no gradient is asked for, and step sizes feel it at 1e-9
            assert (a - b).abs().max() <= 1e-8 * a.abs().max()


def test_the_term_by_hand():
    block, _, _ = solved()
    place = sample_place(block, sampling="biased", draw=0.5)
    step = block.step(place.t, place.y, place.dt)
    expected = place.dt * local_error(step.error, place.y, step.y1, 1e-4, 1e-4)
    assert local_term(block, place).item() == pytest.approx(expected.item(), rel=1e-14)
    each = place.dt * local_error(step.error, place.y, step.y1, 1e-4, 1e-4, norm="sample").mean()
    assert local_term(block, place, norm="sample").item() == pytest.approx(each.item(), rel=1e-14)
    # an error of 10 times the tolerance is that of a tenth of it, in tolerances
    assert local_term(block, place, rtol=1e-3, atol=1e-3).item() == pytest.approx(expected.item() / 10, rel=1e-12)
    other = local_term(block, place, tableau=DOPRI5)
    assert other.item() != pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize(("solver", "method"), [("lightning_opt", "tsit5"), ("torchdiffeq", "dopri5")])
@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, 0.0)])
def test_the_state_at_a_uniform_time_is_that_of_the_solution(solver, method, span):
    block, y0, _ = solved(solver=solver, method=method, t_span=span, rtol=1e-7, atol=1e-7)
    fine = NeuralODE(block.func, rtol=1e-12, atol=1e-12, method="dopri5").eval()
    for draw in (0.0, 0.21, 0.5, 0.999):
        place = sample_place(block, draw=draw)
        t = span[0] + draw * (span[1] - span[0])
        assert place.t == pytest.approx(t)
        exact = y0 if draw == 0 else fine(y0, [span[0], t])[-1]
        assert (place.y - exact).abs().max() < 1e-5
        assert not place.y.requires_grad
        step = max(i for i, start in enumerate(block.last_solve.t) if (t - start) * (span[1] - span[0]) >= 0)
        accepted = block.last_solve.dt[step]
        assert place.dt == pytest.approx(math.copysign(min(abs(accepted), abs(span[1] - t)), accepted))


def test_uniform_times_have_the_mean_of_the_time_span():
    """Monte-Carlo mean over 400 draws beside a sum over 200 midpoints, within four standard errors of the mean."""
    block, _, _ = solved()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        drawn = torch.tensor([local_term(block, sample_place(block, generator=generator, dt=0.01)) for _ in range(400)])
        grid = torch.tensor([local_term(block, sample_place(block, draw=(i + 0.5) / 200, dt=0.01)) for i in range(200)])
    assert abs(drawn.mean() - grid.mean()) < 4 * drawn.std() / math.sqrt(len(drawn))
    assert drawn.std() > 0.05 * drawn.mean()


def test_biased_times_have_the_mean_over_the_accepted_steps():
    block, _, _ = solved(rtol=1e-6, atol=1e-6)
    record = block.last_solve
    assert record.accepted > 4
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        every = torch.stack(
            [local_term(block, Place(*at)) for at in zip(record.t, record.states, record.dt, strict=True)]
        )
        places = [sample_place(block, sampling="biased", generator=generator) for _ in range(2000)]
    indices = torch.tensor([record.t.index(place.t) for place in places])
    counts = torch.bincount(indices, minlength=record.accepted)
    share = 1 / record.accepted
    # binomial counts, five standard deviations
    assert ((counts / 2000 - share).abs() < 5 * math.sqrt(share * (1 - share) / 2000)).all()
    drawn = every[indices]
    assert abs(drawn.mean() - every.mean()) < 4 * drawn.std() / math.sqrt(2000)
    # every value is one of the accepted steps', with the state that is there
    assert all(torch.equal(place.y, record.states[i]) for place, i in zip(places[:20], indices, strict=False))


def test_an_accepted_step_has_an_error_below_the_tolerance_and_an_initial_one_far_below():
    block, _, _ = solved(rtol=1e-6, atol=1e-6)
    accepted = sample_place(block, sampling="biased", draw=0.5)
    initial = sample_place(block, sampling="biased", draw=0.5, dt="initial")
    assert 0.001 < local_term(block, accepted).item() / accepted.dt <= 1
    assert initial.dt < 0.5 * accepted.dt
    assert local_term(block, initial).item() / initial.dt < 0.1
    assert sample_place(block, draw=0.9, dt=5.0).dt == pytest.approx(0.1)
    looser = sample_place(block, sampling="biased", draw=0.5, dt="initial", rtol=1e-2, atol=1e-2)
    assert looser.dt > initial.dt


def test_normalisation_is_left_as_it_is():
    torch.manual_seed(0)
    block = NeuralODE(Net(nn.BatchNorm1d(8)), rtol=1e-3, atol=1e-3)
    y0 = torch.randn(5, 3, dtype=torch.float64)
    block(y0)
    before = [b.clone() for b in block.buffers()]
    local_regularization(block, dt="initial").backward()
    assert all(torch.equal(a, b) for a, b in zip(before, block.buffers(), strict=True))
    assert block.func.net[1].track_running_stats
    block(y0)  # and goes on as before
    assert not torch.equal(before[0], next(block.buffers()))


def test_random_masks_are_refused():
    block = NeuralODE(Net(nn.Dropout(0.5)))
    with pytest.raises(ValueError, match=r"Dropout\(p=0.5\), which draws another mask at every evaluation"):
        local_regularization(block)


def test_what_is_refused():
    block, y0, _ = solved()
    with pytest.raises(ValueError, match="estimate must be one of"):
        local_regularization(block, estimate="errors")
    with pytest.raises(ValueError, match="sampling must be one of"):
        local_regularization(block, sampling="uniform")
    with pytest.raises(ValueError, match="dt must be one of"):
        local_regularization(block, dt="first")
    with pytest.raises(ValueError, match="dt must be > 0"):
        local_regularization(block, dt=0.0)
    with pytest.raises(ValueError, match="stages of adaptive_heun do not show stiffness"):
        local_regularization(block, estimate="stiffness", tableau=ADAPTIVE_HEUN)
    block.eval()(y0)
    with pytest.raises(ValueError, match="no solve with states: call it in training mode"):
        local_regularization(block)
    fixed, _, _ = solved(method="rk4", options={"step_size": 0.25})
    with pytest.raises(ValueError, match=r"the solver takes fixed steps \(method 'rk4'\)"):
        local_regularization(fixed)
    assert local_regularization(fixed, dt=0.25).isfinite()
