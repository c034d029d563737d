import math
from typing import Any

import torch

MAX_POINTS = 4096


class Curve:
    """One quantity over steps, in bounded memory.

    Every point is kept until there are :data:`MAX_POINTS`; from then on each kept point is the mean of ``stride``
    consecutive ones, and ``stride`` doubles whenever the curve is full again. The last, lowest and highest values stay
    exact.
    """

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.values: list[float] = []
        self.stride = 1
        self.recent: list[tuple[float, float]] = []  # the points of the mean under way, at least the last one
        self.low: tuple[float, float] | None = None  # (step, value), the points before the last one
        self.high: tuple[float, float] | None = None

    def add(self, step: int, value: float) -> None:
        """Append a point; one at the step of the last point replaces it."""
        if self.recent and self.recent[-1][0] == step:
            self.recent.pop()
        elif self.recent:
            self.low, self.high = self.lowest, self.highest
        if len(self.recent) == self.stride:
            self._keep(*_mean(self.recent))
            self.recent = []
        self.recent.append((float(step), value))

    @property
    def last(self) -> tuple[float, float]:
        """Step and value of the newest point."""
        return self.recent[-1]

    @property
    def lowest(self) -> tuple[float, float] | None:
        """Step and value of the lowest finite point, the first of equals."""
        return _better(self.low, self.last, lambda new, old: new < old)

    @property
    def highest(self) -> tuple[float, float] | None:
        """Step and value of the highest finite point, the first of equals."""
        return _better(self.high, self.last, lambda new, old: new > old)

    def points(self) -> tuple[list[float], list[float]]:
        """Steps and values to draw; a mean over a value that is not finite is not finite either."""
        step, value = _mean(self.recent)
        return [*self.steps, step], [*self.values, value]

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": torch.tensor(self.steps, dtype=torch.float64),
            "values": torch.tensor(self.values, dtype=torch.float64),
            "stride": self.stride,
            "recent": list(self.recent),
            "low": self.low,
            "high": self.high,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Curve":
        curve = cls()
        curve.steps, curve.values = state["steps"].tolist(), state["values"].tolist()
        curve.stride, curve.recent = state["stride"], list(state["recent"])
        curve.low, curve.high = state["low"], state["high"]
        return curve

    def _keep(self, step: float, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)
        if len(self.steps) == MAX_POINTS:
            pairs = range(0, MAX_POINTS, 2)
            self.steps = [(self.steps[i] + self.steps[i + 1]) / 2 for i in pairs]
            self.values = [(self.values[i] + self.values[i + 1]) / 2 for i in pairs]
            self.stride *= 2


def _mean(points: list[tuple[float, float]]) -> tuple[float, float]:
    return sum(step for step, _ in points) / len(points), sum(value for _, value in points) / len(points)


def _better(old: tuple[float, float] | None, new: tuple[float, float], is_better: Any) -> tuple[float, float] | None:
    if not math.isfinite(new[1]) or (old is not None and not is_better(new[1], old[1])):
        return old
    return new
