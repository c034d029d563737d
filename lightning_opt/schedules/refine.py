"""Schedules refined from the gradient norms of an earlier run (Defazio et al., 2023, arXiv:2310.07831)."""

import math
import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

from ._base import check_steps
from .refined import resample

NUMERIC_LIMIT = 5000  # steps up to which the bound is minimised numerically
CLAMPED_LIMIT = 0.01  # share of clamped norms above which a warning is given


class SmoothNorms(NamedTuple):
    """Gradient norms as the refinement uses them.

    Attributes:
        norms: Median-filtered and clamped from below, float64.
        clamped: Share of them that the floor has raised.
    """

    norms: Tensor
    clamped: float


@register(
    "tool",
    summary="The schedule that the gradient norms of an earlier run ask for",
    paper="2310.07831",
    card="lr-refinement",
)
def refine_schedule(
    norms: Tensor,
    method: Literal["sgd", "adam", "numeric"] = "sgd",
    tau: float = 0.1,
    floor: float = 1e-3,
    total_steps: int | None = None,
) -> Tensor:
    r"""The learning-rate schedule that minimises the last iterate's bound for the norms of an earlier run.

    With the smoothed norms :math:`G_t` of :func:`smooth_norms`, weights :math:`w_t = G_t^{-2}` for SGD or
    :math:`G_t^{-1}` for Adam (arXiv:2310.07831, algorithms 1 and 2), the schedule is

    .. math:: \gamma_t \propto w_t \sum_{p > t} w_p ,

    divided by its maximum; its last value is exactly 0. Constant norms give linear decay. ``"numeric"`` minimises
    :func:`last_iterate_bound` over all schedules instead, to the accuracy of 500
    iterations of L-BFGS; its last value is small and not 0.

    Args:
        norms: One norm an optimizer step of a complete run, in order: of all gradients together, before clipping and
            without weight decay; 2-norms for ``"sgd"`` and ``"numeric"``, 1-norms for ``"adam"``. Infinite ones, such
            as of overflown half precision, are dropped.
        method: What the run was, and the next will be, trained with.
        tau: Width of the median filter as a share of the run, in (0, 0.5].
        floor: Smoothed norms below this share of their median are raised to it; in [0, 1].
        total_steps: Length of the result; by default that of ``norms``.

    Returns:
        The schedule in [0, 1], float64, for :class:`RefinedLR`.

    Raises:
        ValueError: If the norms are not a vector, are negative, NaN, all zero, or too few for the filter
            (``tau * len(norms) < 3``); for ``"numeric"``, more than 5000; or an argument is out of range.

    Warns:
        UserWarning: If the floor raises more than 1% of the norms: they have vanished, as on separable data, and the
            end of the schedule is decided by the floor.

    Cost:
        O(T log T); ``"numeric"`` at most 1000 evaluations of the bound, O(T) each: seconds.

    Example:
        >>> refine_schedule(torch.full((30,), 2.0))[[0, 10, 20, 29]]
        tensor([1.0000, 0.6552, 0.3103, 0.0000], dtype=torch.float64)
    """
    check_choice("method", method, ["sgd", "adam", "numeric"])
    smooth, clamped = smooth_norms(norms, tau, floor)
    if clamped > CLAMPED_LIMIT:
        warnings.warn(
            f"{clamped:.0%} of the smoothed gradient norms are below floor={floor} of their median and were raised to"
            " it: they vanish, and the floor decides that part of the schedule",
            stacklevel=2,
        )
    if method == "numeric":
        schedule = _minimise_bound(smooth)
    else:
        weights = (smooth / smooth.mean()) ** (-2 if method == "sgd" else -1)
        schedule = weights * tail_sums(weights)
    schedule = schedule / schedule.max()
    length = len(norms) if total_steps is None else check_steps("total_steps", total_steps, 2)
    return schedule if length == len(schedule) else resample(schedule, length)


def smooth_norms(norms: Tensor, tau: float = 0.1, floor: float = 1e-3) -> SmoothNorms:
    r"""Gradient norms through the paper's median filter, clamped from below.

    The filter is :math:`2 \lfloor \lfloor \tau T \rfloor / 2 \rfloor + 1` wide. Only the end is extended, by
    reflection; at the beginning the first norm is repeated.

    Args:
        norms: As for :func:`refine_schedule`.
        tau: Width of the filter as a share of the run, in (0, 0.5].
        floor: Share of the median of the positive norms that they are raised to, in [0, 1].

    Returns:
        The norms and the share that was raised.

    Raises:
        ValueError: As :func:`refine_schedule`.
    """
    import numpy as np
    from scipy.ndimage import median_filter

    check_interval("tau", tau, 0.0, 0.5, closed="(]")
    check_interval("floor", floor, 0.0, 1.0)
    norms = torch.as_tensor(norms).detach().to("cpu", torch.float64)
    if norms.ndim != 1 or len(norms) == 0:
        raise ValueError(f"norms must be a vector with one norm a step, got shape {tuple(norms.shape)}")
    if norms.isnan().any():
        first = int(norms.isnan().nonzero()[0])
        raise ValueError(f"norms must be numbers, got NaN at step {first}: the run has diverged")
    if (norms < 0).any():
        raise ValueError(f"norms must be >= 0, got {norms.min().item()}")
    norms = norms[norms.isfinite()]
    if not norms.any():
        raise ValueError("norms must not all be zero")
    if tau * len(norms) < 3:
        raise ValueError(
            f"tau * len(norms) must be at least 3, got {tau} * {len(norms)}: too few steps to smooth; raise tau or"
            " record a longer run"
        )
    width = 2 * (math.floor(tau * len(norms)) // 2) + 1
    padded = np.pad(norms.numpy(), (0, 2 * width), mode="reflect")
    smooth = torch.from_numpy(median_filter(padded, size=width, mode="nearest")[: len(norms)])
    if not smooth.any():
        raise ValueError("norms must not be zero in most of every window of the median filter")
    low = floor * smooth[smooth > 0].median()
    if low == 0 and not smooth.all():
        raise ValueError("floor must be > 0 where smoothed norms are zero, got 0")
    return SmoothNorms(smooth.clamp_min(low), (smooth < low).double().mean().item())


def last_iterate_bound(norms: Tensor, schedule: Tensor, distance: float | Tensor) -> Tensor:
    r"""An upper bound of :math:`f(x_T) - f^*` for a convex f and steps :math:`x_{t+1} = x_t - \gamma_t g_t`.

    .. math::
        \frac{D^2}{2 S} + \frac{1}{2 S} \sum_t \gamma_t^2 G_t^2 + \frac12 \sum_{k < T} \gamma_k
        \frac{\sum_{t \ge k} \gamma_t^2 G_t^2}{\gamma_{k+1:T}\, \gamma_{k:T}}, \qquad S = \gamma_{1:T}

    (arXiv:2310.07831). It holds for the expectation where :math:`G_t^2` is that of the squared norm.

    Args:
        norms: :math:`G_t`, shape (T,).
        schedule: :math:`\gamma_t > 0`, shape (T,); absolute learning rates.
        distance: :math:`D = \lVert x_1 - x^* \rVert`.

    Returns:
        A 0-dim tensor, differentiable in ``schedule``.

    Example:
        >>> T = 100
        >>> rates = torch.linspace(1, 0, T + 1, dtype=torch.float64)[:-1] / T**0.5
        >>> bound = last_iterate_bound(torch.ones(T), rates, 1.0)
        >>> f"{bound * T**0.5:.2f} / sqrt(T)"
        '2.04 / sqrt(T)'
    """
    squares = (schedule * norms) ** 2
    from_here = squares.flip(0).cumsum(0).flip(0)
    left = schedule.flip(0).cumsum(0).flip(0)  # of this step and all later ones
    final = (schedule[:-1] * from_here[:-1] / (left[1:] * left[:-1])).sum()
    return (distance**2 + squares.sum()) / (2 * left[0]) + final / 2


def tail_sums(weights: Tensor) -> Tensor:
    """For each entry the sum of all later ones; exactly 0 for the last."""
    from_here = weights.flip(0).cumsum(0).flip(0)
    return torch.cat([from_here[1:], from_here.new_zeros(1)])


def _minimise_bound(norms: Tensor) -> Tensor:
    """The schedule of the smallest bound. It scales with the distance, so its shape depends on the norms alone."""
    import numpy as np
    from scipy.optimize import minimize

    steps = len(norms)
    if steps > NUMERIC_LIMIT:
        raise ValueError(
            f"method='numeric' takes at most {NUMERIC_LIMIT} norms, got {steps}: use method='sgd', or thin them out"
        )
    unit = norms / norms.mean()
    distance = steps**0.5  # so that the rates are of size 1

    def bound(rates: np.ndarray) -> tuple[float, np.ndarray]:
        schedule = torch.tensor(rates, dtype=torch.float64, requires_grad=True)
        value = last_iterate_bound(unit, schedule, distance)
        (gradient,) = torch.autograd.grad(value, schedule)
        return value.item(), gradient.numpy()

    weights = unit**-2
    start = weights * (tail_sums(weights) + weights / 2) / weights.sum() * distance / weights.sum().sqrt()
    found = minimize(
        bound,
        start.numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=[(1e-8, None)] * steps,
        options={"maxcor": 20, "gtol": 1e-10, "ftol": 1e-15, "maxiter": 500, "maxfun": 1000},
    )
    return torch.from_numpy(found.x)
