"""No compression."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_opt.registry import register

from .compressor import Compressor, Draw, from_words, to_words, words_for


@register("tool", summary="The compressor that sends everything")
class Identity(Compressor):
    """Sends every value: dense data parallelism through the same machinery, for comparison.

    Example:
        >>> Identity().nbytes(100), Identity().delta(100)
        (400, 1.0)
    """

    @override
    def nwords(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        return words_for(numel, dtype)

    @override
    def delta(self, numel: int) -> float:
        return 1.0

    @override
    def compress(self, vector: Tensor, draw: Draw = Draw()) -> Tensor:  # noqa: B008
        return to_words(vector)

    @override
    def add_(self, target: Tensor, words: Tensor, weight: float = 1.0, draw: Draw = Draw()) -> Tensor:  # noqa: B008
        return target.add_(from_words(words, target.dtype, target.numel()), alpha=weight)

    def __repr__(self) -> str:
        return "Identity()"
