"""How hard a step is: its scaled local error, and the stiffness that its stages show."""

from typing import Literal

import torch
from torch import Tensor

from lightning_opt._checks import check_choice

from .embedded_step import EmbeddedStep
from .tableau import TSIT5, Tableau

Norm = Literal["batch", "sample"]


def local_error(
    error: Tensor,
    y0: Tensor,
    y1: Tensor,
    rtol: float,
    atol: float,
    norm: Norm = "batch",
) -> Tensor:
    r"""The error estimate in units of the tolerance: a solver accepts the step where it is at most 1.

    It is the root mean square of ``error / (atol + rtol * max(|y0|, |y1|))``.

    Args:
        error: Of :func:`embedded_step`.
        y0: State at the start ``[batch, ...]``.
        y1: State at the end.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        norm: ``"batch"``: over all entries, as a solver with one step size for the batch takes it; ``"sample"``: over
            the entries of each sample.

    Returns:
        A 0-dim tensor, or ``[batch]``. Its gradient is 0 where the error is.

    Example:
        >>> local_error(torch.full((2, 3), 1e-6), torch.zeros(2, 3), torch.zeros(2, 3), rtol=1e-3, atol=1e-6)
        tensor(1.)
    """
    check_choice("norm", norm, ("batch", "sample"))
    scaled = error / (atol + rtol * torch.maximum(y0.abs(), y1.abs()).to(error.dtype))
    return rms(scaled, norm)


def stiffness(step: EmbeddedStep, tableau: Tableau = TSIT5, norm: Norm = "batch") -> Tensor:
    r"""The stiffness that the last two stages show, in steps of the size of the stability region.

    For :math:`y' = \lambda y` it is :math:`|\lambda|` over ``tableau.stability_size``: the estimate
    :math:`\|k_s - k_{s-1}\| / \|y_1 - g_{s-1}\|` of the largest eigenvalue, of Hairer and Wanner (volume II, IV.2),
    where both stages are at the end of the step.

    Args:
        step: Of :func:`embedded_step`.
        tableau: The pair that it was made with.
        norm: As for :func:`local_error`.

    Returns:
        A 0-dim tensor, or ``[batch]``; 0 where both states are the same.

    Raises:
        ValueError: If the last two stages are not both at the end of the step.

    Example:
        >>> from lightning_opt.ode import embedded_step
        >>> step = embedded_step(lambda t, y: -3 * y, 0.0, torch.ones(1, dtype=torch.float64), 0.1)
        >>> round(TSIT5.stability_size * stiffness(step).item(), 9)
        3.0
    """
    check_stiffness(tableau)
    if step.argument is None:
        raise ValueError("this step has no stages, so that its stiffness is not known: take estimate='error'")
    wide = step.error.dtype
    change = rms((step.stages[-1] - step.stages[-2]).to(wide), norm)
    distance = rms((step.y1 - step.argument).to(wide), norm)
    same = distance == 0
    return torch.where(same, 0.0, change / torch.where(same, 1.0, distance)) / tableau.stability_size


def check_stiffness(tableau: Tableau) -> None:
    """Raise ``ValueError`` unless :func:`stiffness` can be told from the stages of a pair."""
    if not (tableau.first_same_as_last and tableau.c[-2] == 1):
        raise ValueError(
            f"the stages of {tableau.name} do not show stiffness: two of them must be at the end of the step, as in"
            " tsit5 and dopri5"
        )


def rms(x: Tensor, norm: Norm = "batch") -> Tensor:
    """Root mean square over all entries, or over those of each sample; its gradient is 0 where it is 0."""
    square = x.square().mean() if norm == "batch" else x.square().reshape(len(x), -1).mean(dim=1)
    tiny = torch.finfo(square.dtype).tiny
    return torch.where(square <= tiny, 0.0, square.clamp_min(tiny).sqrt())  # NaN stays NaN
