"""The batch size over samples: its curves, and the picture for the run report."""

import functools
import math
from typing import TYPE_CHECKING, Any

from ._report_history import Curve
from ._report_panel import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class BatchCurves:
    """What was used, and what tests asked for."""

    def __init__(self) -> None:
        self._curves = {"batch": Curve(), "requested": Curve()}

    def add(self, samples: int, batch: int, next_batch: int, requested: float | None) -> None:
        """Behind a step.

        Args:
            samples: Processed so far.
            batch: That of the step.
            next_batch: That of the next one.
            requested: What a test of the step asked for, if there was one.
        """
        if not self._curves["batch"].recent:
            self._curves["batch"].add(0, batch)
        if requested is not None and math.isfinite(requested):
            self._curves["requested"].add(samples, requested)
        self._curves["batch"].add(samples, next_batch)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and builtins."""
        return {name: curve.state_dict() for name, curve in self._curves.items() if curve.recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        for name, curve in state.items():
            self._curves[name] = Curve.from_state_dict(curve)

    def panels(self) -> list[Panel]:
        """The picture, where there is anything to draw."""
        points = {name: curve.points() for name, curve in self._curves.items() if curve.recent}
        return [Panel("Batch size over samples", functools.partial(_draw, points))] if points else []


def _draw(points: dict[str, tuple[list[float], list[float]]], axes: "Axes") -> None:
    if "requested" in points:
        axes.plot(*points["requested"], ".", markersize=3, color="#98a1ae", label="requested by a test")
    axes.plot(*points["batch"], drawstyle="steps-post", color="#4269d0", label="used")
    axes.set_yscale("log", base=2)
    axes.set_xlabel("samples")
    axes.set_ylabel("samples a step")
    axes.legend()
