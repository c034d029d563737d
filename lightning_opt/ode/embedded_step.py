"""One step of an embedded Runge-Kutta pair, which can be differentiated."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_opt.registry import register

from .tableau import TSIT5, Tableau

Dynamics = Callable[[Tensor, Tensor], Tensor]
"""``func(t, y)``: the time derivative of the state, of its shape."""


class EmbeddedStep(NamedTuple):
    """What a step with an error estimate leaves.

    Attributes:
        y1: The state at its end, of the state's shape.
        error: The estimate of its error, of the state's shape, in float32 or wider.
        stages: The derivatives that it evaluated; empty where a block estimates the error in another way.
        argument: The state at which the stage before the last was evaluated, or None.
    """

    y1: Tensor
    error: Tensor
    stages: tuple[Tensor, ...] = ()
    argument: Tensor | None = None


@register("tool", summary="One Runge-Kutta step with its local error and stiffness", paper="2303.02262")
def embedded_step(
    func: Dynamics,
    t: Tensor | float,
    y: Tensor,
    dt: Tensor | float,
    tableau: Tableau = TSIT5,
    *,
    first: Tensor | None = None,
) -> EmbeddedStep:
    """One step of an embedded pair from a given state, with its error estimate.

    Nothing is detached: gradients reach the parameters of ``func``, the state, the time and the step size.

    Args:
        func: ``func(t, y)``.
        t: Time at the start, a number or a 0-dim tensor; or ``[batch]``, a time for each sample, if ``func`` takes
            such times.
        y: State ``[batch, ...]``.
        dt: Size of the step, as ``t``; negative ones go back in time.
        tableau: The pair.
        first: ``func(t, y)`` where it is known.

    Returns:
        State, error estimate, stages, and the argument of the last stage but one.

    Cost: ``tableau.stages`` evaluations, one less with ``first``.

    Example:
        >>> import math
        >>> step = embedded_step(lambda t, y: -y, 0.0, torch.ones(1, dtype=torch.float64), 0.1)
        >>> f"{step.y1.item() - math.exp(-0.1):.0e} {step.error.item():.0e}"
        '6e-11 -4e-09'
    """
    c, a, b, _ = tableau.floats
    size = _beside(dt, y) if isinstance(dt, Tensor) else dt
    stages = [func(time_in(t, y), y) if first is None else first]
    argument, before = y, None
    for node, row in zip(c[1:], a[1:], strict=True):
        before, argument = argument, combine(y, stages, row, size)
        stages.append(func(time_in(t + node * dt, y), argument))
    y1 = argument if tableau.first_same_as_last else combine(y, stages, b, size)
    wide = torch.promote_types(y.dtype, torch.float32)
    error = combine(None, [stage.to(wide) for stage in stages], tableau.floats[3], size)
    return EmbeddedStep(y1, error, tuple(stages), before)


def combine(start: Tensor | None, stages: Sequence[Tensor], weights: Sequence[float], size: Tensor | float) -> Tensor:
    """``start + size * sum(weights * stages)``; weights of zero cost nothing."""
    terms = [(w, k) for w, k in zip(weights, stages, strict=True) if w != 0.0]
    if isinstance(size, Tensor):
        total = sum((w * k for w, k in terms[1:]), terms[0][0] * terms[0][1])
        return size * total if start is None else start + size * total
    if start is None:
        (w, k), *terms = terms
        result = k * (w * size)
    else:
        result = start
    for w, k in terms:
        result = torch.add(result, k, alpha=w * size)
    return result


def time_in(t: Tensor | float, y: Tensor) -> Tensor:
    """A time as the dynamics get it: in the state's precision and on its device."""
    return t.to(y) if isinstance(t, Tensor) else torch.full((), t, dtype=y.dtype, device=y.device)


def _beside(dt: Tensor, y: Tensor) -> Tensor:
    """Sizes ``[batch]`` with the dimensions that they need beside the state."""
    dt = dt.to(y)
    return dt if dt.ndim == 0 else dt.reshape(-1, *[1] * (y.ndim - 1))
