"""The step sizes that theory allows."""

import math
from collections.abc import Sequence
from typing import Literal

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register


@register("tool", summary="The largest step of EF21 that theory allows", paper="2402.10774")
def ef21_stepsize(L: float, L_i: Sequence[float], alpha: float, analysis: Literal["am", "qm"] = "am") -> float:
    r"""The step :math:`1 / (L + \bar L\, \xi(\alpha))` with which EF21 converges.

    Args:
        L: Smoothness of the mean of the ranks' losses.
        L_i: Smoothness of each rank's loss.
        alpha: The contraction of the compressor, k/d for TopK.
        analysis: ``"am"`` takes the arithmetic mean of the ``L_i`` (arXiv:2402.10774, theorem 1: EF21 and EF21-W),
            ``"qm"`` their quadratic mean, as the first analysis did.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> round(ef21_stepsize(17.166, [34.5] * 3, 1 / 3), 5)
        0.00586
        >>> ef21_stepsize(1.0, [1.0, 7.0], 0.1) > ef21_stepsize(1.0, [1.0, 7.0], 0.1, "qm")
        True
    """
    check_interval("L", L, 0, closed="()")
    if not L_i:
        raise ValueError("L_i must have a value for each rank, got none")
    for value in L_i:
        check_interval("L_i", value, 0)
    check_choice("analysis", analysis, ["am", "qm"])
    mean = sum(L_i) / len(L_i) if analysis == "am" else math.sqrt(sum(x * x for x in L_i) / len(L_i))
    return 1 / (L + mean * xi(alpha))


@register("tool", summary="The factor by which compression shortens the step of EF21", paper="2402.10774")
def xi(alpha: float) -> float:
    r""":math:`\xi(\alpha) = \frac{1 + \sqrt{1 - \alpha}}{\alpha} - 1`, the price of a contraction alpha: 0 for 1.

    Raises:
        ValueError: If ``alpha`` is not in (0, 1].

    Example:
        >>> xi(1.0), round(xi(1 / 3), 4)
        (0.0, 4.4495)
    """
    check_interval("alpha", alpha, 0, 1, closed="(]")
    return (1 + math.sqrt(1 - alpha)) / alpha - 1
