"""The pictures of the callbacks for neural differential equations: evaluations and steps over training."""

import functools
from typing import TYPE_CHECKING

from ._report_curves import COLORS
from ._report_history import Curve
from ._report_panel import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = dict[str, tuple[list[float], list[float]]]
TITLES = {
    "Function evaluations of a solve": {"nfe_forward": "forward", "nfe_backward": "backward, of the adjoint"},
    "Steps of a solve": {"accepted": "accepted", "rejected": "rejected"},
}


def solve_panels(curves: dict[str, Curve]) -> list[Panel]:
    """Panels for :class:`RunReport`.

    Args:
        curves: ``nfe_forward``, ``nfe_backward``, ``accepted``, ``rejected``; empty before the first logged step.
    """
    if not curves:
        return []
    points = {name: curve.points() for name, curve in curves.items()}
    return [Panel(title, functools.partial(_draw, points, labels)) for title, labels in TITLES.items()]


def _draw(points: Points, labels: dict[str, str], axes: "Axes") -> None:
    for (name, label), color in zip(labels.items(), COLORS, strict=False):
        if name == "nfe_backward" and not any(points[name][1]):
            continue  # without an adjoint there are none
        axes.plot(*points[name], color=color, linewidth=1.6, drawstyle="steps-post", label=label)
    axes.set(xlabel="step")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
