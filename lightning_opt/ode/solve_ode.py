"""A lean adaptive Runge-Kutta solver: step control in Python floats, stages in one block of memory."""

import collections
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_opt._checks import check_interval
from lightning_opt.registry import register

from .embedded_step import Dynamics, EmbeddedStep, combine, embedded_step, time_in
from .local_error import local_error, rms
from .solve_error import SolveError
from .solve_record import SolveRecord
from .tableau import TSIT5, Tableau

SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0
Norm = Callable[[Tensor, Tensor, Tensor], float]
"""Of error estimate, state before and state behind a step; the step is accepted at 1 or below."""


@register("tool", summary="Adaptive Runge-Kutta solver (Tsit5, Dopri5, Bosh3) in plain torch")
def solve_ode(
    func: Dynamics,
    y0: Tensor,
    times: Sequence[float],
    *,
    tableau: Tableau = TSIT5,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    max_steps: int = 10_000,
    record: SolveRecord | None = None,
    keep_states: bool = False,
    keep_graph: bool = False,
    norm: Norm | None = None,
) -> list[Tensor]:
    """Integrate ``dy/dt = func(t, y)`` by an embedded pair with adaptive steps.

    The first step is Hairer's, and each next one ``0.9 / ratio**(1 / order)`` as long, between 0.2 and 10 times, with
    the ratio of error to tolerance. (A PI controller took one step more of the few that a network's smooth dynamics
    need, and rejected none fewer.) The last step ends exactly at the last time; times in between are interpolated. One
    step size serves the whole batch, whose error is a root mean square.

    With gradients on, the result can be differentiated through the steps; step sizes are constants.

    Args:
        func: ``func(t, y)``.
        y0: State ``[batch, ...]`` at the first time, float32 or float64.
        times: Two or more, strictly increasing or strictly decreasing.
        tableau: A pair with ``dense`` weights whose first stage is the last of the step before.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        max_steps: Accepted and rejected steps at most.
        record: Filled with the steps.
        keep_states: Keep the states at the starts of the steps in the record.
        keep_graph: Keep them with their graph, and the steps.
        norm: In the place of the root mean square.

    Returns:
        The states at all times.

    Raises:
        ValueError: If ``func`` gives another shape than the state's, or the pair is not one for this solver.
        SolveError: With too many steps, a step too small for float64 time, or states that are not finite.

    Cost: ``2 + (stages - 1) * steps`` evaluations, and a read of the error a step, for which a GPU is waited for.
        Without gradients seven states of memory.

    Example:
        >>> y = solve_ode(lambda t, y: -y, torch.ones(1, dtype=torch.float64), [0.0, 0.5, 1.0], rtol=1e-9, atol=1e-9)
        >>> [round(state.item(), 7) for state in y]
        [1.0, 0.6065307, 0.3678794]
    """
    if not tableau.first_same_as_last or not tableau.dense:
        raise ValueError(f"the solver runs tsit5, dopri5 and bosh3, not {tableau.name}")
    check_interval("max_steps", max_steps, 1)
    record = record or SolveRecord(times[0], times[-1])
    norm = norm or (lambda error, y, y1: local_error(error, y, y1, rtol, atol).item())
    begin, end = times[0], times[-1]
    direction = 1.0 if end > begin else -1.0
    t, y = begin, y0
    first = func(time_in(t, y), y)
    if not isinstance(first, Tensor):
        raise ValueError(f"func must give a tensor, got {type(first).__name__}")
    if first.shape != y.shape:
        raise ValueError(f"func gives a derivative of shape {tuple(first.shape)} for a state of {tuple(y.shape)}")
    h = direction * first_step_size(func, t, y, end - begin, tableau, rtol, atol, first=first)
    if not math.isfinite(h):
        raise SolveError.not_finite(record)
    take = embedded_step if torch.is_grad_enabled() else _BufferedStep(tableau, y)
    states, wanted = [y0], collections.deque(times[1:])
    just_rejected = False
    for _ in range(max_steps):
        last = (t + 1.01 * h - end) * direction >= 0  # to end just before the end would leave a tiny step
        h = end - t if last else h
        step = take(func, t, y, h, tableau, first=first)
        ratio = norm(step.error.detach(), y.detach(), step.y1.detach())
        if ratio <= 1.0:
            _keep(record, t, h, y, step, keep_states, keep_graph)
            t1 = end if last else t + h
            while wanted and (wanted[0] - t1) * direction <= 0:
                at = wanted.popleft()
                states.append(step.y1 if at == t1 else interpolate(y, step.stages, h, (at - t) / h, tableau))
            if not wanted:
                return states
            t, y, first = t1, step.y1, step.stages[-1]
            h *= min(1.0, _factor(ratio, tableau.order)) if just_rejected else _factor(ratio, tableau.order)
            just_rejected = False
        else:
            record.rejected += 1
            first = step.stages[0]
            h *= _factor(ratio, tableau.order)
            just_rejected = True
            if abs(h) < 16 * math.ulp(max(abs(t), abs(end))):
                raise SolveError.too_small(record) if math.isfinite(ratio) else SolveError.not_finite(record)
    raise SolveError.too_many(record, max_steps)


@torch.no_grad()
def first_step_size(
    func: Dynamics,
    t: float,
    y: Tensor,
    span: float,
    tableau: Tableau,
    rtol: float,
    atol: float,
    *,
    first: Tensor | None = None,
) -> float:
    """A first step size, positive and within ``span``, from two derivatives (Hairer, Norsett and Wanner, II.4).

    NaN where the state or its derivative is not finite.

    Cost: one evaluation, two without ``first``; the host waits for the device twice.

    Example:
        >>> f"{first_step_size(lambda t, y: -y, 0.0, torch.ones(1), 1.0, TSIT5, 1e-6, 1e-6):.3f}"
        '0.029'
    """
    f0 = func(time_in(t, y), y) if first is None else first
    scale = atol + rtol * y.abs()
    d0, d1 = torch.stack([rms(y / scale), rms(f0 / scale)]).tolist()
    if not math.isfinite(d0 + d1):
        return math.nan
    h0 = 1e-6 if min(d0, d1) < 1e-5 else 0.01 * d0 / d1
    h0 = min(h0, abs(span))
    signed = math.copysign(h0, span)
    d2 = rms((func(time_in(t + signed, y), y + signed * f0) - f0) / scale).item() / h0
    steepest = max(d1, d2)
    h1 = max(1e-6, 1e-3 * h0) if steepest <= 1e-15 else (0.01 / steepest) ** (1 / tableau.order)
    return min(100 * h0, h1, abs(span)) if math.isfinite(d2) else h0


def interpolate(y: Tensor, stages: Sequence[Tensor], h: float, theta: float, tableau: Tableau) -> Tensor:
    """The state at ``t + theta * h`` within a step, to one order less than the step.

    Example:
        >>> y = torch.ones(1, dtype=torch.float64)
        >>> step = embedded_step(lambda t, y: -y, 0.0, y, 0.2)
        >>> f"{interpolate(y, step.stages, 0.2, 0.5, TSIT5).item() - math.exp(-0.1):.0e}"
        '-5e-08'
    """
    weights = [sum(w * theta ** (i + 1) for i, w in enumerate(row)) for row in tableau.dense_floats]
    return combine(y, stages, weights, h)


def _factor(ratio: float, order: int) -> float:
    """By how much the next step is longer or shorter; after an overflow, which has no ratio, as short as may be."""
    if ratio == 0.0:
        return GROW
    return min(GROW, max(SHRINK, SAFETY * ratio ** (-1 / order))) if math.isfinite(ratio) else SHRINK


def _keep(
    record: SolveRecord, t: float, h: float, y: Tensor, step: EmbeddedStep, keep_states: bool, keep_graph: bool
) -> None:
    record.t.append(t)
    record.dt.append(h)
    if keep_states:
        record.states.append(y if keep_graph else y.detach())
        if keep_graph:
            record.steps.append(step)


class _BufferedStep:
    """:func:`embedded_step` without gradients: the stages are rows of one matrix, and a sum of them is one product.

    The stages of a step are overwritten by the next.
    """

    def __init__(self, tableau: Tableau, y: Tensor) -> None:
        self.k = y.new_empty(tableau.stages, y.numel())
        rows = [[*row, *[0.0] * (tableau.stages - len(row))] for row in (*tableau.floats[1], tableau.floats[3])]
        self.weights = y.new_tensor(rows)

    def __call__(
        self, func: Dynamics, t: float, y: Tensor, h: float, tableau: Tableau, *, first: Tensor
    ) -> EmbeddedStep:
        k, flat, weights = self.k, y.reshape(-1), self.weights * h
        k[0] = first.reshape(-1)
        argument, before = y, y
        for i in range(1, len(k)):
            before, argument = argument, torch.addmv(flat, k[:i].t(), weights[i, :i]).view(y.shape)
            k[i] = func(time_in(t + tableau.floats[0][i] * h, y), argument).reshape(-1)
        stages = tuple(row.view(y.shape) for row in k)
        return EmbeddedStep(argument, torch.mv(k.t(), weights[-1]).view(y.shape), stages, before)
