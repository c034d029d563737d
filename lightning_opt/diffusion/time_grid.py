from typing import Literal, Protocol

from lightning_opt._checks import check_choice, check_interval

Spacing = Literal["t", "rho", "log"]
SPACINGS = ("t", "rho", "log")


class NoiseInTime(Protocol):
    """What a grid asks of a process: the range of its noise levels, and their times."""

    @property
    def rho_min(self) -> float:
        """Smallest noise level at which the network is called."""

    @property
    def largest_rho(self) -> float:
        """Largest noise level."""

    @property
    def t_end(self) -> float:
        """The time of the largest noise level."""

    def rho(self, t: float, /) -> float:
        """The noise level at a time."""

    def time(self, rho: float, /) -> float:
        """The time of a noise level."""


def noise_levels(process: NoiseInTime, num_steps: int, spacing: Spacing = "t", order: float = 2.0) -> list[float]:
    r"""The noise levels of a schedule, from the largest down to the smallest and then to 0.

    ``num_steps`` levels are where the network is called; the last step leads from the smallest, at which it is still
    trained, to the data.

    ============= ===========================================================================
    spacing       evenly spaced
    ============= ===========================================================================
    ``t``         :math:`t^{1/k}`: uniform in time with order 1, quadratic with order 2
    ``rho``       :math:`\rho^{1/k}`: order 7 is Karras's grid
    ``log``       :math:`\log \rho`
    ============= ===========================================================================

    Args:
        process: The forward process, such as :class:`GeometricBrownianMotion`.
        num_steps: Network calls, 1 or more.
        spacing: One of the above.
        order: :math:`k`, positive; without meaning for ``"log"``.

    Returns:
        ``num_steps + 1`` decreasing numbers.

    Raises:
        ValueError: If the spacing is unknown or a number out of its range.

    Example:
        >>> from lightning_opt.diffusion import GeometricBrownianMotion
        >>> process = GeometricBrownianMotion(sigma=0.8, rho_min=0.1)
        >>> [round(rho, 3) for rho in noise_levels(process, 3, "rho", order=1)]
        [0.8, 0.45, 0.1, 0.0]
    """
    check_choice("timestep_spacing", spacing, SPACINGS)
    check_interval("spacing_order", order, 0, closed="()")
    check_interval("num_inference_steps", num_steps, 1)
    first, last = process.largest_rho, process.rho_min
    shares = [i / (num_steps - 1) for i in range(num_steps)] if num_steps > 1 else [0.0]
    if spacing == "log":
        levels = [first ** (1 - share) * last**share for share in shares]
    elif spacing == "rho":
        levels = [_between(first, last, share, order) for share in shares]
    else:
        start, end = process.t_end, process.time(last)
        levels = [process.rho(_between(start, end, share, order)) for share in shares]
    return [first, *levels[1:], 0.0]


def _between(first: float, last: float, share: float, order: float) -> float:
    return ((1 - share) * first ** (1 / order) + share * last ** (1 / order)) ** order
