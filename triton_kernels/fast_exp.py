"""exp2 and exp of float32 as polynomials, for use inside Triton kernels; :mod:`lightning_opt.fast_exp` says how exact.

The interpreter rounds an fma twice: there errors reach 1.1 units in the last place.
"""

import triton
import triton.language as tl

from lightning_opt.fast_exp import EXP2_COEFFICIENTS, EXP2_RANGE, EXP_COEFFICIENTS, EXP_RANGE, LN2_HIGH, LN2_LOW, LOG2E

_TO_INTEGER = tl.constexpr(1.5 * 2**23)  # adding it rounds to an integer
_LOG2E, _LN2_HIGH, _LN2_LOW = tl.constexpr(LOG2E), tl.constexpr(-LN2_HIGH), tl.constexpr(-LN2_LOW)
_EXP2_LOW, _EXP2_HIGH = tl.constexpr(EXP2_RANGE[0]), tl.constexpr(EXP2_RANGE[1])
_EXP_LOW, _EXP_HIGH = tl.constexpr(EXP_RANGE[0]), tl.constexpr(EXP_RANGE[1])
_A1, _A2, _A3, _A4, _A5, _A6 = map(tl.constexpr, EXP2_COEFFICIENTS)
_B1, _B2, _B3, _B4 = map(tl.constexpr, EXP_COEFFICIENTS)


@triton.jit
def fast_exp2(x):
    """2 to the power of x, a block of float32."""
    x = tl.where(x < _EXP2_LOW, _EXP2_LOW, tl.where(x > _EXP2_HIGH, _EXP2_HIGH, x))
    n = (x + _TO_INTEGER) - _TO_INTEGER
    r = x - n
    t = tl.fma(r, _A1, _A2)
    t = tl.fma(t, t, _A3)
    t = tl.fma(t, tl.fma(t, r, _A4), _A5)
    return _scale(tl.fma(tl.fma(t, r, _A6), r, 1.0), n)


@triton.jit
def fast_exp(x):
    """The exponential of x, a block of float32."""
    x = tl.where(x < _EXP_LOW, _EXP_LOW, tl.where(x > _EXP_HIGH, _EXP_HIGH, x))
    n = tl.fma(x, _LOG2E, _TO_INTEGER) - _TO_INTEGER
    r = tl.fma(n, _LN2_LOW, tl.fma(n, _LN2_HIGH, x))
    t = tl.fma(r, _B1, _B2)
    t = tl.fma(t, t, _B3)
    t = t * tl.fma(r, _B4, t)
    return _scale(tl.fma(tl.fma(t, r, 1.0), r, 1.0), n)


@triton.jit
def _scale(p, n):
    """The product p * 2^n in two factors that float32 has, so that a subnormal result is rounded once."""
    k = tl.where(n == n, n, 0.0).to(tl.int32)
    half = k >> 1
    return p * _power_of_two(half) * _power_of_two(k - half)


@triton.jit
def _power_of_two(k):
    return ((k + 127) << 23).to(tl.float32, bitcast=True)
