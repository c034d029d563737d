"""Philox4x32-10 and Box-Muller, one number at a time, in Python's own integers and doubles."""

import math

import numpy as np


def philox4x32(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Salmon et al. (2011), section 3: ten rounds of two multiplications, the key raised by a Weyl sequence."""
    c, k = list(counter), list(key)
    for turn in range(10):
        if turn:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
    return tuple(c)


def normal(count: int, seed: int, offset: int) -> np.ndarray:
    """The first numbers of the stream of a key."""
    numbers: list[float] = []
    for group in range(-(-count // 4)):
        place = (offset + group) % 2**64
        words = philox4x32((place % 2**32, place >> 32, 0, 0), (seed % 2**32, seed >> 32))
        for first, second in (words[:2], words[2:]):
            uniform = float(np.float32(np.float32(first) * np.float32(2**-32) + np.float32(2**-33)))
            radius, angle = math.sqrt(-2 * math.log(uniform)), 2 * math.pi * second / 2**32
            numbers += [radius * math.cos(angle), radius * math.sin(angle)]
    return np.array(numbers[:count])
