"""The local and the global regularizer on a neural SDE."""

import pytest
import torch
from torch import Tensor, nn

from lightning_opt.ode import NeuralSDE, global_regularization, local_error, local_regularization
from lightning_opt.ode.local_regularization import local_term, sample_place

F64 = torch.float64
H = 0.1


class Net(nn.Module):
    def __init__(self, seed: int, constant: float | None = None) -> None:
        super().__init__()
        weights = torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(seed), dtype=F64)
        self.weights = nn.Parameter(weights)
        self.constant = constant

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if self.constant is not None:
            return torch.full_like(y, self.constant)
        a, b, c = self.weights
        return (y * a + t * b).tanh() * c


def solved(**arguments: object) -> NeuralSDE:
    block = NeuralSDE(Net(0), Net(1), **{"rtol": 1e-2, "atol": 1e-2, **arguments})
    block(start())
    return block


def start(batch: int = 6) -> Tensor:
    return torch.randn(batch, 4, generator=torch.Generator().manual_seed(2), dtype=F64)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_biased_places_are_the_accepted_steps() -> None:
    block = solved()
    record = block.last_solve
    for i in range(record.accepted):
        place = sample_place(block, sampling="biased", draw=(i + 0.5) / record.accepted)
        assert place.t == record.t[i]
        assert place.dt == pytest.approx(record.dt[i], abs=1e-15)
        assert torch.equal(place.y, record.states[i])


def test_an_unbiased_place_lies_on_a_path_of_the_equation() -> None:
    block = NeuralSDE(Net(0, constant=0.5), Net(1, constant=2.0), dt=0.4)
    block(torch.zeros(20_000, 4, dtype=F64))
    place = sample_place(block, draw=0.6, generator=generator())
    index = max(i for i, t in enumerate(block.last_solve.t) if t <= 0.6)
    assert place.t == pytest.approx(0.6)
    assert place.dt == pytest.approx(min(block.last_solve.dt[index], 0.4))
    # 80,000 numbers of mean 0.3 and variance 4 * 0.6, within four standard deviations
    assert place.y.mean().item() == pytest.approx(0.3, abs=4 * (2.4 / 80_000) ** 0.5)
    assert place.y.var().item() == pytest.approx(2.4, rel=4 * (2 / 80_000) ** 0.5)


@pytest.mark.parametrize("estimate", ["doubling", "embedded"])
def test_the_term_is_the_error_of_a_step_times_its_size(estimate: str) -> None:
    block = solved(estimate=estimate)
    place = sample_place(block, draw=0.3, generator=generator())
    assert not place.y.requires_grad
    term = local_term(block, place, generator=generator())
    step = block.step(place.t, place.y, place.dt, generator=generator())
    expected = place.dt * local_error(step.error, place.y, step.y1, 1e-2, 1e-2)
    assert term.item() == pytest.approx(expected.item(), rel=1e-14)
    repeated = local_regularization(block, generator=generator())
    assert torch.equal(repeated, local_regularization(block, generator=generator()))
    term.backward()
    assert block.drift.weights.grad.norm() > 0
    assert block.diffusion.weights.grad.norm() > 0


@pytest.mark.parametrize(("method", "adjoint"), [("midpoint", False), ("reversible_heun", True)])
def test_the_gradient_of_the_regularized_loss_is_that_of_finite_differences(method: str, adjoint: bool) -> None:
    """With steps, place and noise frozen; reversible Heun's adjoint is exact for its own steps."""
    block = NeuralSDE(
        Net(0), Net(1), sde_type="stratonovich", method=method, adjoint=adjoint, adaptive=False, dt=1 / 16
    )
    y0 = start()
    block(y0)
    place = sample_place(block, draw=0.4, dt=H, generator=generator())

    def loss() -> Tensor:
        block.solves.zero_()
        return block(y0).square().mean() + 2.5 * local_term(block, place, generator=generator())

    loss().backward()
    for part in (block.drift, block.diffusion):
        found, change = torch.empty_like(part.weights), 1e-6
        with torch.no_grad():
            flat = part.weights.view(-1)
            for i, before in enumerate(flat.tolist()):
                flat[i] = before + change
                above = loss()
                flat[i] = before - change
                found.view(-1)[i] = (above - loss()) / (2 * change)
                flat[i] = before
        # roundings of 1e-16 over 2e-6 in each of 12 entries, and third derivatives times 1e-12
        assert (part.weights.grad - found).norm() <= 1e-7 * found.norm()


def test_the_global_regularizer_takes_every_accepted_step() -> None:
    block = NeuralSDE(Net(0), Net(1), dt=0.3)
    block.keep_graph = True
    block(start())
    record = block.last_solve
    terms = []
    for t, y, dt in zip(record.t, record.states, record.dt, strict=True):
        step = block.step(t, y, dt)
        terms.append(dt * local_error(step.error, y, step.y1, 1e-2, 1e-2))
    value = global_regularization(block)
    assert value.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-14)
    value.backward()
    assert block.drift.weights.grad.norm() > 0


def test_what_a_neural_sde_cannot_be_asked() -> None:
    with pytest.raises(ValueError, match="NeuralSDE has no estimate 'stiffness', only error"):
        local_regularization(solved(), estimate="stiffness")
    with pytest.raises(ValueError, match=r"fixed steps \(method 'srk'\), so that none is accepted"):
        local_regularization(solved(adaptive=False))
    with pytest.raises(ValueError, match="no solve with states"):
        local_regularization(NeuralSDE(Net(0), Net(1)))
    block = solved(sde_type="stratonovich", adjoint=True)
    block.keep_graph = True
    with pytest.raises(ValueError, match="build the block with adjoint=False"):
        global_regularization(block)
    assert local_regularization(block).requires_grad  # which the local one does not mind
