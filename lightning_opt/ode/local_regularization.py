"""Local regularization: how hard one step is at a random time of the last solve."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

from .embedded_step import EmbeddedStep
from .local_error import Norm, check_stiffness, local_error, stiffness
from .solve_record import SolveRecord
from .tableau import Tableau

Estimate = Literal["error", "stiffness"]
Sampling = Literal["unbiased", "biased"]


class Block(Protocol):
    """What is asked of a layer that solves a differential equation; :class:`NeuralODE` is one."""

    func: Any
    rtol: float
    atol: float
    last_solve: SolveRecord | None

    @property
    def adaptive(self) -> bool:
        """Whether its solver chooses the steps by an error estimate."""

    @property
    def tableau(self) -> Tableau:
        """The pair of its steps, for the stiffness."""

    def step(
        self, t: float, y: Tensor, dt: float, tableau: Tableau | None, generator: torch.Generator | None
    ) -> EmbeddedStep:
        """One step with an error estimate."""

    def first_step_size(self, t: float, y: Tensor, span: float, rtol: float, atol: float) -> float:
        """What its solver would begin with."""


class Place(NamedTuple):
    """Where to look: all constants.

    Attributes:
        t: Time.
        y: State, detached.
        dt: Size of the step, negative where time decreases.
    """

    t: float
    y: Tensor
    dt: float


@register("tool", summary="The local regularizer of neural differential equations, a function", paper="2303.02262")
def local_regularization(
    block: Any,
    *,
    estimate: Estimate = "error",
    sampling: Sampling = "unbiased",
    dt: Literal["accepted", "initial"] | float = "accepted",
    tableau: Tableau | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    norm: Norm = "batch",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The term to add to the training loss, times a coefficient, after the block's forward pass (arXiv:2303.02262).

    It is :func:`local_term` at :func:`sample_place`; call it by hand where you optimize by hand::

        prediction = self.head(self.block(x))
        loss = cross_entropy(prediction, y) + 2.5 * local_regularization(self.block, generator=self.generator)

    Args:
        block: A :class:`NeuralODE`, or another module with its protocol, called in training mode.
        estimate: ``"error"``: local error times step size; ``"stiffness"``.
        sampling: As in :func:`sample_place`.
        dt: As in :func:`sample_place`.
        tableau: As in :func:`local_term`.
        rtol: As in :func:`local_term`.
        atol: As in :func:`local_term`.
        norm: As in :func:`local_term`.
        generator: Where the time is drawn from, on the CPU; None draws from torch's global one.

    Returns:
        A 0-dim tensor whose gradient reaches the parameters of the dynamics only.

    Raises:
        ValueError: If a value is not accepted, or the block has no solve with states to look at.

    Cost: a step of the pair, forward and backward; with unbiased sampling another one forward.

    Example:
        >>> from lightning_opt.ode import NeuralODE
        >>> class Decay(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.rate = nn.Parameter(torch.tensor(3.0))
        ...     def forward(self, t, y):
        ...         return -self.rate * y
        >>> block = NeuralODE(Decay(), rtol=1e-4, atol=1e-4)
        >>> end = block(torch.ones(2, 1))
        >>> term = local_regularization(block, estimate="stiffness", sampling="biased")
        >>> f"{term.item() * block.tableau.stability_size:.3f}"
        '3.000'
    """
    check_estimate(block, estimate, tableau)
    place = sample_place(block, sampling=sampling, dt=dt, generator=generator, rtol=rtol, atol=atol)
    return local_term(
        block, place, estimate=estimate, tableau=tableau, rtol=rtol, atol=atol, norm=norm, generator=generator
    )


@torch.no_grad()
def sample_place(
    block: Any,
    *,
    sampling: Sampling = "unbiased",
    dt: Literal["accepted", "initial"] | float = "accepted",
    draw: float | None = None,
    generator: torch.Generator | None = None,
    rtol: float | None = None,
    atol: float | None = None,
) -> Place:
    """Draw a time of the last solve, with the state there and a step size.

    Args:
        block: As for :func:`local_regularization`.
        sampling: ``"unbiased"``: uniform over the time span, the state from one step behind the accepted start before
            it; ``"biased"``: uniform over the starts of the accepted steps, so more often where steps are short, with
            the state that is already there.
        dt: ``"accepted"``: the step that the solver took there; ``"initial"``: the one that it would begin with there,
            as the authors' code has it, which is so short that the term is next to nothing; or a size. None goes
            beyond the end of the span.
        draw: A number in [0, 1) that decides the place, in the place of a random one.
        generator: As for :func:`local_regularization`.
        rtol: For ``"initial"``; default the block's.
        atol: Likewise.

    Returns:
        Constants.

    Raises:
        ValueError: If a value is not accepted, or the block has no solve with states to look at.
    """
    check_choice("sampling", sampling, ("unbiased", "biased"))
    check_dt(dt)
    record = recorded(block)
    if dt == "accepted":
        check_adaptive(block)
    if draw is None:
        draw = torch.rand((), generator=generator, dtype=torch.float64).item()
    if sampling == "biased":
        index = int(draw * record.accepted)
        t, y = record.t[index], record.states[index]
    else:
        t = record.t0 + draw * (record.t1 - record.t0)
        direction = math.copysign(1.0, record.t1 - record.t0)
        index = max(i for i, start in enumerate(record.t) if i == 0 or (t - start) * direction >= 0)
        start, y = record.t[index], record.states[index].detach()
        with frozen_statistics(block):
            y = block.step(start, y, t - start, None, generator).y1 if t != start else y
    left = record.t1 - t
    if dt == "accepted":
        size = abs(record.dt[index])
    elif dt == "initial":
        with frozen_statistics(block):
            size = block.first_step_size(
                t, y, left, block.rtol if rtol is None else rtol, block.atol if atol is None else atol
            )
    else:
        size = float(dt)
    return Place(t, y.detach(), math.copysign(min(size, abs(left)), left))


def local_term(
    block: Any,
    place: Place,
    *,
    estimate: Estimate = "error",
    tableau: Tableau | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    norm: Norm = "batch",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Local error times step size, or stiffness, of one step from a given place.

    BatchNorm uses the statistics of the step's own states and keeps none of them.

    Args:
        block: As for :func:`local_regularization`.
        place: Of :func:`sample_place`, or your own.
        estimate: ``"error"`` or ``"stiffness"``.
        tableau: The pair; default that of the block.
        rtol: Relative tolerance that the error is measured by; default the block's.
        atol: Absolute tolerance.
        norm: ``"batch"``: of the whole batch; ``"sample"``: the mean over the samples of their own.
        generator: Where a stochastic block draws its noise from.

    Returns:
        A 0-dim tensor.

    Cost: ``tableau.stages`` evaluations, forward and backward.
    """
    rtol, atol = (block.rtol if rtol is None else rtol), (block.atol if atol is None else atol)
    with torch.autocast(place.y.device.type, enabled=False), frozen_statistics(block):
        step = block.step(place.t, place.y, place.dt, tableau, generator)
        if estimate == "error":
            return local_error(step.error, place.y, step.y1, rtol, atol, norm).mean() * abs(place.dt)
        return stiffness(step, tableau or block.tableau, norm).mean()


def check_estimate(block: Any, estimate: str, tableau: Tableau | None = None) -> None:
    """Raise ``ValueError`` unless the block has such an estimate, and dynamics of which a step can be told."""
    check_choice("estimate", estimate, ("error", "stiffness"))
    if estimate not in block.estimates:
        raise ValueError(f"{type(block).__name__} has no estimate {estimate!r}, only {', '.join(block.estimates)}")
    if estimate == "stiffness":
        check_stiffness(tableau or block.tableau)
    for module in block.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(
                f"the dynamics hold {type(module).__name__}(p={module.p}), which draws another mask at every"
                " evaluation, so that they are no differential equation and a step has no error: draw one mask a solve,"
                " or put the dropout outside of the block"
            )


def check_adaptive(block: Any) -> None:
    """Raise ``ValueError`` unless the solver of a block accepts its steps by an error estimate."""
    if not block.adaptive:
        raise ValueError(
            f"the solver takes fixed steps (method {getattr(block, 'method', None)!r}), so that none is accepted by its"
            " error: take an adaptive method such as 'tsit5', or give dt a number"
        )


def check_dt(dt: Any) -> None:
    """Raise ``ValueError`` unless it names or is a step size."""
    if isinstance(dt, str):
        check_choice("dt", dt, ("accepted", "initial"))
    else:
        check_interval("dt", dt, 0, closed="()")


def recorded(block: Any) -> SolveRecord:
    """The last solve of a block.

    Raises:
        ValueError: If there is none, or it kept no states.
    """
    record = block.last_solve
    if record is None or not record.states:
        raise ValueError(
            f"{type(block).__name__} has no solve with states: call it in training mode and with gradients before, and"
            " regularize once a solve"
        )
    return record


@contextlib.contextmanager
def frozen_statistics(block: Any) -> Iterator[None]:
    """Within, normalisation layers that are training use the statistics at hand and keep none."""
    tracking = [m for m in block.modules() if getattr(m, "track_running_stats", False) and m.training]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
