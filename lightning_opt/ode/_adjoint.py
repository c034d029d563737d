"""The gradient of a solve from the adjoint equation, integrated backward by our own solver."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .local_error import local_error
from .solve_ode import solve_ode
from .solve_record import Counted, SolveRecord
from .tableau import Tableau


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the two solves have in common."""

    func: Counted
    times: Sequence[float]
    tableau: Tableau
    rtol: float
    atol: float
    max_steps: int


def solve_with_adjoint(problem: Problem, y0: Tensor, keep_states: bool) -> list[Tensor]:
    """The states at all times; differentiable in ``y0`` and the parameters of the dynamics, in constant memory."""
    parameters = [p for p in problem.func.parameters() if p.requires_grad]
    return list(_Adjoint.apply(problem, keep_states, y0, *parameters))


class _Adjoint(torch.autograd.Function):
    """Pontryagin's equations as in arXiv:1806.07366, algorithm 1.

    The step size follows the errors of state and adjoint, not of the integrals over the parameters, on which neither
    depends (arXiv:2009.09457).
    """

    @staticmethod
    def forward(ctx: Any, problem: Problem, keep_states: bool, y0: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        p = problem
        states = solve_ode(
            p.func,
            y0,
            p.times,
            tableau=p.tableau,
            rtol=p.rtol,
            atol=p.atol,
            max_steps=p.max_steps,
            record=p.func.record,
            keep_states=keep_states,
        )
        ctx.problem = p
        ctx.save_for_backward(*states, *parameters)
        return (y0.clone(), *states[1:])  # an input may not be an output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        p: Problem = ctx.problem
        count = len(p.times)
        states, parameters = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        shape, size = states[0].shape, states[0].numel()
        lengths = [q.numel() for q in parameters]

        def augmented(t: Tensor, z: Tensor) -> Tensor:
            with torch.enable_grad():
                y = z[:size].view(shape).detach().requires_grad_()
                f = p.func(t, y)
            pulled = torch.autograd.grad(f, (y, *parameters), -z[size : 2 * size].view(shape), allow_unused=True)
            blanks = (y, *parameters)
            parts = [torch.zeros_like(q) if g is None else g for g, q in zip(pulled, blanks, strict=True)]
            return torch.cat([f.detach().reshape(-1), *(part.reshape(-1) for part in parts)])

        def norm(error: Tensor, z: Tensor, z1: Tensor) -> float:
            parts = [slice(0, size), slice(size, 2 * size)]
            return max(local_error(error[s], z[s], z1[s], p.rtol, p.atol).item() for s in parts)

        adjoint = gradients[-1].reshape(-1)
        integrals = torch.cat([adjoint.new_zeros(0), *(q.new_zeros(q.numel()) for q in parameters)])
        for i in range(count - 1, 0, -1):
            z = torch.cat([states[i].reshape(-1), adjoint, integrals])
            span = (p.times[i], p.times[i - 1])
            record = SolveRecord(*span)
            z = solve_ode(
                augmented,
                z,
                span,
                tableau=p.tableau,
                rtol=p.rtol,
                atol=p.atol,
                max_steps=p.max_steps,
                record=record,
                norm=norm,
            )[-1]
            adjoint = z[size : 2 * size] + gradients[i - 1].reshape(-1)
            integrals = z[2 * size :]
        pieces = [g.view(q.shape).to(q.dtype) for g, q in zip(integrals.split(lengths), parameters, strict=True)]
        return (None, None, adjoint.view(shape), *pieces)
