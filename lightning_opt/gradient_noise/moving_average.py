"""Moving averages of gradient statistics over batches that come one after the other."""

import dataclasses

import torch

from .statistics import GradientStatistics


class MovingAverage:
    r"""Averages S, :math:`\lVert \bar g \rVert^2` and V with weights that fall geometrically into the past.

    The averages are divided by the sum of their weights, :math:`1 - d^k` after k batches, so the first batch counts as
    it is. They are kept to the digits of float32, so that those of a resumed run are the same.

    Args:
        decay: d, in [0, 1); 0 keeps the last batch alone.

    Attributes:
        sums: Sum of the weights, and the weighted sums of the three; empty before the first batch.

    Example:
        >>> average = MovingAverage(0.5)
        >>> for trace in (1.0, 4.0):
        ...     mean = average.add(GradientStatistics(samples=8, groups=8, grad_norm_sq=1.0, var_trace=trace))
        >>> mean.var_trace  # (0.25 * 1 + 0.5 * 4) / 0.75
        3.0
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.sums: list[float] = []

    def add(self, statistics: GradientStatistics) -> GradientStatistics:
        """The statistics of a batch with the averages up to it in their place."""
        along = statistics.var_along
        new = [1.0, statistics.var_trace, statistics.grad_norm_sq, along or 0.0]
        old = self.sums or [0.0] * len(new)
        sums = [self.decay * a + (1 - self.decay) * b for a, b in zip(old, new, strict=True)]
        self.sums = torch.tensor(sums).tolist()
        weight, trace, norm_sq, mean_along = self.sums
        return dataclasses.replace(
            statistics,
            var_trace=trace / weight,
            grad_norm_sq=norm_sq / weight,
            var_along=None if along is None else mean_along / weight,
        )
