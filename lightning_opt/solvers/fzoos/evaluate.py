"""Values of an objective, which must be finite numbers."""

from collections.abc import Callable

import torch
from torch import Tensor

Objective = Callable[[Tensor], Tensor]  # points [m, d] to values [m]


class NonFiniteObjectiveError(ValueError):
    """An objective value was NaN or infinite."""


def one_by_one(fn: Callable[[Tensor], float | Tensor]) -> Objective:
    """A function of one point ``[d]`` as one of several ``[m, d]``."""
    return lambda points: torch.tensor([float(fn(point)) for point in points], dtype=torch.float64)


def finite(values: Tensor, client: str) -> Tensor:
    """Values in float64 on the CPU, if all are finite.

    Args:
        values: Of any shape.
        client: What an error calls the one whose objective it is.

    Raises:
        NonFiniteObjectiveError: If one is not.
    """
    values = values.detach().to("cpu", torch.float64)
    wrong = values[~values.isfinite()]
    if len(wrong):
        raise NonFiniteObjectiveError(
            f"the objective of {client} is {float(wrong[0])} at {len(wrong)} of {len(values)} points; it must be finite"
        )
    return values
