"""Counter-based normal noise, the numbers of ``lightning_opt.diffusion.philox_normal``, computed where it is needed."""

import math
from functools import cache

import numba
import numpy as np
from numba import types
from numba.extending import register_jitable

from ._memory import put, put_word, word
from .fast_exp import fma

_INLINED = register_jitable(forceinline=True)  # a call would keep the loop from being vectorized

_MULTIPLIER0, _MULTIPLIER1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL0, _WEYL1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _WORD = np.uint64(0xFFFFFFFF), np.uint64(32)


@cache
def normals():
    """The function ``(place, words, first, groups, key0, key1)`` that writes normal numbers, compiled once for all.

    It writes the four numbers of each of some counters, beginning with ``first``, as float32 at the address ``place``;
    there is room for their four words at the address ``words``.
    """

    def write(place, words, first, groups, key0, key1):
        # Two loops, since Philox computes in 64 bits and the rest in 32: a vector of each has another length.
        for g in range(groups):
            counter = first + np.uint64(g)
            a, b, c, d = philox(counter & _LOW, counter >> _WORD, np.uint64(0), np.uint64(0), key0, key1)
            put_word(words, g, a)
            put_word(words, groups + g, b)
            put_word(words, 2 * groups + g, c)
            put_word(words, 3 * groups + g, d)
        for g in range(groups):
            z0, z1 = box_muller(word(words, g), word(words, groups + g))
            z2, z3 = box_muller(word(words, 2 * groups + g), word(words, 3 * groups + g))
            put(place, 4 * g, z0)
            put(place, 4 * g + 1, z1)
            put(place, 4 * g + 2, z2)
            put(place, 4 * g + 3, z3)

    signature = types.void(types.int64, types.int64, types.uint64, types.int64, types.uint64, types.uint64)
    return numba.njit(signature, error_model="numpy", no_cfunc_wrapper=True, no_cpython_wrapper=True)(write)


@_INLINED
def philox(c0, c1, c2, c3, key0, key1):
    """Philox4x32-10 (Salmon et al., 2011): four random words from four of a counter and two of a key.

    All are uint64 whose low 32 bits count: products of 64 bits take no conversions then.
    """
    for _ in range(10):
        p, q = _MULTIPLIER0 * (c0 & _LOW), _MULTIPLIER1 * (c2 & _LOW)
        c0, c1, c2, c3 = (q >> _WORD) ^ c1 ^ key0, q, (p >> _WORD) ^ c3 ^ key1, p
        key0, key1 = key0 + _WEYL0, key1 + _WEYL1
    return c0, c1, c2, c3


_TO_UNIT, _HALF_UNIT, _TO_ANGLE = np.float32(2**-32), np.float32(2**-33), np.float32(2 * math.pi / 2**32)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_ROOT_HALF = np.int32(0x3F3504F3)  # the bits of sqrt(1/2)
# minimax polynomials of Cephes: of (log(1 + f) - f + f^2 / 2) / f^3, (sin(x) - x) / x^3, (cos(x) - 1 + x^2 / 2) / x^4
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = map(
    np.float32,
    (
        *(3.3333331174e-1, -2.4999993993e-1, 2.0000714765e-1, -1.6668057665e-1, 1.4249322787e-1),
        *(-1.2420140846e-1, 1.1676998740e-1, -1.1514610310e-1, 7.0376836292e-2),
    ),
)
_S0, _S1, _S2 = map(np.float32, (-1.6666654611e-1, 8.3321608736e-3, -1.9515295891e-4))
_C0, _C1, _C2 = map(np.float32, (4.166664568298827e-2, -1.388731625493765e-3, 2.443315711809948e-5))
_ONE, _HALF, _TWO = np.float32(1), np.float32(0.5), np.float32(2)


@_INLINED
def box_muller(first, second):
    """Two independent normal numbers from two random uint32: a radius and an angle."""
    radius = math.sqrt(-_TWO * _log(fma(np.float32(first), _TO_UNIT, _HALF_UNIT)))
    quarter = np.uint32(np.uint32(second + np.uint32(1 << 29)) >> np.uint32(30))  # turns, to the nearest quarter
    x = np.float32(np.int32(second - np.uint32(quarter << np.uint32(30)))) * _TO_ANGLE  # from -pi/4 to pi/4
    z = x * x
    sin = fma(fma(fma(_S2, z, _S1), z, _S0) * z, x, x)
    cos = fma(fma(fma(_C2, z, _C1), z, _C0) * z, z, fma(-_HALF, z, _ONE))
    odd = quarter & np.uint32(1) != np.uint32(0)
    first_sign = np.uint32((quarter + np.uint32(1)) & np.uint32(2)) << np.uint32(30)
    second_sign = np.uint32(quarter & np.uint32(2)) << np.uint32(30)
    return radius * _negated(sin if odd else cos, first_sign), radius * _negated(cos if odd else sin, second_sign)


@register_jitable
def _negated(x, sign_bit):
    return np.uint32(np.float32(x).view(np.uint32) ^ np.uint32(sign_bit)).view(np.float32)


@_INLINED
def _log(u):
    """The logarithm of a normal float32."""
    bits = np.float32(u).view(np.int32)
    e = np.int32(np.int32(bits - _ROOT_HALF) >> np.int32(23))
    f = np.int32(bits - np.int32(e << np.int32(23))).view(np.float32) - _ONE  # from sqrt(1/2) - 1 to sqrt(2) - 1
    e = np.float32(e)
    z = f * f
    p = fma(fma(fma(fma(fma(fma(fma(fma(_L8, f, _L7), f, _L6), f, _L5), f, _L4), f, _L3), f, _L2), f, _L1), f, _L0)
    return fma(e, _LN2_HIGH, f + fma(-_HALF, z, fma(e, _LN2_LOW, p * f * z)))
