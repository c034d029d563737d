"""The pictures of :class:`LanczosLRLearner`: the rate beside the largest stable one, the momentum, the spectrum."""

import functools
from typing import TYPE_CHECKING

from ._report_curves import COLORS
from ._report_history import Curve
from ._report_panel import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = dict[str, tuple[list[float], list[float]]]


def lanczos_panels(curves: dict[str, Curve], spectrum: tuple[list[float], list[float]]) -> list[Panel]:
    """Panels for :class:`RunReport`.

    Args:
        curves: ``lr``, ``limit``, ``momentum``, and ``guards`` where one acted; empty before the first refresh.
        spectrum: Ritz values and their weights at the last refresh.
    """
    if "lr" not in curves:
        return []
    points = {name: curve.points() for name, curve in curves.items()}
    return [
        Panel("Learned rate", functools.partial(_draw_rate, points)),
        Panel("Learned momentum", functools.partial(_draw_momentum, points)),
        Panel("Ritz values at the last refresh", functools.partial(_draw_spectrum, *spectrum)),
    ]


def _draw_rate(points: Points, axes: "Axes") -> None:
    axes.plot(*points["limit"], color=COLORS[1], linewidth=1.2, linestyle="--", label="largest stable")
    axes.plot(*points["lr"], color=COLORS[0], linewidth=1.6, label="learned")
    if "guards" in points:
        axes.plot(*points["guards"], "o", color=COLORS[4], markersize=3.5, label="a guard acted")
    axes.set(xlabel="step", yscale="log")
    axes.legend(frameon=False)


def _draw_momentum(points: Points, axes: "Axes") -> None:
    axes.plot(*points["momentum"], color=COLORS[0], linewidth=1.6)
    axes.set(xlabel="step", ylim=(0, 1))


def _draw_spectrum(values: list[float], weights: list[float], axes: "Axes") -> None:
    axes.stem(values, weights, linefmt=COLORS[0], markerfmt="o", basefmt=" ")
    axes.set(xlabel="Ritz value", ylabel="weight", yscale="log")
