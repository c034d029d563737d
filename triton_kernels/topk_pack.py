"""The k entries of largest magnitude with their places, in a fixed order, without sorting and without waiting.

The bits of a magnitude are ordered as its value. Four passes over the vector count them digit by digit, highest first,
until all 31 bits of the k-th largest are known; one more counts by blocks what is above and what is equal, which says
where each block writes.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


def topk_pack(vector: Tensor, k: int) -> Tensor:
    """The message of :class:`lightning_opt.compression.TopK`: k values, and k places behind them.

    First come the entries above the k-th largest magnitude, in the order of the vector, then as many of those equal to
    it as are missing, the first ones.

    Args:
        vector: Flat, contiguous, float32, fewer than 2^31 entries, on a CUDA device (on the CPU with
            ``TRITON_INTERPRET=1``).
        k: From 1 to the length of the vector.

    Returns:
        int32 words, 2 k of them.
    """
    n, device = vector.numel(), vector.device
    blocks = triton.cdiv(n, _BLOCK)
    prefix = torch.zeros(1, dtype=torch.int32, device=device)
    missing = torch.full((1,), k, dtype=torch.int32, device=device)
    words = torch.empty(2 * k, dtype=torch.int32, device=device)
    with torch.cuda.device(device) if vector.is_cuda else contextlib.nullcontext():
        for shift in (24, 16, 8, 0):
            counts = torch.zeros(256, dtype=torch.int32, device=device)
            digit_counts[(blocks,)](vector, prefix, counts, n, SHIFT=shift, BLOCK=_BLOCK)
            at_least = counts.flip(0).cumsum(0, dtype=torch.int32).flip(0)  # entries whose digit is d or more
            digit = (at_least >= missing).sum(dtype=torch.int32) - 1
            missing = missing - (at_least - counts).gather(0, digit.long().reshape(1))
            prefix = prefix * 256 + digit
        above, equal = torch.empty(2, blocks, dtype=torch.int32, device=device)
        block_counts[(blocks,)](vector, prefix, above, equal, n, BLOCK=_BLOCK)
        places_above = above.cumsum(0, dtype=torch.int32) - above
        places_equal = equal.cumsum(0, dtype=torch.int32) - equal
        pack[(blocks,)](vector, prefix, missing, places_above, places_equal, words, n, k, BLOCK=_BLOCK)
    return words


@triton.jit
def magnitude_bits(vector, n, BLOCK: tl.constexpr):
    """The magnitudes of one block as integers, the places, and which of them are inside."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    value = tl.load(vector + i, mask=inside, other=0.0)
    return value, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, i, inside


@triton.jit
def digit_counts(vector, prefix, counts, n, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Count the digit of 8 bits at ``SHIFT`` of those whose higher digits are the prefix."""
    value, bits, i, inside = magnitude_bits(vector, n, BLOCK)
    wanted = inside
    if SHIFT < 24:
        wanted = inside & ((bits >> (SHIFT + 8)) == tl.load(prefix))
    tl.atomic_add(counts + ((bits >> SHIFT) & 255), 1, mask=wanted)


@triton.jit
def block_counts(vector, threshold, above, equal, n, BLOCK: tl.constexpr):
    """How many of one block are above the threshold, and how many equal."""
    value, bits, i, inside = magnitude_bits(vector, n, BLOCK)
    t = tl.load(threshold)
    tl.store(above + tl.program_id(0), tl.sum((inside & (bits > t)).to(tl.int32)))
    tl.store(equal + tl.program_id(0), tl.sum((inside & (bits == t)).to(tl.int32)))


@triton.jit
def pack(vector, threshold, missing, above, equal, words, n, k, BLOCK: tl.constexpr):
    """Write one block's entries to their places in the message."""
    value, bits, i, inside = magnitude_bits(vector, n, BLOCK)
    t, ties = tl.load(threshold), tl.load(missing)
    is_above, is_equal = inside & (bits > t), inside & (bits == t)
    place_above = tl.load(above + tl.program_id(0)) + tl.cumsum(is_above.to(tl.int32)) - 1
    tie = tl.load(equal + tl.program_id(0)) + tl.cumsum(is_equal.to(tl.int32)) - 1
    place = tl.where(is_above, place_above, k - ties + tie)
    sent = is_above | (is_equal & (tie < ties))
    tl.store(words + place, value.to(tl.int32, bitcast=True), mask=sent)
    tl.store(words + k + place, i, mask=sent)
