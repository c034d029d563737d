"""A neural ordinary differential equation as a layer that tells what its solver does."""

import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

from ._adjoint import Problem, solve_with_adjoint
from ._torchdiffeq import ADAPTIVE, METHODS, solve_by_torchdiffeq
from .embedded_step import EmbeddedStep, embedded_step
from .solve_ode import first_step_size, solve_ode
from .solve_record import Counted, SolveRecord
from .tableau import TABLEAUS, TSIT5, Tableau

Solver = Literal["auto", "lightning_opt", "torchdiffeq"]
SHORT = (torch.float16, torch.bfloat16)
OURS = ("tsit5", "dopri5", "bosh3")


@register("module", summary="Neural ODE layer that counts evaluations and remembers its steps", paper="2303.02262")
class NeuralODE(nn.Module):
    """Maps a state at the start of a time span to the solution of ``dy/dt = func(t, y)`` at its end.

    After every call :attr:`last_solve` tells the evaluations, exactly, forward and backward, and the accepted steps.

    The solve runs in the state's precision, in float32 at least, also under autocast: the error estimate of an
    adaptive step is a difference that 16 bits do not resolve. It is not compiled, since its steps depend on the data;
    compile ``func``.

    **Block protocol.** What :class:`lightning_opt.callbacks.LocalODERegularization` asks of a block, this one, a
    ``NeuralSDE`` or your own module: ``func``, ``rtol``, ``atol``, :attr:`last_solve` (a :class:`SolveRecord` whose
    states are there in training mode), :attr:`adaptive`, :attr:`estimates`, :meth:`step`, :meth:`first_step_size`.

    Args:
        func: A module with ``forward(t, y)``: the derivative of the state ``[batch, ...]`` at a 0-dim time.
        t_span: Start and end; decreasing times integrate backward in time.
        method: ``"tsit5"``, ``"dopri5"`` or ``"bosh3"`` of our own solver, or any of torchdiffeq.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        adjoint: Get the gradient from the adjoint equation, solved backward with the same method and tolerances, in
            constant memory, instead of from the steps.
        max_steps: Accepted and rejected steps that a solve may take.
        solver: Whose implementation; ``"auto"`` takes our own where it has the method, which is several times faster
            (``benchmarks/ode_solver.py``), else torchdiffeq's.
        options: Of torchdiffeq's solver, such as ``{"step_size": 0.1}``.

    Attributes:
        end_shift: In training the last time is later by this; :class:`lightning_opt.callbacks.STEER` sets it.
        keep_graph: Keep in :attr:`last_solve` states and steps with their graph, for :func:`global_regularization`.

    Raises:
        ValueError: If a value is out of its range or ``func`` does not take ``(t, y)``. When called: for a state that
            is not one floating-point tensor with elements, or times that are not finite and strictly monotone, or
            require a gradient.
        SolveError: When called, if the solve takes more than ``max_steps``, the step becomes too small for the
            precision, or a state is not finite.

    Shape: ``[batch, ...]`` to ``[batch, ...]``; with ``times`` to ``[len(times), batch, ...]``.

    Example:
        >>> class Decay(nn.Module):
        ...     def forward(self, t, y):
        ...         return -y
        >>> block = NeuralODE(Decay(), rtol=1e-6, atol=1e-6).eval()
        >>> f"{block(torch.ones(1, 1)).item():.4f}"
        '0.3679'
        >>> block.last_solve.nfe_forward == 2 + 6 * (block.last_solve.accepted + block.last_solve.rejected)
        True
    """

    estimates: ClassVar[tuple[str, ...]] = ("error", "stiffness")
    """What can be regularized."""

    def __init__(
        self,
        func: nn.Module,
        *,
        t_span: Sequence[float] = (0.0, 1.0),
        method: str = "tsit5",
        rtol: float = 1e-6,
        atol: float = 1e-6,
        adjoint: bool = False,
        max_steps: int = 10_000,
        solver: Solver = "auto",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_dynamics(func)
        check_interval("rtol", rtol, 0)
        check_interval("atol", atol, 0, closed="()")
        check_interval("max_steps", max_steps, 1)
        check_choice("solver", solver, ("auto", "lightning_opt", "torchdiffeq"))
        known = {"auto": dict.fromkeys((*OURS, *METHODS)), "lightning_opt": OURS, "torchdiffeq": METHODS}
        check_choice("method", method, known[solver])
        if solver == "auto":
            solver = "lightning_opt" if method in OURS else "torchdiffeq"
        if solver == "lightning_opt" and options:
            raise ValueError(f"options are for torchdiffeq's solver, and {method} is run by our own, got {options}")
        t_span = tuple(float(t) for t in t_span)
        if len(t_span) != 2 or not all(map(math.isfinite, t_span)) or t_span[0] == t_span[1]:
            raise ValueError(f"t_span must be two different finite times, got {t_span}")
        self.func = func
        self.t_span: tuple[float, ...] = t_span
        self.method, self.rtol, self.atol, self.adjoint = method, rtol, atol, adjoint
        self.max_steps, self.solver, self.options = max_steps, solver, dict(options or {})
        self.end_shift = 0.0
        self.keep_graph = False
        self.last_solve: SolveRecord | None = None

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its steps by an error estimate."""
        return self.method in (*OURS, *ADAPTIVE)

    @property
    def tableau(self) -> Tableau:
        """The pair that the solver runs; that of Tsitouras where it is none of ours."""
        return TABLEAUS.get(self.method, TSIT5)

    @torch.compiler.disable(recursive=True)
    def forward(self, y0: Tensor, times: Tensor | Sequence[float] | None = None) -> Tensor:
        """The state at the end of ``t_span``, or at each of ``times``, the first of which is where it starts."""
        points = self._points(times)
        if not isinstance(y0, Tensor) or not y0.is_floating_point():
            raise ValueError(f"the state must be one floating-point tensor, got {_kind(y0)}")
        if not y0.numel():
            raise ValueError(f"the state must have elements, got one of shape {tuple(y0.shape)}")
        if any(p.dtype in SHORT for p in self.func.parameters()):
            raise ValueError("the dynamics have parameters of 16 bits, too few for an error estimate; keep them in 32")
        with torch.autocast(y0.device.type, enabled=False):
            y0 = y0.float() if y0.dtype in SHORT else y0
            keeps = self.training and torch.is_grad_enabled()
            record = SolveRecord(points[0], points[-1])
            self.last_solve = record
            solve = self._solve if self.solver == "lightning_opt" else self._solve_by_torchdiffeq
            states = solve(y0, points, record, keeps)
        return states[-1] if times is None else torch.stack(states)

    def step(
        self,
        t: Tensor | float,
        y: Tensor,
        dt: Tensor | float,
        tableau: Tableau | None = None,
        generator: torch.Generator | None = None,
    ) -> EmbeddedStep:
        """One step of the dynamics, outside of a solve and not counted; see :func:`embedded_step`.

        Args:
            t: Time at its start.
            y: State at its start.
            dt: Its size.
            tableau: The pair; default that of the method.
            generator: Where a block draws noise from; there is none here.
        """
        with torch.autocast(y.device.type, enabled=False):
            return embedded_step(self.func, t, y, dt, tableau or self.tableau)

    def first_step_size(self, t: float, y: Tensor, span: float, rtol: float, atol: float) -> float:
        """The step that a solver would begin with in ``(t, t + span)``; see :func:`first_step_size`."""
        with torch.autocast(y.device.type, enabled=False):
            return first_step_size(self.func, t, y, span, self.tableau, rtol, atol)

    def extra_repr(self) -> str:
        """For ``repr``."""
        return (
            f"t_span={self.t_span}, method={self.method!r}, solver={self.solver!r}, rtol={self.rtol},"
            f" atol={self.atol}, adjoint={self.adjoint}"
        )

    def _solve(self, y0: Tensor, points: list[float], record: SolveRecord, keeps: bool) -> list[Tensor]:
        func = Counted(self.func, record)
        common: dict[str, Any] = {"tableau": self.tableau, "rtol": self.rtol, "atol": self.atol}
        common["max_steps"] = self.max_steps
        if self.adjoint and torch.is_grad_enabled():
            states = solve_with_adjoint(Problem(func, points, **common), y0, keep_states=keeps)
        else:
            states = solve_ode(
                func, y0, points, **common, record=record, keep_states=keeps, keep_graph=keeps and self.keep_graph
            )
        func.backward_pass = True
        return states

    def _solve_by_torchdiffeq(self, y0: Tensor, points: list[float], record: SolveRecord, keeps: bool) -> list[Tensor]:
        return list(solve_by_torchdiffeq(self, y0, points, record, keeps))

    def _points(self, times: Tensor | Sequence[float] | None) -> list[float]:
        if isinstance(times, Tensor) and (times.ndim != 1 or times.requires_grad):
            what = "that requires a gradient, which times have not" if times.requires_grad else "that is not flat"
            raise ValueError(f"times must be constants in one dimension, got a tensor {what}")
        given = self.t_span if times is None else times.tolist() if isinstance(times, Tensor) else times
        points = [float(t) for t in given]
        if self.training:
            points[-1:] = [t + self.end_shift for t in points[-1:]]
        steps = [b - a for a, b in itertools.pairwise(points)]
        if not steps or not (all(s > 0 for s in steps) or all(s < 0 for s in steps)) or math.isinf(sum(steps)):
            raise ValueError(
                f"times must be two or more, strictly increasing or strictly decreasing, and finite, got {points}"
            )
        return points


def check_dynamics(func: Any, name: str = "func") -> None:
    """Raise ``ValueError`` unless ``func`` is a module whose ``forward`` takes time and state."""
    if not isinstance(func, nn.Module):
        raise ValueError(f"{name} must be a torch.nn.Module with forward(t, y), got {_kind(func)}")
    try:
        inspect.signature(func.forward).bind(None, None)
    except TypeError:
        raise ValueError(
            f"{name} must take time and state, forward(t, y), and {type(func).__name__}.forward takes"
            f" {inspect.signature(func.forward)}; if it does not depend on time, let it take t and ignore it"
        ) from None


def _kind(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"{type(value).__name__}"
