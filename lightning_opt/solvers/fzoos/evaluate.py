"""A value of an objective, which must be a finite number."""

import math
from collections.abc import Callable

from torch import Tensor


class NonFiniteObjectiveError(ValueError):
    """An objective value was NaN or infinite."""


def evaluate(fn: Callable[[Tensor], float | Tensor], x: Tensor, client: str) -> float:
    """``fn(x)``, a float.

    Args:
        fn: The objective.
        x: The point.
        client: What an error calls the one whose objective it is.

    Raises:
        NonFiniteObjectiveError: If it is NaN or infinite.
    """
    value = float(fn(x))
    if not math.isfinite(value):
        raise NonFiniteObjectiveError(f"the objective of {client} is {value}; it must be finite within the bounds")
    return value
