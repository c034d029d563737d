"""exp2 and exp of float32 as polynomials, for use inside numba kernels; :mod:`lightning_opt.fast_exp` says how exact.

``exp`` computes in float32 what a CPU kernel uses otherwise: there is no instruction for it, and the C library's
``expf`` would be a call for each element, so it is a polynomial too.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable

from lightning_opt.fast_exp import EXP2_COEFFICIENTS, EXP2_RANGE, EXP_COEFFICIENTS, EXP_RANGE, LN2_HIGH, LN2_LOW, LOG2E

_TO_INTEGER = np.float32(1.5 * 2**23)  # adding it rounds to an integer, which stays in the lowest bits
_INTEGER_BITS = np.int32(_TO_INTEGER.view(np.int32))
_ONE, _LOG2E = np.float32(1), np.float32(LOG2E)
_LN2_HIGH, _LN2_LOW = np.float32(-LN2_HIGH), np.float32(-LN2_LOW)
_EXP2_LOW, _EXP2_HIGH = map(np.float32, EXP2_RANGE)
_EXP_LOW, _EXP_HIGH = map(np.float32, EXP_RANGE)
_A1, _A2, _A3, _A4, _A5, _A6 = map(np.float32, EXP2_COEFFICIENTS)
_B1, _B2, _B3, _B4 = map(np.float32, EXP_COEFFICIENTS)


@intrinsic
def fma(typingctx, a, b, c):
    """The sum ``a * b + c`` of float32, rounded once."""

    def codegen(context, builder, signature, args):
        kind = ir.FloatType()
        function = builder.module.declare_intrinsic("llvm.fma", [kind], ir.FunctionType(kind, [kind] * 3))
        return builder.call(function, args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@register_jitable
def fast_exp2(x):
    """2 to the power of x, a float32."""
    x = _EXP2_LOW if x < _EXP2_LOW else x
    x = _EXP2_HIGH if x > _EXP2_HIGH else x
    shifted = np.float32(x + _TO_INTEGER)
    r = np.float32(x - np.float32(shifted - _TO_INTEGER))
    t = fma(r, _A1, _A2)
    t = fma(t, t, _A3)
    t = fma(t, fma(t, r, _A4), _A5)
    return _scale(fma(fma(t, r, _A6), r, _ONE), shifted)


@register_jitable
def fast_exp(x):
    """The exponential of x, a float32."""
    x = _EXP_LOW if x < _EXP_LOW else x
    x = _EXP_HIGH if x > _EXP_HIGH else x
    shifted = fma(x, _LOG2E, _TO_INTEGER)
    n = np.float32(shifted - _TO_INTEGER)
    r = fma(n, _LN2_LOW, fma(n, _LN2_HIGH, x))
    t = fma(r, _B1, _B2)
    t = fma(t, t, _B3)
    t = t * fma(r, _B4, t)
    return _scale(fma(fma(t, r, _ONE), r, _ONE), shifted)


@register_jitable
def _scale(p, shifted):
    """The product p * 2^n in two factors that float32 has, so that a subnormal result is rounded once."""
    k = np.int32(np.float32(shifted).view(np.int32) - _INTEGER_BITS)
    half = np.int32(k >> np.int32(1))
    return p * _power_of_two(half) * _power_of_two(np.int32(k - half))


@register_jitable
def _power_of_two(k):
    return np.int32((k + np.int32(127)) << np.int32(23)).view(np.float32)
