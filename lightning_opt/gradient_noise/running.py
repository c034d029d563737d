"""The statistics of groups that come one after the other, without keeping their gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .statistics import GradientStatistics


class RunningGradientStatistics:
    r"""Welford's running mean and variance of group means of gradients, weighted by their samples.

    After :math:`h_j` of :math:`n_j` samples, with :math:`b_j = b_{j-1} + n_j` and :math:`\delta = h_j - \bar g_{j-1}`:
    :math:`\bar g_j = \bar g_{j-1} + (n_j / b_j) \delta` and
    :math:`M_j = M_{j-1} + (n_j b_{j-1} / b_j) \lVert \delta \rVert^2`. Then :math:`S = M_J / (J - 1)`. Nothing cancels,
    so small variances beside large means come out right in float32 too.

    Of V it knows nothing: the direction :math:`\bar g` is known only in the end, so it takes the groups' gradients.

    Args:
        coordinates: Keep the variance of each coordinate: one more gradient in memory.

    Cost:
        One gradient in memory (two with ``coordinates``) and two passes over the gradient a group.

    Example:
        >>> running = RunningGradientStatistics()
        >>> for h in torch.eye(4).double():
        ...     running.add([h], samples=1)
        >>> round(running.statistics().var_trace, 12)
        1.0
    """

    def __init__(self, *, coordinates: bool = False) -> None:
        self.coordinates = coordinates
        self.samples, self.groups = 0, 0
        self._mean: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._trace: Tensor | float = 0.0

    @torch.no_grad()
    def add(self, mean_gradient: Sequence[Tensor], samples: int) -> None:
        """Count one more group.

        Args:
            mean_gradient: Its mean gradient, one tensor a parameter.
            samples: Its samples, at least one.

        Raises:
            ValueError: If there are no samples.
        """
        if samples < 1:
            raise ValueError(f"samples must be >= 1, got {samples}")
        before, self.samples, self.groups = self.samples, self.samples + samples, self.groups + 1
        if not before:
            self._mean = [h.detach().clone() for h in mean_gradient]
            self._squares = [torch.zeros_like(h) for h in self._mean] if self.coordinates else []
            return
        delta = [h.detach() - m for h, m in zip(mean_gradient, self._mean, strict=True)]
        weight = samples * before / self.samples
        self._trace = self._trace + weight * sum((d.double().square().sum() for d in delta), start=torch.tensor(0.0))
        torch._foreach_add_(self._mean, delta, alpha=samples / self.samples)
        for square, d in zip(self._squares, delta, strict=False):
            square.addcmul_(d, d, value=weight)

    def statistics(self) -> GradientStatistics:
        """Of the groups so far.

        Raises:
            ValueError: If there are fewer than two.
        """
        if self.groups < 2:
            raise ValueError(f"the variance needs at least 2 groups, got {self.groups}")
        mean = torch.cat([m.reshape(-1) for m in self._mean])
        return GradientStatistics(
            samples=self.samples,
            groups=self.groups,
            grad_norm_sq=mean.double().square().sum().item(),
            var_trace=float(self._trace) / (self.groups - 1),
            mean=mean if self.coordinates else None,
            variance=torch.cat([s.reshape(-1) for s in self._squares]) / (self.groups - 1) if self._squares else None,
        )
