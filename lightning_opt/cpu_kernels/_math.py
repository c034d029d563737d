"""What kernels need beside Python's arithmetic, as torch defines it, in a form that LLVM vectorizes."""

import math

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # the first has 10 bits: n times it is exact
_TO_INTEGER = np.float32(1.5 * 2**23)  # adding and subtracting it rounds to an integer


@register_jitable
def maximum(a, b):
    """The larger of two numbers, NaN if one is NaN."""
    return a if a > b or a != a else b


@register_jitable
def clamp(x, low, high):
    """The number nearest to x between two bounds; NaN stays."""
    x = low if x < low else x
    return high if x > high else x


@register_jitable
def sign(x):
    """-1, 0 or 1; 0 for NaN, as in torch."""
    number = type(x)  # a bare 1 would turn float32 into float64
    return number(1) if x > 0 else number(-1) if x < 0 else number(0)


@register_jitable
def sigmoid(x):
    """``1 / (1 + exp(-x))``."""
    one = type(x)(1)
    return one / (one + exp(-x))


def exp(x):
    """The exponential; in float32 within one unit in the last place."""
    return math.exp(x)


@overload(exp)
def _exp(x):
    return _exp32 if x == types.float32 else lambda x: math.exp(x)


def _exp32(x):
    """Cephes' expf: the C library's is a call for each element."""
    x = clamp(x, np.float32(-104), np.float32(89))  # 0 and inf beyond
    n = x * _LOG2E + _TO_INTEGER - _TO_INTEGER
    r = x - n * _LN2_HIGH - n * _LN2_LOW  # between -log(2) / 2 and log(2) / 2
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * r * r + r + np.float32(1)
    k = np.int32(n)
    return y * _power_of_two(k >> 1) * _power_of_two(k - (k >> 1))  # in two steps: the result may be subnormal


@register_jitable
def _power_of_two(n):
    return np.uint32(np.uint32(n + 127) << 23).view(np.float32)
