"""What kernels need beside the arithmetic of Python, written so that LLVM vectorizes it.

The C library's ``exp`` is called one element at a time; the one here is arithmetic on bits.
"""

import math

import numpy as np
from numba import njit, types
from numba.extending import overload, register_jitable

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # the first has 10 bits: exact times n
_TO_INTEGER = np.float32(1.5 * 2**23)  # adding it rounds to an integer and leaves that in the lowest bits
_ONE = np.float32(1)


def exp(x):
    """The exponential of a float32 (within 1 unit in the last place) or float64."""
    return math.exp(x)


@overload(exp)
def _exp(x):
    return _exp32 if x == types.float32 else lambda x: math.exp(x)


def _exp32(x):
    x = min(max(x, np.float32(-104)), np.float32(89))  # 0 and inf beyond;
    shifted = x * _LOG2E + _TO_INTEGER
    n = shifted - _TO_INTEGER
    r = x - n * _LN2_HIGH - n * _LN2_LOW  # in [-ln(2)/2, ln(2)/2]
    # minimax polynomial of degree 5 for (exp(r) - 1 - r) / r^2 (Cephes)
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * r * r + r + _ONE
    n = np.int32(n)
    return y * _power_of_two(n >> 1) * _power_of_two(n - (n >> 1))


@register_jitable
def _power_of_two(n):
    return np.uint32(np.uint32(n + 127) << 23).view(np.float32)
