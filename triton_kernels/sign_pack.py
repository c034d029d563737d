"""Signs packed to bits."""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORDS = 64


def sign_pack(vector: Tensor) -> Tensor:
    """Whether each entry is at least 0, one bit each, the first in the lowest bit of the first word.

    Args:
        vector: Flat, contiguous, on a CUDA device (on the CPU with ``TRITON_INTERPRET=1``).

    Returns:
        int32 words, one for 32 entries, the last one filled up with zeros.
    """
    n = vector.numel()
    words = torch.empty(triton.cdiv(n, 32), dtype=torch.int32, device=vector.device)
    with torch.cuda.device(vector.device) if vector.is_cuda else contextlib.nullcontext():
        pack_bits[(triton.cdiv(len(words), _WORDS),)](vector, words, n, len(words), WORDS=_WORDS)
    return words


@triton.jit
def pack_bits(vector, words, n, count, WORDS: tl.constexpr):
    """Some words of the message."""
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    bit = tl.arange(0, 32)
    place = word[:, None] * 32 + bit[None, :]
    value = tl.load(vector + place, mask=place < n, other=-1.0)
    tl.store(words + word, tl.sum((value >= 0).to(tl.int32) << bit[None, :], axis=1), mask=word < count)
