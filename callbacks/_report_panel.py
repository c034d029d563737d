from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Panel(NamedTuple):
    """One picture of the run report.

    Attributes:
        title: Shown above the picture.
        draw: Draws into a Matplotlib ``Axes``. It is called more than once (for the page and for the PNG), so it
            changes nothing but the axes; it should hold the few numbers that it draws, not the model.

    Example:
        >>> spectrum = Panel("Spectrum", lambda axes: axes.plot([3.0, 1.0, 0.5]))
    """

    title: str
    draw: Callable[["Axes"], object]
