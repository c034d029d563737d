"""When something costly is done again: often at first, then as seldom as a share of the training time allows."""

import math
import statistics
from typing import Any

DENSE = 16  # steps in which it is done at 0, 1, 2, 4, 8 and 16, and timed


class RefreshSchedule:
    """Steps at which to refresh: 0, 1, 2, 4, ... until they are ``interval`` apart, then every ``interval``.

    Args:
        interval: Given, or None to choose it at step 16 from measured times: the smallest with which the refreshes of
            the whole run, the dense ones included, take at most a share of the time of the training steps.
        max_overhead: That share.

    Attributes:
        interval: The one in force; None before step 16.
        next: The next step to refresh at.
    """

    def __init__(self, interval: int | None, max_overhead: float) -> None:
        self.given, self.max_overhead = interval, max_overhead
        self.interval = interval
        self.next = 0
        self.refresh_seconds: list[float] = []
        self.step_seconds: list[float] = []

    @property
    def is_timing(self) -> bool:
        """Whether the interval is still to be chosen."""
        return self.interval is None

    def advance(self, step: int) -> None:
        """Go on behind a refresh at a step."""
        if self.given is not None:
            self.next = step + self.given
        elif self.interval is None:
            self.next = max(1, 2 * step)
        else:
            self.next = step + min(max(1, step), self.interval)

    def chosen(self, total_steps: float) -> int:
        """The interval that the times measured so far ask for.

        Args:
            total_steps: Of the run; infinite if unknown.
        """
        step = statistics.median(self.step_seconds)
        refresh = statistics.median(self.refresh_seconds[1:] or self.refresh_seconds)  # the first warms up
        interval = max(1, math.ceil(refresh / (self.max_overhead * step)))
        if math.isinf(total_steps):
            return interval
        budget = self.max_overhead * total_steps * step / refresh
        while interval < total_steps and refreshes(interval, int(total_steps)) > budget:
            interval = math.ceil(1.05 * interval)
        return interval

    def state_dict(self) -> dict[str, Any]:
        """Tensors and builtins; the measured times under ``wall_time``."""
        times = {"refresh": list(self.refresh_seconds), "step": list(self.step_seconds)}
        return {"interval": self.interval, "next": self.next, "wall_time": times}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was saved; a given interval wins over the saved one."""
        self.interval = state["interval"] if self.given is None else self.given
        self.next = state["next"]
        self.refresh_seconds = list(state["wall_time"]["refresh"])
        self.step_seconds = list(state["wall_time"]["step"])


def refreshes(interval: int, steps: int) -> int:
    """How many there are in a run of so many steps.

    Example:
        >>> refreshes(4, 12)  # at 0, 1, 2, 4, 8
        5
    """
    step = count = 0
    while step < steps:
        count += 1
        step += min(max(1, step), interval)
    return count
