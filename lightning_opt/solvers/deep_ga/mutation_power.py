import dataclasses
import math
from collections.abc import Callable
from typing import Literal

from lightning_opt._checks import check_choice, check_interval


@dataclasses.dataclass(frozen=True)
class PowerSchedule:
    """A mutation power that changes from one generation to the next.

    Attributes:
        start: The power in generation 0.
        end: That in generation ``generations`` and after.
        generations: Where ``end`` is reached.
        kind: ``"linear"``, or ``"exponential"``: the same factor every generation.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> power = PowerSchedule(start=0.1, end=0.001, generations=10, kind="exponential")
        >>> round(power(5), 6), power(20)
        (0.01, 0.001)
    """

    start: float
    end: float
    generations: int
    kind: Literal["linear", "exponential"] = "linear"

    def __post_init__(self) -> None:
        check_interval("start", self.start, 0, closed="()")
        check_interval("end", self.end, 0, closed="()")
        check_interval("generations", self.generations, 1)
        check_choice("kind", self.kind, ("linear", "exponential"))

    def __call__(self, generation: int) -> float:
        """The power of a generation."""
        share = min(generation / self.generations, 1.0)
        if share == 1:
            return self.end
        if self.kind == "linear":
            return self.start + share * (self.end - self.start)
        return self.start * math.exp(share * math.log(self.end / self.start))


MutationPower = float | Callable[[int], float]


def power_at(power: MutationPower, generation: int) -> float:
    """The mutation power of a generation, constant or scheduled.

    Raises:
        ValueError: If a schedule gives what is no power.
    """
    value = power(generation) if callable(power) else power
    check_interval("mutation_power", value, 0, closed="()")
    return value
