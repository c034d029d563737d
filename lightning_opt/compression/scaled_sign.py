"""One bit an entry and one scale a tensor."""

import functools

import torch
from torch import Tensor
from typing_extensions import override

from lightning_opt._checks import check_choice
from lightning_opt.registry import register

from .compressor import Backend, Compressor, Draw, from_words, to_words, words_for


@register("tool", summary="The compressor that sends signs, packed to bits, and one scale a tensor")
class ScaledSign(Compressor):
    r"""Sends :math:`\frac{\|v\|_1}{d} \mathrm{sign}(v)`: one bit an entry, and one number a tensor; sign(0) is +1.

    Its contraction :math:`\|v\|_1^2 / (d \|v\|_2^2)` depends on the vector, from 1/d for one large entry to 1; about
    0.64 for normal ones. None better than 1/d holds for all, so :meth:`delta` is None.

    Args:
        backend: ``"triton"`` packs bits on a CUDA device with a kernel of our own. No GPU has timed it yet, so
            ``"torch"`` is the default.

    Example:
        >>> import torch
        >>> c, v = ScaledSign(), torch.tensor([1.0, -4.0, 0.0, 3.0])
        >>> c.decompress(c.compress(v), v), c.nbytes(64)
        (tensor([ 2., -2.,  2.,  2.]), 12)
    """

    def __init__(self, backend: Backend = "torch") -> None:
        check_choice("backend", backend, ["torch", "triton"])
        self.backend = backend

    @override
    def nwords(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        return words_for(1, dtype) + words_for(_nbytes(numel), torch.uint8)

    @override
    def delta(self, numel: int) -> None:
        return None

    @override
    def compress(self, vector: Tensor, draw: Draw = Draw()) -> Tensor:  # noqa: B008
        scale = vector.abs().mean().reshape(1)
        if self.backend == "triton":
            from lightning_opt.triton_kernels.sign_pack import sign_pack  # needs the extra

            return torch.cat([to_words(scale), sign_pack(vector)])
        return torch.cat([to_words(scale), to_words(pack_signs(vector))])

    @override
    def add_(self, target: Tensor, words: Tensor, weight: float = 1.0, draw: Draw = Draw()) -> Tensor:  # noqa: B008
        head = words_for(1, target.dtype)
        scale = from_words(words[:head], target.dtype, 1)
        packed = from_words(words[head:], torch.uint8, _nbytes(target.numel()))
        return target.addcmul_(unpack_signs(packed, target), scale * weight)

    def __repr__(self) -> str:
        return "ScaledSign()"


def pack_signs(vector: Tensor) -> Tensor:
    """Whether each entry is at least 0, one bit each, the first in the lowest bit of the first byte.

    Example:
        >>> import torch
        >>> pack_signs(torch.tensor([1.0, -1.0, 0.0]))
        tensor([5], dtype=torch.uint8)
    """
    bits = (vector >= 0).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=vector.device)
    return (bits * powers).sum(1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, like: Tensor) -> Tensor:
    """The signs as +1 and -1, in the length and the dtype of ``like``."""
    return _table(like.dtype, like.device).index_select(0, packed.to(torch.int32)).flatten()[: like.numel()]


@functools.cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight signs of every byte."""
    with torch.inference_mode(False):
        bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
        return (2 * bits - 1).to(dtype)


def _nbytes(numel: int) -> int:
    return -(-numel // 8)
