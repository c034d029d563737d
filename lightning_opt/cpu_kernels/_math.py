"""What kernels need beside Python's arithmetic, as torch defines it, in a form that LLVM vectorizes.

A bare number in a kernel would turn float32 into float64: write ``number = type(x)`` and ``number(1)``.
"""

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
def clamp(x, limit):
    """The number between -limit and limit that is nearest to x; NaN stays."""
    x = clamp_min(x, -limit)
    return limit if x > limit else x


@register_jitable
def sign(x):
    """-1, 0 or 1; 0 for NaN, as in torch."""
    number = type(x)
    return math.copysign(number(1), x) if x < 0 or x > 0 else number(0)


@register_jitable
def sigmoid(x):
    """``1 / (1 + exp(-x))``."""
    number = type(x)
    return number(1) / (number(1) + times_exp(number(1), -x, number(87)))


@register_jitable
def sinh_cosh(x, limit):
    """``sinh(x)`` and ``cosh(x) - 1`` of x cut to the range from -limit to limit."""
    half, one = type(x)(0.5), type(x)(1)
    e = expm1(abs(x), limit)
    quotient = e / (e + one)
    return math.copysign(half * (e + quotient), x), half * e * quotient


def times_exp(x, y, limit):
    """``x * exp(y)``, with y cut to the range from -limit to limit, in float32 to that from -87 to 87 too.

    Rounded about once: the error of float32 is below 1.1 units in the last place.
    """
    return x * math.exp(clamp(y, limit))


def expm1(y, limit):
    """``exp(y) - 1``, accurate relative to itself, with y cut to the range from -limit to limit (87 in float32)."""
    return math.expm1(clamp(y, limit))


@overload(times_exp, jit_options={"fastmath": {"contract"}})
def _times_exp(x, y, limit):
    def times_exp32(x, y, limit):
        rest, scale = _reduced_exp(y, limit)
        scaled = x * scale
        return scaled + scaled * rest

    return times_exp32 if y == types.float32 else lambda x, y, limit: x * math.exp(clamp(y, limit))


@overload(expm1, jit_options={"fastmath": {"contract"}})
def _expm1(y, limit):
    def expm1_32(y, limit):
        rest, scale = _reduced_exp(y, limit)
        return (scale - _ONE) + scale * rest

    return expm1_32 if y == types.float32 else lambda y, limit: math.expm1(clamp(y, limit))


_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # the first has 10 bits: n times it is exact
_TO_INTEGER = np.float32(1.5 * 2**23 + 127)  # adding it rounds to an integer n and leaves n + 127 in the lowest bits
_C2, _C3, _C4, _C5, _C6 = map(np.float32, (0.4999999341, 0.1666652011, 0.0416683942, 0.0083687804, 0.0013814467))
_ONE, _LARGEST = np.float32(1), np.float32(87)


@register_jitable(fastmath={"contract"})
def _reduced_exp(y, limit):
    """exp(y) as (1 + rest) * scale, with a power of two for scale.

    Arithmetic alone, since the C library's expf would be a call for each element. The polynomial is minimax between
    -log(2) / 2 and log(2) / 2, within 3e-9.
    """
    y = clamp(y, min(limit, _LARGEST))
    shifted = y * _LOG2E + _TO_INTEGER
    n = shifted - _TO_INTEGER
    r = y - n * _LN2_HIGH - n * _LN2_LOW
    rest = r + r * (r * ((((_C6 * r + _C5) * r + _C4) * r + _C3) * r + _C2))
    return rest, np.uint32(np.float32(shifted).view(np.uint32) << 23).view(np.float32)
