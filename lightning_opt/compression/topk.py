"""The k values of largest magnitude, with their places."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

from .compressor import Backend, Compressor, Draw, ValueDtype, from_words, sent_as, to_words, words_for


@register("tool", summary="The compressor that sends the k values of largest magnitude", paper="2402.10774")
class TopK(Compressor):
    """Sends the k entries of largest magnitude: a value and a 32-bit place each. Its contraction is k/d.

    Args:
        ratio: k as a part of the length d of each tensor, rounded up.
        k: The same k for every tensor, instead of ``ratio``.
        value_dtype: Round values to this dtype for the journey; the error feedback knows the rounded ones. By default
            they travel as they are.
        backend: ``"triton"`` selects and packs float32 vectors on a CUDA device with a kernel of our own, which never
            waits and breaks ties by place. No GPU has timed it yet, so ``"torch"`` is the default.

    Raises:
        ValueError: If a value is out of range.

    Cost:
        8 bytes an entry sent (6 in half precision). One pass over the tensor to find a threshold; see :func:`top`.

    Example:
        >>> import torch
        >>> c, v = TopK(k=2), torch.tensor([1.0, -4.0, 0.5, 3.0])
        >>> c.decompress(c.compress(v), v), c.nbytes(4), c.delta(4)
        (tensor([ 0., -4.,  0.,  3.]), 16, 0.5)
    """

    def __init__(
        self,
        ratio: float = 0.01,
        k: int | None = None,
        value_dtype: ValueDtype | None = None,
        backend: Backend = "torch",
    ) -> None:
        check_interval("ratio", ratio, 0, 1, closed="(]")
        if k is not None:
            check_interval("k", k, 1)
        check_choice("value_dtype", value_dtype, [None, "float32", "bfloat16", "float16"])
        check_choice("backend", backend, ["torch", "triton"])
        self.ratio, self.k, self.value_dtype, self.backend = ratio, k, value_dtype, backend

    def __repr__(self) -> str:
        return f"TopK({f'ratio={self.ratio}' if self.k is None else f'k={self.k}'}{_shown(self.value_dtype)})"

    def count(self, numel: int) -> int:
        """K for a tensor of this length."""
        return count(self.ratio, self.k, numel)

    @override
    def nwords(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        k = self.count(numel)
        return words_for(k, sent_as(self.value_dtype, dtype)) + k

    @override
    def delta(self, numel: int) -> float:
        return self.count(numel) / numel

    @override
    def compress(self, vector: Tensor, draw: Draw = Draw()) -> Tensor:  # noqa: B008
        k, dtype = self.count(vector.numel()), sent_as(self.value_dtype, vector.dtype)
        if self.backend == "triton" and vector.dtype == dtype == torch.float32:
            from lightning_opt.triton_kernels.topk_pack import topk_pack  # needs the extra

            return topk_pack(vector, k)
        places = top(vector, k)
        values = vector.index_select(0, places).to(dtype)
        return torch.cat([to_words(values), places.to(torch.int32)])

    @override
    def add_(self, target: Tensor, words: Tensor, weight: float = 1.0, draw: Draw = Draw()) -> Tensor:  # noqa: B008
        k = self.count(target.numel())
        values = from_words(words[:-k], sent_as(self.value_dtype, target.dtype), k)
        return target.index_add_(0, words[-k:], values.to(target.dtype), alpha=weight)

    @override
    def add_all_(self, target: Tensor, rows: Tensor, weights: Sequence[float], draws: Sequence[Draw]) -> Tensor:
        if not target.is_cpu or len(set(weights)) > 1:
            return super().add_all_(target, rows, weights, draws)
        # on the CPU index_add_ goes from the first place to the last, so ranks stay in order
        k = self.count(target.numel())
        values = rows[:, :-k].contiguous().view(sent_as(self.value_dtype, target.dtype))[:, :k]
        places = rows[:, -k:].reshape(-1)
        return target.index_add_(0, places, values.to(target.dtype).reshape(-1), alpha=weights[0])


def count(ratio: float, k: int | None, numel: int) -> int:
    """How many of so many entries are sent."""
    return min(numel, k if k is not None else max(1, math.ceil(ratio * numel - 1e-9)))


def top(vector: Tensor, k: int) -> Tensor:
    """The places of the k entries of largest magnitude, in no particular order; of equal ones any, always the same.

    On the CPU, where torch sorts on one thread, a sample first gives a threshold that a few more than k entries pass;
    the result is exact in any case.

    Example:
        >>> import torch
        >>> top(torch.tensor([1.0, -4.0, 0.5, 3.0]), 2).sort().values
        tensor([1, 3])
    """
    size = vector.abs()
    if vector.is_cpu and vector.numel() >= _LARGE and k * 8 <= vector.numel():
        sample = size[:: vector.numel() // _SAMPLE]
        wanted = k / vector.numel() * len(sample)
        rank = math.ceil(wanted + 3 * math.sqrt(wanted) + 1)  # three standard deviations on the safe side
        passed = (size >= sample.topk(rank).values[-1]).nonzero().squeeze(1)
        if k <= len(passed) <= vector.numel() // 4:  # more where many entries are equal
            return passed.index_select(0, size.index_select(0, passed).topk(k, sorted=False).indices)
    return size.topk(k, sorted=False).indices


_LARGE, _SAMPLE = 2**15, 2**13


def _shown(value_dtype: ValueDtype | None) -> str:
    return "" if value_dtype is None else f", value_dtype={value_dtype!r}"
