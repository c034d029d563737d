"""Solving by torchdiffeq, recorded."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .solve_error import SolveError
from .solve_record import Counted, SolveRecord, kept

if TYPE_CHECKING:
    from .neural_ode import NeuralODE

ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")
METHODS = ADAPTIVE + FIXED


def solve_by_torchdiffeq(
    block: "NeuralODE", y0: Tensor, points: list[float], record: SolveRecord, keeps_states: bool
) -> Tensor:
    """The states at all points, ``[points, *y0.shape]``; fills the record."""
    try:
        from torchdiffeq import odeint, odeint_adjoint
    except ImportError as error:
        raise ImportError("methods of torchdiffeq need it: pip install 'lightning-opt[ode]'") from error
    func = Counted(block.func, record)
    sign = 1.0 if points[-1] > points[0] else -1.0

    def accept(t: Tensor, y: Tensor, dt: Tensor) -> None:
        record.t.append(t.item())
        record.dt.append(sign * dt.item())
        if keeps_states:
            record.states.append(kept(y, block.keep_graph))

    def reject(t: Tensor, y: Tensor, dt: Tensor) -> None:
        record.rejected += 1

    options: dict[str, Any] = dict(block.options)
    if block.method in ADAPTIVE:
        options.setdefault("max_num_steps", block.max_steps)
        func.callback_accept_step, func.callback_reject_step = accept, reject  # type: ignore[assignment]
    else:
        func.callback_step = accept  # type: ignore[assignment]
    solve: Any = odeint_adjoint if block.adjoint else odeint
    times = torch.tensor(points, dtype=torch.float64 if y0.device.type != "mps" else torch.float32, device=y0.device)
    try:
        states = solve(func, y0, times, rtol=block.rtol, atol=block.atol, method=block.method, options=options)
    except AssertionError as error:
        raise SolveError.of(error, record, block.max_steps) from error
    if not bool(states.detach().isfinite().all()):  # fixed steps have no error estimate that would tell
        raise SolveError.not_finite(record)
    func.backward_pass = True
    return states
