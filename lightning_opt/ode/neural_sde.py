"""A neural stochastic differential equation as a layer that tells what its solver does."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torchsde
from torch import Tensor, nn

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

from ._sde_trace import SDESolveRecord, Trace, TracedNoise, TracedSDE
from .embedded_step import EmbeddedStep
from .neural_ode import check_dynamics
from .sde_step import euler_heun_step, sri_step, step_doubling
from .solve_error import SolveError
from .tableau import Tableau

NoiseType = Literal["diagonal", "additive", "scalar", "general"]
SDEType = Literal["ito", "stratonovich"]
Estimate = Literal["doubling", "embedded"]


@register("module", summary="Neural SDE layer that counts evaluations and remembers its steps", paper="2303.02262")
class NeuralSDE(nn.Module):
    r"""Maps a state at the start of a time span to a solution of :math:`dy = f(t, y)\,dt + g(t, y)\,dW` at its end.

    torchsde solves; after every call :attr:`last_solve` tells the evaluations of drift and diffusion, exactly, forward
    and backward, and the accepted steps. No evaluation is made twice, which torchsde by itself does: an adaptive step
    takes 2 evaluations of drift and diffusion instead of 3 with ``"euler"``, and 11 instead of 30 with ``"srk"``, and
    the result is bit for bit the same.

    In training, every solve has new noise, a function of ``seed``, the process's rank and :attr:`solves`, which a
    checkpoint holds. In evaluation every solve has the same noise. No global random state is read or changed.

    The state at each of ``times`` is that of a step which ends there; torchsde interpolates linearly between steps
    instead, which takes part of the variance away.

    It follows the block protocol of :class:`NeuralODE`. The solve runs in the state's precision, in float32 at least,
    also under autocast.

    Args:
        drift: A module with ``forward(t, y)``: the drift ``[batch, dim]`` at a 0-dim time.
        diffusion: A module with ``forward(t, y)``: ``[batch, dim]`` for diagonal noise, otherwise
            ``[batch, dim, channels]``, with one channel for scalar noise.
        noise_type: ``"diagonal"``: an own Brownian motion for each entry of the state; ``"additive"``: the diffusion
            does not depend on the state; ``"scalar"``: one Brownian motion; ``"general"``.
        sde_type: How the stochastic integral is meant.
        t_span: Start and end; time increases.
        method: A method of torchsde for the ``sde_type``; None takes torchsde's choice: ``"srk"`` for Ito equations
            (``"euler"`` for general noise), ``"midpoint"`` for Stratonovich equations.
        adaptive: Choose the steps by step doubling; otherwise all have the size ``dt``. With ``"euler"`` adaptive steps
            are known to converge for additive noise only.
        dt: Size of the first step, or of all.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        adjoint: Get the gradient from the stochastic adjoint, solved backward along the same path, in constant memory,
            instead of from the steps.
        adjoint_method: A method of torchsde; None takes torchsde's choice.
        estimate: The error of :meth:`step`: ``"doubling"``, which is what torchsde chooses steps by; or
            ``"embedded"``, at a third of the cost, for diagonal noise with ``"srk"`` (:func:`sri_step`) or
            ``"euler_heun"`` (:func:`euler_heun_step`).
        max_steps: Accepted and rejected steps that a solve may take.
        options: Of torchsde's solver.
        seed: Of the noise.

    Attributes:
        keep_graph: Keep the states in :attr:`last_solve` with their graph, for :func:`global_regularization`.
        last_solve: A :class:`SDESolveRecord`. Its states are there in training mode.
        solves: Solves in training so far, a buffer.

    Raises:
        ValueError: If a value is out of its range or ``drift`` or ``diffusion`` does not take ``(t, y)``. When called:
            for a state that is not a floating-point tensor ``[batch, dim]`` of 32 bits or more, for times that are not
            strictly increasing, and with ``adjoint`` for noise that does not answer alike when asked again, or for a
            diagonal diffusion with entries that depend on other entries of the state, where torchsde's adjoint of an
            Ito equation is wrong, and its Stratonovich ``"milstein"``.
        SolveError: When called, if the solve takes more than ``max_steps``, the step becomes too small for the
            precision, or a state is not finite.

    Shape: ``[batch, dim]`` to ``[batch, dim]``; with ``times`` to ``[len(times), batch, dim]``.

    Example:
        >>> class Decay(nn.Module):
        ...     def forward(self, t, y):
        ...         return -y
        >>> class Constant(nn.Module):
        ...     def forward(self, t, y):
        ...         return torch.full_like(y, 0.1)
        >>> block = NeuralSDE(Decay(), Constant(), rtol=1e-3, atol=1e-3).eval()
        >>> y = block(torch.ones(10_000, 1))
        >>> f"{y.mean().item():.2f}", f"{y.std().item():.2f}"  # exp(-1), 0.1 * ((1 - exp(-2)) / 2)**0.5
        ('0.37', '0.07')
        >>> block.last_solve.nfe_forward > block.last_solve.accepted > 1
        True
    """

    estimates: ClassVar[tuple[str, ...]] = ("error",)
    """What can be regularized."""

    def __init__(
        self,
        drift: nn.Module,
        diffusion: nn.Module,
        *,
        noise_type: NoiseType = "diagonal",
        sde_type: SDEType = "ito",
        t_span: Sequence[float] = (0.0, 1.0),
        method: str | None = None,
        adaptive: bool = True,
        dt: float = 0.1,
        rtol: float = 1e-2,
        atol: float = 1e-2,
        adjoint: bool = False,
        adjoint_method: str | None = None,
        estimate: Estimate = "doubling",
        max_steps: int = 10_000,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_dynamics(drift, "drift")
        check_dynamics(diffusion, "diffusion")
        check_choice("noise_type", noise_type, ("diagonal", "additive", "scalar", "general"))
        check_choice("sde_type", sde_type, METHODS)
        if method is None:
            method = "midpoint" if sde_type == "stratonovich" else "euler" if noise_type == "general" else "srk"
        check_choice("method", method, METHODS[sde_type])
        if noise_type == "general" and method in _COMMUTATIVE:
            raise ValueError(f"method={method!r} is not for general noise: take one of {_general(sde_type)}")
        check_interval("dt", dt, 0, closed="()")
        check_interval("rtol", rtol, 0)
        check_interval("atol", atol, 0, closed="()")
        check_interval("max_steps", max_steps, 1)
        check_interval("seed", seed, 0)
        check_choice("estimate", estimate, ("doubling", "embedded"))
        if estimate == "embedded" and not (noise_type == "diagonal" and method in _EMBEDDED):
            raise ValueError(
                f"estimate='embedded' is for diagonal noise with method 'srk' or 'euler_heun', got noise_type="
                f"{noise_type!r}, method={method!r}; 'doubling' is for all"
            )
        t_span = tuple(float(t) for t in t_span)
        if len(t_span) != 2 or not all(map(math.isfinite, t_span)) or not t_span[0] < t_span[1]:
            raise ValueError(f"t_span must be two finite times, the first before the second, got {t_span}: {_FORWARD}")
        if adjoint_method is not None:
            check_choice("adjoint_method", adjoint_method, (*METHODS[sde_type], "adjoint_reversible_heun"))
        self.drift, self.diffusion = drift, diffusion
        self.noise_type, self.sde_type, self.method = noise_type, sde_type, method
        self.t_span: tuple[float, ...] = t_span
        self.adaptive, self.dt, self.rtol, self.atol = adaptive, dt, rtol, atol
        self.adjoint, self.adjoint_method, self.estimate = adjoint, adjoint_method, estimate
        self.max_steps, self.options, self.seed = max_steps, dict(options or {}), seed
        self.keep_graph = False
        self.last_solve: SDESolveRecord | None = None
        self.solves: Tensor
        self.register_buffer("solves", torch.zeros((), dtype=torch.int64))

    @property
    def func(self) -> nn.Module:
        """The drift."""
        return self.drift

    def forward(
        self, y0: Tensor, times: Tensor | Sequence[float] | None = None, noise: torchsde.BaseBrownian | None = None
    ) -> Tensor:
        """The state at the end of ``t_span``, or at each of ``times``, the first of which is where it starts.

        Args:
            y0: State at the start.
            times: Strictly increasing.
            noise: A Brownian motion over the span, ``[batch, channels]``; None for the block's own.
        """
        points = self._points(times)
        if not isinstance(y0, Tensor) or not y0.is_floating_point() or y0.ndim != 2:
            raise ValueError(f"the state must be a floating-point tensor [batch, dim], got {_kind(y0)}")
        if not y0.numel():
            raise ValueError(f"the state must have elements, got {_kind(y0)}")
        with torch.autocast(y0.device.type, enabled=False):
            y0 = y0.float() if y0.dtype in (torch.float16, torch.bfloat16) else y0
            if noise is not None and self.adjoint and torch.is_grad_enabled():
                _check_memory(noise, points)
            self._check_elementwise(y0, points[0])
            states = self._solve(y0, points, noise)
        return states[-1] if times is None else torch.stack(states)

    def step(
        self,
        t: Tensor | float,
        y: Tensor,
        dt: Tensor | float,
        tableau: Tableau | None = None,
        generator: torch.Generator | None = None,
    ) -> EmbeddedStep:
        """One step with its error estimate, outside of a solve and not counted.

        Args:
            t: Time at its start.
            y: State at its start ``[batch, dim]``.
            dt: Its size, positive.
            tableau: Must be None: the pair is that of ``method`` and ``estimate``.
            generator: Where the seed of the Brownian path is drawn from; None makes it of ``seed``, :attr:`solves` and
                the time.

        Raises:
            ValueError: For a tableau.
        """
        if tableau is not None:
            raise ValueError(f"a NeuralSDE takes its error from its own solver, {self.method!r}, not from a tableau")
        with torch.autocast(y.device.type, enabled=False):
            start, end = _times(t, dt, y)
            if generator is None:
                entropy: tuple[int, ...] = (self.seed, 2, int(self.solves), int(start * 2**40) % 2**62)
            else:
                draw = torch.randint(2**62, (), generator=generator, device=generator.device)
                entropy = (self.seed, 3, int(draw))
            sde = TracedSDE(self.drift, self.diffusion, self.noise_type, self.sde_type)
            noise = self._noise(sde, y, start, end, entropy)
            if self.estimate == "embedded" and self.method == "srk":
                return sri_step(self.drift, self.diffusion, t, y, dt, *noise(start, end, return_U=True))
            if self.estimate == "embedded":
                return euler_heun_step(self.drift, self.diffusion, t, y, dt, noise(start, end))
            return step_doubling(sde, t, y, dt, noise, self.method, self.options)

    def first_step_size(self, t: float, y: Tensor, span: float, rtol: float, atol: float) -> float:
        """The step that a solve begins with in ``(t, t + span)``: ``dt``, cut to the span."""
        return min(self.dt, span)

    def extra_repr(self) -> str:
        """For ``repr``."""
        return (
            f"noise_type={self.noise_type!r}, sde_type={self.sde_type!r}, t_span={self.t_span}, method={self.method!r},"
            f" adaptive={self.adaptive}, dt={self.dt}, rtol={self.rtol}, atol={self.atol}, adjoint={self.adjoint}"
        )

    def _solve(self, y0: Tensor, points: list[float], noise: Any) -> list[Tensor]:
        record = self.last_solve = SDESolveRecord(points[0], points[-1])
        grid = torch.tensor(points, dtype=y0.dtype, device=y0.device)
        if not bool((grid.diff() > 0).all()):
            raise ValueError(f"times must differ in the precision of the state, {y0.dtype}, got {points}")
        trace = Trace(
            record,
            adaptive=self.adaptive,
            keep_states=self.training and torch.is_grad_enabled(),
            keep_graph=self.keep_graph and not self.adjoint,
            max_steps=self.max_steps,
            reversible=self.method == "reversible_heun",
        )
        sde = TracedSDE(self.drift, self.diffusion, self.noise_type, self.sde_type, trace)
        if noise is None:
            noise = self._noise(sde, y0, float(grid[0]), float(grid[-1]), self._entropy())
        traced = TracedNoise(noise, trace)
        states, size = [y0], self.dt
        try:
            for start, end in zip(grid[:-1], grid[1:], strict=True):
                trace.segment_end = float(end)
                states.append(self._integrate(sde, states[-1], torch.stack([start, end]), traced, size))
                trace.segment_done()
                if self.adaptive:
                    size = max(record.dt[-2:])  # the last was cut to end here
        except AssertionError as error:  # torchsde's answer to a NaN error estimate
            raise SolveError.not_finite(record) from error
        if not states[-1].isfinite().all():
            raise SolveError.not_finite(record)
        sde.forget()
        trace.forward_done()
        return states

    def _integrate(self, sde: TracedSDE, y: Tensor, span: Tensor, noise: TracedNoise, size: float) -> Tensor:
        length = float(span[1] - span[0])
        size = min(size, length)  # a step that torchsde cuts would not shrink when it is rejected
        parts = round(length / size)
        if self.adaptive and abs(parts * size - length) < 1e-5 * size:
            size *= 1 + 1e-5  # so that rounding leaves no step of 1e-16 for the end
        arguments: dict[str, Any] = {
            "bm": noise,
            "method": self.method,
            "dt": size,
            "adaptive": self.adaptive,
            "rtol": self.rtol,
            "atol": self.atol,
            "dt_min": 0.0,  # below it torchsde accepts any error, with a warning
            "options": self.options,
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*not guaranteed to converge.*Euler--Maruyama")  # said above
            if not self.adjoint:
                return torchsde.sdeint(sde, y, span, **arguments)[-1]
            parameters = [p for part in (self.drift, self.diffusion) for p in part.parameters() if p.requires_grad]
            return torchsde.sdeint_adjoint(
                sde,
                y,
                span,
                **arguments,
                adjoint_params=tuple(dict.fromkeys(parameters)),
                adjoint_method=self.adjoint_method,
                adjoint_adaptive=self.adaptive,
                adjoint_rtol=self.rtol,
                adjoint_atol=self.atol,
            )[-1]

    def _noise(self, sde: TracedSDE, y: Tensor, start: float, end: float, entropy: Any) -> torchsde.BrownianInterval:
        channels = {"diagonal": y.shape[1], "scalar": 1}.get(self.noise_type)
        if channels is None:  # an evaluation that the solve, which starts there, does not repeat
            channels = sde.g(torch.as_tensor(start, dtype=y.dtype, device=y.device), y).shape[-1]
        return torchsde.BrownianInterval(
            start,
            end,
            (len(y), channels),
            dtype=y.dtype,
            device=y.device,
            entropy=entropy,
            levy_area_approximation={"srk": "space-time", "log_ode": "foster"}.get(self.method, "none"),
        )

    def _entropy(self) -> tuple[int, ...]:
        if not self.training:
            return (self.seed, 0)
        spread = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if spread else 0
        self.solves += 1
        return (self.seed, 1, rank, int(self.solves))

    def _points(self, times: Tensor | Sequence[float] | None) -> list[float]:
        if times is None:
            return list(self.t_span)
        if isinstance(times, Tensor) and (times.ndim != 1 or times.requires_grad):
            what = "that requires a gradient, which times have not" if times.requires_grad else "that is not flat"
            raise ValueError(f"times must be constants in one dimension, got a tensor {what}")
        points = [float(t) for t in (times.tolist() if isinstance(times, Tensor) else times)]
        if len(points) < 2 or not all(0 < b - a < math.inf for a, b in zip(points, points[1:], strict=False)):
            raise ValueError(f"times must be two or more, finite and strictly increasing, got {points}: {_FORWARD}")
        return points

    def _check_elementwise(self, y: Tensor, t: float) -> None:
        """Where torchsde relies on it; a vector times the Jacobian of such a function is that times the diagonal."""
        by_adjoint = self.sde_type == "ito" and self.adjoint and torch.is_grad_enabled()
        by_method = self.sde_type == "stratonovich" and self.method == "milstein"
        if self.noise_type != "diagonal" or not (by_adjoint or by_method):
            return
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            g = self.diffusion(torch.as_tensor(t, dtype=y.dtype, device=y.device), y)
            signs = 1.0 - 2.0 * (torch.arange(g.shape[1], device=g.device) % 2)
            diagonal, signed = (
                torch.autograd.grad(g, y, weights.expand_as(g).to(g), retain_graph=True, allow_unused=True)[0]
                for weights in (torch.ones_like(signs), signs)
            )
        if diagonal is not None and not torch.allclose(signed, signs * diagonal, rtol=1e-3, atol=1e-6):
            raise ValueError(
                "entries of the diffusion depend on other entries of the state; with diagonal noise,"
                + (
                    " the stochastic adjoint of an Ito equation is then wrong: take sde_type='stratonovich', or"
                    " adjoint=False"
                    if by_adjoint
                    else " method='milstein' is then wrong: take another, such as 'midpoint'"
                )
            )


#: The methods of torchsde that solve an equation forward.
METHODS: dict[str, tuple[str, ...]] = {
    "ito": ("euler", "milstein", "srk"),
    "stratonovich": ("midpoint", "heun", "euler_heun", "reversible_heun", "log_ode", "milstein"),
}

_COMMUTATIVE = ("milstein", "srk")
_EMBEDDED = ("srk", "euler_heun")
_FORWARD = "noise is drawn forward in time"


def _general(sde_type: str) -> str:
    return ", ".join(repr(method) for method in METHODS[sde_type] if method not in _COMMUTATIVE)


def _check_memory(noise: Any, points: list[float]) -> None:
    if isinstance(noise, (torchsde.BrownianInterval, torchsde.BrownianPath, torchsde.BrownianTree)):
        return  # and a query more would change the path of those to come
    span = points[0], points[-1]
    if not torch.equal(noise(*span), noise(*span)):
        raise ValueError(
            "the stochastic adjoint goes back along the path of the forward solve, and this noise does not answer alike"
            " when asked again: give a torchsde.BrownianInterval, or take adjoint=False"
        )


def _times(t: Tensor | float, dt: Tensor | float, y: Tensor) -> tuple[float, float]:
    """Start and end of a step, rounded as its solver rounds them."""
    start = torch.as_tensor(t, dtype=y.dtype, device=y.device)
    return float(start), float(start + dt)


def _kind(value: Any) -> str:
    return f"one of {value.dtype}, {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"
