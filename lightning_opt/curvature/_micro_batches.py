"""The data of an operator: micro-batches and what each of them weighs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_opt._checks import check_interval


class MicroBatches:
    """A sequence of micro-batches whose weights sum to one over all batches of all ranks.

    Args:
        batches: Anything that can be indexed, and will be more than once.
        weights: The number of samples of each; equal if ``None``.
        reduce: Averages over ranks. With the weights relative to their mean over ranks, the average over ranks of the
            weighted sums is the mean over all samples, also where ranks hold different numbers of them.
        device: Where the average over ranks is taken.

    Raises:
        ValueError: If there is no batch, the batches can be iterated only once, or the weights do not fit.
    """

    def __init__(
        self,
        batches: Sequence[Any],
        weights: Sequence[float] | None,
        reduce: Callable[[Tensor], Tensor] | None,
        device: torch.device,
    ) -> None:
        if not hasattr(batches, "__getitem__") or not hasattr(batches, "__len__"):
            raise ValueError(
                f"batches must be a sequence, which every product goes through anew, got {type(batches).__name__}"
            )
        if isinstance(batches, Tensor):
            raise ValueError(
                "batches must be a sequence of micro-batches, got a tensor; for a single batch give [batch]"
            )
        if not len(batches):
            raise ValueError("batches must hold at least one micro-batch, got none")
        counts = [1.0] * len(batches) if weights is None else [float(w) for w in weights]
        if len(counts) != len(batches):
            raise ValueError(f"weights must be as many as batches, {len(batches)}, got {len(counts)}")
        for count in counts:
            check_interval("weights", count, 0, closed="()")
        total = sum(counts)
        if reduce is not None:
            total = float(reduce(torch.tensor([total], dtype=torch.float64, device=device)))
        self._batches = batches
        self._weights = [count / total for count in counts]

    def __len__(self) -> int:
        return len(self._weights)

    def weighted_sum(self, function: Callable[[int, Any], Tensor]) -> Tensor:
        """The weighted sum of a function of the number of a micro-batch and the micro-batch."""
        total: Tensor | None = None
        for index, weight in enumerate(self._weights):
            part = function(index, self._batches[index])
            if total is None:
                total = part if weight == 1 else part.mul_(weight)
            else:
                total.add_(part, alpha=weight)
        assert total is not None
        return total


def scalar_loss(loss: Any) -> Tensor:
    """The loss, if it is a scalar with a gradient.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss must return a scalar tensor, got {shape}")
    if not loss.requires_grad:
        raise ValueError("loss must depend on params, got a tensor without a gradient: was it detached?")
    return loss
