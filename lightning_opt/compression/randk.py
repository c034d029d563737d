"""k values at random places that every rank knows."""

import functools

import torch
from torch import Tensor
from typing_extensions import override

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

from .compressor import Compressor, Draw, ValueDtype, from_words, sent_as, to_words, words_for
from .topk import count


@register("tool", summary="The compressor that sends values at random places, the same on every rank")
class RandK(Compressor):
    """Sends k entries at random places that all ranks draw alike, so that no place travels. Its contraction is k/d.

    The places are a uniformly random subset, another one at each step for each tensor. Values are sent as they are,
    without the factor d/k of the unbiased form.

    Args:
        ratio: k as a part of the length d of each tensor, rounded up.
        k: The same k for every tensor, instead of ``ratio``.
        seed: Of the places; the same on all ranks.
        value_dtype: Round values to this dtype for the journey.

    Raises:
        ValueError: If a value is out of range.

    Cost:
        4 bytes an entry sent. Places are drawn on the CPU, in time of k log k.

    Example:
        >>> import torch
        >>> c, v = RandK(k=2), torch.tensor([1.0, -4.0, 0.5, 3.0])
        >>> int(c.decompress(c.compress(v), v).count_nonzero()), c.nbytes(4)
        (2, 8)
    """

    def __init__(
        self, ratio: float = 0.01, k: int | None = None, seed: int = 0, value_dtype: ValueDtype | None = None
    ) -> None:
        check_interval("ratio", ratio, 0, 1, closed="(]")
        if k is not None:
            check_interval("k", k, 1)
        check_choice("value_dtype", value_dtype, [None, "float32", "bfloat16", "float16"])
        self.ratio, self.k, self.seed, self.value_dtype = ratio, k, seed, value_dtype

    def __repr__(self) -> str:
        return f"RandK({f'ratio={self.ratio}' if self.k is None else f'k={self.k}'}, seed={self.seed})"

    @override
    def nwords(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        return words_for(count(self.ratio, self.k, numel), sent_as(self.value_dtype, dtype))

    @override
    def delta(self, numel: int) -> float:
        return count(self.ratio, self.k, numel) / numel

    @override
    def compress(self, vector: Tensor, draw: Draw = Draw()) -> Tensor:  # noqa: B008
        values = vector.index_select(0, self._places(vector, draw))
        return to_words(values.to(sent_as(self.value_dtype, vector.dtype)))

    @override
    def add_(self, target: Tensor, words: Tensor, weight: float = 1.0, draw: Draw = Draw()) -> Tensor:  # noqa: B008
        places = self._places(target, draw)
        values = from_words(words, sent_as(self.value_dtype, target.dtype), len(places))
        return target.index_add_(0, places, values.to(target.dtype), alpha=weight)

    def _places(self, like: Tensor, draw: Draw) -> Tensor:
        k = count(self.ratio, self.k, like.numel())
        return _drawn(self.seed, Draw(draw.step, draw.name), like.numel(), k).to(like.device)


@functools.lru_cache(maxsize=32)
def _drawn(seed: int, draw: Draw, numel: int, k: int) -> Tensor:
    """The places of one tensor at one step, which are needed for the message of each rank."""
    with torch.inference_mode(False):
        return random_subset(numel, k, draw.generator(seed, shared=True))


def random_subset(numel: int, k: int, generator: torch.Generator) -> Tensor:
    """K different numbers below ``numel``, every subset as likely as any other.

    Example:
        >>> import torch
        >>> len(random_subset(10**6, 1000, torch.Generator()).unique())
        1000
    """
    if 4 * k > numel:
        return torch.randperm(numel, generator=generator)[:k]
    drawn = torch.empty(0, dtype=torch.int64)
    while True:  # the first k different numbers of a sequence of independent ones
        drawn = torch.cat([drawn, torch.randint(numel, (k + k // 4 + 8,), generator=generator)])
        values, group = drawn.unique(return_inverse=True)
        if len(values) >= k:
            first = torch.full((len(values),), len(drawn)).scatter_reduce_(0, group, torch.arange(len(drawn)), "amin")
            return drawn[first.sort().values[:k]]
