"""How far float32 exponentials are from the true ones, in units in the last place, over ranges of all float32."""

import math
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

ExpFunction = Literal["exp2", "exp"]


class ExpErrors(NamedTuple):
    """Errors over some inputs.

    A unit in the last place is that of float32 at the true value, 2^-149 at least. NaN for a number, a number for NaN,
    or infinity where the true value rounds to a number, or the reverse, count as an infinite error.

    Attributes:
        inputs: Their number.
        largest: The largest error, in units in the last place.
        where: An input of that error.
        at_least_one: How many errors are 1 unit or more.
    """

    inputs: int
    largest: float
    where: float
    at_least_one: int

    def joined(self, other: "ExpErrors") -> "ExpErrors":
        """The errors over the inputs of both."""
        worst = self if self.largest >= other.largest else other
        return ExpErrors(self.inputs + other.inputs, worst.largest, worst.where, self.at_least_one + other.at_least_one)


def exp_errors(
    function: ExpFunction, first: int, count: int, *, stride: int = 1, values: Tensor | None = None
) -> ExpErrors:
    """Compare :func:`fast_exp2` or :func:`fast_exp`, as compiled for this CPU, with the C library's double functions.

    Args:
        function: ``"exp2"`` or ``"exp"``.
        first: Bit pattern of the first input, from 0 to 2**32 - 1.
        count: Number of inputs.
        stride: From one bit pattern to the next.
        values: Results to judge in place of ours: float32, one for each input, on the CPU.

    Cost:
        About 10 ns an input on one thread. Releases Python's lock, so that threads may share the work.

    Example:
        >>> errors = exp_errors("exp2", 0, 1000, stride=4_294_967)  # over all of float32
        >>> errors.inputs, errors.largest < 1
        (1000, True)
    """
    given = np.zeros(0, np.float32) if values is None else values.detach().numpy()
    if values is not None and (values.dtype != torch.float32 or values.shape != (count,)):
        raise ValueError(f"values must be {count} numbers of float32, got {values.dtype} of {tuple(values.shape)}")
    largest, where, at_least_one = _checker(function)(given, first, count, stride)
    return ExpErrors(count, largest, where, at_least_one)


@cache
def _checker(function: ExpFunction) -> Any:
    import numba

    from .fast_exp import fast_exp, fast_exp2

    ours = {"exp2": fast_exp2, "exp": fast_exp}[function]
    base = {"exp2": 2.0, "exp": 0.0}[function]
    overflow = float(np.finfo(np.float32).max) + 2.0**103  # half a unit above the largest: rounds to infinity

    @numba.njit(nogil=True)
    def check(given: Any, first: int, count: int, stride: int) -> Any:
        largest, where, at_least_one = -1.0, 0.0, 0
        for i in range(count):
            x = np.uint32(first + i * stride).view(np.float32)
            y = np.float64(given[i]) if given.size else np.float64(ours(x))
            z = np.float64(x)
            true = math.pow(base, z) if base else math.exp(z)
            if true != true or y != y:
                error = 0.0 if true != true and y != y else math.inf
            elif (true >= overflow) != (y == math.inf):
                error = math.inf
            elif y == math.inf:
                error = 0.0
            else:
                exponent = (np.float64(true).view(np.int64) >> 52) - 1023
                error = abs(y - true) * 2.0 ** (23 - (exponent if exponent > -126 else -126))
            if error >= 1.0:
                at_least_one += 1
            if error > largest:
                largest, where = error, z
        return largest, where, at_least_one

    return check
