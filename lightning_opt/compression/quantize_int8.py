"""A byte an entry."""

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

from .compressor import Compressor, Draw, from_words, to_words, words_for


@register("tool", summary="The compressor that rounds to 8 bits, with a scale a block or one step for all")
class QuantizeInt8(Compressor):
    """Rounds entries to 8-bit multiples of a step: the 127th part of the largest magnitude in each block, or fixed.

    A rounding error is at most half a step (in the mean square for stochastic rounding too), so the contraction is at
    least 1 - block / 254^2, which is 0.996 for blocks of 256. A fixed step sends no scales, but its error does not
    shrink with the vector: no contraction is known, and it is not homogeneous, which is where the weights of EF21-W
    matter.

    Args:
        block: Entries that share a scale.
        step: One step for all entries instead; larger magnitudes than 127 steps are cut.
        rounding: ``"nearest"``, or ``"stochastic"``, which is right on average; each rank draws its own numbers.
        seed: Of the stochastic rounding.

    Raises:
        ValueError: If a value is out of range.

    Cost:
        A byte an entry and 4 bytes a block sent.

    Example:
        >>> import torch
        >>> c, v = QuantizeInt8(step=0.5), torch.tensor([1.1, -4.0, 0.1, 3.0])
        >>> c.decompress(c.compress(v), v), c.nbytes(4)
        (tensor([ 1., -4.,  0.,  3.]), 4)
    """

    def __init__(
        self,
        block: int = 256,
        step: float | None = None,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        seed: int = 0,
    ) -> None:
        check_interval("block", block, 1)
        if step is not None:
            check_interval("step", step, 0, closed="()")
        check_choice("rounding", rounding, ["nearest", "stochastic"])
        self.block, self.step, self.rounding, self.seed = block, step, rounding, seed
        self.homogeneous = step is None

    def __repr__(self) -> str:
        size = f"block={self.block}" if self.step is None else f"step={self.step}"
        return f"QuantizeInt8({size}, rounding={self.rounding!r})"

    @override
    def nwords(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        return words_for(self._blocks(numel), torch.float32) + words_for(numel, torch.int8)

    @override
    def delta(self, numel: int) -> float | None:
        # half a step is max / 254 for each of the entries of a block, and the block's norm is at least max
        worst = 1 - min(self.block, numel) / 254**2
        return worst if self.step is None and worst > 0 else None

    @override
    def compress(self, vector: Tensor, draw: Draw = Draw()) -> Tensor:  # noqa: B008
        if self.step is None:
            blocks = torch.nn.functional.pad(vector, (0, -len(vector) % self.block)).view(-1, self.block)
            scales = (blocks.abs().amax(1) / 127).float()
            # zeros keep a zero scale: anything divided by 1 will do
            levels = (blocks / torch.where(scales > 0, scales, 1)[:, None]).flatten()[: len(vector)]
        else:
            scales, levels = vector.new_empty(0, dtype=torch.float32), vector / self.step
        if self.rounding == "stochastic":
            generator = draw.generator(self.seed, shared=False)
            levels = (levels + torch.rand(len(levels), generator=generator).to(levels)).floor_()
        rounded = levels.round().clamp_(-127, 127).to(torch.int8)
        return torch.cat([to_words(scales), to_words(rounded)])

    @override
    def add_(self, target: Tensor, words: Tensor, weight: float = 1.0, draw: Draw = Draw()) -> Tensor:  # noqa: B008
        numel = target.numel()
        head = self._blocks(numel)
        levels = from_words(words[head:], torch.int8, numel).to(target.dtype)
        if self.step is not None:
            return target.add_(levels, alpha=self.step * weight)
        scales = from_words(words[:head], torch.float32, head).to(target.dtype)
        return target.addcmul_(levels, scales.repeat_interleave(self.block)[:numel], value=weight)

    def _blocks(self, numel: int) -> int:
        return 0 if self.step is not None else -(-numel // self.block)
