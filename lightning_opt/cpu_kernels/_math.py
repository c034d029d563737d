"""What kernels need beside Python's arithmetic, as torch defines it, in a form that LLVM vectorizes."""

import math

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

@register_jitable
def maximum(a, b):
    """The larger of two numbers, NaN if one is NaN."""
    return a if a > b or a != a else b


@register_jitable
def clamp_min(x, low):
    """The larger of x and a bound; NaN stays."""
    return low if x < low else x


@register_jitable
def clamp(x, low, high):
    """The number between two bounds that is nearest to x; NaN stays."""
    x = clamp_min(x, low)
    return high if x > high else x


@register_jitable
def sign(x):
    """-1, 0 or 1; 0 for NaN, as in torch."""
    number = type(x)  # a bare 1 would turn float32 into float64
    return math.copysign(number(1), x) if x < 0 or x > 0 else number(0)


@register_jitable
def sigmoid(x):
    """``1 / (1 + exp(-x))``."""
    one = type(x)(1)
    return one / (one + exp(-x))


def exp(x):
    """The exponential; in float32 within one unit in the last place, 0 below -87.7 and infinite above 88.3."""
    return math.exp(x)


@overload(exp, jit_options={"fastmath": {"contract"}})
def _exp(x):
    return _exp32 if x == types.float32 else lambda x: math.exp(x)


_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # the first has 10 bits: n times it is exact
_TO_INTEGER = np.float32(1.5 * 2**23 + 127)  # adding it rounds to an integer n and leaves n + 127 in the lowest bits
_SERIES = [np.float32(c) for c in (0.4999999341, 0.1666652011, 0.0416683942, 0.0083687804, 0.0013814467)]
_C2, _C3, _C4, _C5, _C6 = _SERIES  # minimax: 3e-9 relative between -log(2) / 2 and log(2) / 2
_ONE, _LOW, _HIGH = np.float32(1), np.float32(-88), np.float32(89)


def _exp32(x):
    """Arithmetic alone: the C library's expf would be a call for each element."""
    x = clamp(x, _LOW, _HIGH)
    shifted = x * _LOG2E + _TO_INTEGER
    n = shifted - _TO_INTEGER
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    y = ((((_C6 * r + _C5) * r + _C4) * r + _C3) * r + _C2) * r + _ONE
    power = np.uint32(np.float32(shifted).view(np.uint32) << 23).view(np.float32)  # 2^n: n + 127 as the exponent
    return (y * r + _ONE) * power
