"""bfloat16 as bits, and the random bits of stochastic rounding, as ``lightning_opt.optim`` computes them in torch."""

import numpy as np
from numba.extending import register_jitable


def widen(bits):
    """The float32 value of a bfloat16, given as uint16."""
    return np.uint32(np.uint32(bits) << 16).view(np.float32)


@register_jitable
def narrow(x):
    """A float32 rounded to the nearest bfloat16, ties to even."""
    bits = np.float32(x).view(np.uint32)
    rounded = np.uint32(bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
    return np.uint16(rounded) if x == x else np.uint16(0x7FC0)


def narrow_stochastically(x, key, i):
    """A float32 rounded to bfloat16, up with the probability that makes the mean exact; inf and NaN stay.

    Args:
        x: The number.
        key: 32-bit key of this tensor, slot and step.
        i: Place of the element in memory.
    """
    bits = np.float32(x).view(np.uint32)
    noise = mix(np.uint32(i + key)) & 0xFFFF
    finite = (bits & 0x7F800000) != 0x7F800000
    return np.uint16(np.uint32(bits + noise) >> 16) if finite else narrow(x)


@register_jitable
def mix(x):
    """A bijective hash of uint32 with low bias, of a scalar in a kernel or of an array."""
    x = np.uint32(x ^ (x >> 16))
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x = np.uint32(x ^ (x >> 15))
    x = np.uint32(x * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> 16))
