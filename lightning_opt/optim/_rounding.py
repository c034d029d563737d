"""Stochastic rounding to bfloat16 with counter-based random bits.

The bits are a hash of (step, tensor, slot, element): no random state is read or changed, a resumed run draws the same
bits, and the fused kernels, which compute the same hash, round identically.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def store(target: Tensor, value: Tensor, stream: int | Tensor | None) -> None:
    """Write ``value`` into ``target``, rounding to nearest, or stochastically when ``stream`` is given.

    Args:
        target: Tensor of any floating dtype; only bfloat16 targets of float32 values are rounded stochastically.
        value: Same shape.
        stream: What :func:`stream` returned, or None.
    """
    if stream is None or target.dtype != torch.bfloat16 or value.dtype != torch.float32:
        target.copy_(value)
    else:
        target.copy_(round_stochastically(value, stream))


def stream(step: float | Tensor, tensor: int, slot: int) -> int | Tensor:
    """The 32-bit key of the random bits that one tensor of one step is rounded with.

    Args:
        step: Number of the step, from 1; a tensor stays on its device.
        tensor: Number of the parameter in the optimizer.
        slot: 0 for the parameter, 1, 2, ... for its states.
    """
    number = step.to(torch.int64) if isinstance(step, Tensor) else int(step)
    return _mix((number + _mix(tensor * 8 + slot)) & _MASK)  # type: ignore[operator]


def round_stochastically(value: Tensor, stream: int | Tensor) -> Tensor:
    """Round float32 to bfloat16, up with the probability that makes the mean exact; inf and NaN stay.

    Args:
        value: Dense, in any order of dimensions.
        stream: What :func:`stream` returned.

    Example:
        >>> x = torch.full((10_000,), 1 + 2**-8)  # half of the way from 1 to the next bfloat16
        >>> round((round_stochastically(x, stream(1, 0, 0)).float() > 1).float().mean().item(), 1)
        0.5
    """
    place = torch.arange(value.numel(), device=value.device).as_strided(value.shape, value.stride())  # in memory
    noise = _mix((place + stream) & _MASK) & 0xFFFF  # type: ignore[operator]
    bits = value.contiguous().view(torch.int32).to(torch.int64) & _MASK
    rounded = (((bits + noise) & 0xFFFF0000) + (1 << 31)) % (1 << 32) - (1 << 31)  # back to the range of int32
    return torch.where(value.isfinite(), rounded.to(torch.int32).view(torch.float32), value).to(torch.bfloat16)


def _mix(x: int | Tensor) -> int | Tensor:
    """A bijective 32-bit hash with low bias, on values held in 64 bits."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
