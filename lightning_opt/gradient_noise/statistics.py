"""Mean and variance of the per-sample gradients of a batch, from the samples or from groups of them."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class GradientStatistics:
    r"""What the gradients of one batch say about the noise of their mean.

    With per-sample gradients :math:`g_i`, their mean :math:`\bar g`, and variances with :math:`1/(b-1)`:

    Attributes:
        samples: The number b of samples in the batch.
        groups: The number J of group means that the variance comes from; ``samples`` where it comes from all samples.
        grad_norm_sq: :math:`\lVert \bar g \rVert^2`, all parameters in one vector.
        var_trace: S, an unbiased estimate of the trace of the covariance of one sample's gradient.
        var_along: V, the same of :math:`\mathrm{Var}_i \langle g_i, \bar g \rangle`, or None where it is not known.
        mean: :math:`\bar g`, flat, where the variance of each coordinate is known.
        variance: The variance of each coordinate, flat, or None.

    Example:
        >>> statistics = GradientStatistics.from_per_sample(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> statistics.var_trace, statistics.grad_norm_sq
        (1.0, 0.5)
    """

    samples: int
    groups: int
    grad_norm_sq: float
    var_trace: float
    var_along: float | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None

    @property
    def var_orthogonal(self) -> float | None:
        r"""W, the variance that is orthogonal to the mean gradient.

        The parts :math:`o_i = g_i - \langle g_i, \bar g \rangle \bar g / \lVert \bar g \rVert^2` have mean zero, so
        their variances sum to :math:`W = S - V / \lVert \bar g \rVert^2`, exactly.
        """
        if self.var_along is None:
            return None
        if self.grad_norm_sq == 0:
            return self.var_trace
        return max(self.var_trace - self.var_along / self.grad_norm_sq, 0.0)

    @property
    def unbiased_grad_norm_sq(self) -> float:
        r""":math:`\lVert \bar g \rVert^2 - S / b`, an unbiased estimate of the squared norm of the expected gradient.

        :math:`\lVert \bar g \rVert^2` itself is too large by :math:`S / b` in expectation.
        """
        return self.grad_norm_sq - self.var_trace / self.samples

    @classmethod
    def from_per_sample(cls, gradients: Tensor | Sequence[Tensor]) -> "GradientStatistics":
        """From the gradient of every sample.

        Args:
            gradients: One tensor with the samples in its first dimension, or one such tensor a parameter.

        Raises:
            ValueError: If there are fewer than two samples.
        """
        flat = _flatten(gradients)
        return cls.from_groups(flat, [1] * len(flat))

    @classmethod
    def from_groups(cls, means: Tensor | Sequence[Tensor], samples: Sequence[int]) -> "GradientStatistics":
        r"""From the mean gradients of groups of samples.

        A mean :math:`h_j` of :math:`n_j` independent samples has covariance :math:`\Sigma / n_j`, so with
        :math:`b = \sum n_j` and :math:`\bar g = \sum n_j h_j / b` the sum
        :math:`\sum_j n_j \lVert h_j - \bar g \rVert^2` has the expectation :math:`(J - 1) \operatorname{tr} \Sigma` for
        groups of any sizes: divided by :math:`J - 1` it is unbiased. For groups of equal size it is
        :math:`S / b = \sum_j \lVert h_j - \bar g \rVert^2 / (J (J - 1))`. Likewise
        :math:`V = \sum_j n_j \langle h_j - \bar g, \bar g \rangle^2 / (J - 1)`, whose expectation is that of the V from
        all samples.

        Args:
            means: The mean gradient of each group in the first dimension, in one tensor or one a parameter.
            samples: The number of samples of each group.

        Raises:
            ValueError: If there are fewer than two groups, or a group without samples.
        """
        h = _flatten(means)
        groups = len(samples)
        if groups < 2 or len(h) != groups:
            raise ValueError(
                f"samples must have as many entries as there are groups, at least 2; got {groups} and {len(h)}"
            )
        if min(samples) < 1:
            raise ValueError(f"samples must be >= 1 in every group, got {min(samples)}")
        n = torch.tensor(samples, dtype=h.dtype, device=h.device)
        mean = (n @ h) / n.sum()
        deviation = h - mean
        variance = (n @ deviation.square()) / (groups - 1)
        along = deviation @ mean
        return cls(
            samples=sum(samples),
            groups=groups,
            grad_norm_sq=(mean @ mean).item(),
            var_trace=variance.sum().item(),
            var_along=((n @ along.square()) / (groups - 1)).item(),
            mean=mean,
            variance=variance,
        )

    @classmethod
    def from_sums(
        cls,
        *,
        samples: int,
        groups: int,
        grad_norm_sq: float,
        sum_sq: float,
        sum_dot_sq: float | None = None,
        mean: Tensor | None = None,
        sum_of_squares: Tensor | None = None,
    ) -> "GradientStatistics":
        r"""From sums over groups, which ranks can add up: no group's gradient is needed any more.

        Args:
            samples: Samples of all groups.
            groups: Number of groups, at least two.
            grad_norm_sq: :math:`\lVert \bar g \rVert^2`.
            sum_sq: :math:`\sum_j n_j \lVert h_j \rVert^2`.
            sum_dot_sq: :math:`\sum_j n_j \langle h_j, \bar g \rangle^2`.
            mean: :math:`\bar g`, flat.
            sum_of_squares: :math:`\sum_j n_j h_j^2` by coordinate, flat.

        Example:
            >>> GradientStatistics.from_sums(samples=2, groups=2, grad_norm_sq=0.5, sum_sq=2.0).var_trace
            1.0
        """
        if groups < 2:
            raise ValueError(f"groups must be >= 2, got {groups}")
        variance = None
        if mean is not None and sum_of_squares is not None:
            variance = ((sum_of_squares - samples * mean.square()) / (groups - 1)).clamp_min(0.0)
        along = None if sum_dot_sq is None else _not_negative((sum_dot_sq - samples * grad_norm_sq**2) / (groups - 1))
        trace = _not_negative((sum_sq - samples * grad_norm_sq) / (groups - 1))
        return cls(samples, groups, grad_norm_sq, trace, along, mean, variance)


def _not_negative(value: float) -> float:
    """A difference of equals may round below zero; NaN stays."""
    return 0.0 if value < 0 else value


def _flatten(gradients: Tensor | Sequence[Tensor]) -> Tensor:
    several = [gradients] if isinstance(gradients, Tensor) else list(gradients)
    return torch.cat([g.detach().reshape(len(g), -1) for g in several], dim=1)
