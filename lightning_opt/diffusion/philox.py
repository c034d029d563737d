"""Normal noise that depends on a seed and a place alone, so that every backend draws the same numbers.

Number i of a stream is number i % 4 of the counter ``offset + i // 4`` under the key ``seed``: Philox4x32-10 (Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) makes four 32-bit words of it, and the transform of Box and
Muller two normal numbers of two words. The fused kernels compute the same numbers inside of their loops, to about a
unit in the last place, without a pass over memory.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1


class NoiseKey(NamedTuple):
    """Where a stream of normal numbers begins.

    Attributes:
        seed: 64 bits; streams of different seeds are independent.
        offset: The first counter, 64 bits. A counter is worth four numbers: after n of them, the next stream of this
            seed may begin ``(n + 3) // 4`` further on.
    """

    seed: int
    offset: int = 0


def draw_noise_key(generator: torch.Generator, count: int) -> NoiseKey:
    """A key of ``count`` fresh numbers, by which the generator moves on.

    A CUDA generator gives its own seed and offset, and the offset grows: nothing waits for the device, and torch's own
    numbers are never repeated. Other generators have no offset; 64 bits of their next numbers become the seed.

    Args:
        generator: On any device; its state decides on the key, and changes.
        count: How many numbers will be drawn.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> draw_noise_key(generator, 10) == draw_noise_key(generator, 10)
        False
    """
    if generator.device.type == "cuda":
        offset = generator.get_offset()  # counts words of Philox, four of them for each counter
        generator.set_offset(offset + 4 * -(-count // 4))
        return NoiseKey(generator.initial_seed() % 2**64, offset // 4)
    words = torch.randint(2**32, (2,), generator=generator, device=generator.device)
    low, high = words.tolist()
    return NoiseKey(low + (high << 32))


def philox_normal(
    shape: Sequence[int],
    key: NoiseKey | tuple[int, int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Independent standard normal numbers; the same for a key on every device.

    This is the specification in plain torch, computed in float64 from 32 random bits a number: no number exceeds 6.8.

    Args:
        shape: Shape of the result; numbers follow its elements in order, the last dimension fastest.
        key: Seed and offset.
        dtype: A floating dtype; the numbers are rounded to it once.
        device: Where to.

    Raises:
        ValueError: If a part of the key is not in the range of 64 bits.

    Cost:
        About 60 passes over tensors of 8 bytes a number. The fused kernels take no pass.

    Example:
        >>> x = philox_normal((2, 3), NoiseKey(seed=1))
        >>> torch.equal(x.flatten()[4:], philox_normal((2,), NoiseKey(seed=1, offset=1)))
        True
    """
    seed, offset = check_noise_key(key)
    count = math.prod(shape)
    groups = torch.arange(-(-count // 4), dtype=torch.int64, device=device)
    low = groups + (offset & _MASK)
    high = (low >> 32) + (offset >> 32)
    zero = torch.zeros_like(groups)
    words = philox4x32(torch.stack([low & _MASK, high & _MASK, zero, zero], -1), (seed & _MASK, seed >> 32))
    first, second = words.reshape(-1, 2).unbind(-1)
    uniform = first.float() * 2**-32 + 2**-33  # in float32, as in the kernels; from 2^-33 to 1
    radius = (-2 * uniform.double().log()).sqrt()
    angle = second.double() * (2 * math.pi / 2**32)
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    return normal.flatten()[:count].reshape(*shape).to(dtype)


def philox4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10: four random 32-bit words from each counter.

    Args:
        counter: (..., 4) words of 32 bits, the lowest first, as int64.
        key: Two words.

    Returns:
        (..., 4) words, as int64.

    Example:
        >>> [hex(word) for word in philox4x32(torch.zeros(4, dtype=torch.int64), (0, 0)).tolist()]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    key0, key1 = key
    for _ in range(10):
        p, q = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2  # of 64 bits, whatever the sign that torch sees
        c0, c1 = (q >> 32 & _MASK) ^ c1 ^ key0, q & _MASK
        c2, c3 = (p >> 32 & _MASK) ^ c3 ^ key1, p & _MASK
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return torch.stack([c0, c1, c2, c3], -1)


def check_noise_key(key: tuple[int, int]) -> NoiseKey:
    """The key, if it is one.

    Raises:
        ValueError: If a part of it is not in the range of 64 bits.
    """
    for name, value in zip(("seed", "offset"), key, strict=True):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} must be in [0, 2**64), got {value}")
    return NoiseKey(*key)
