"""Frechet and kernel distance between two sets of images, by torchmetrics, in the features of a small net.

The functions are for two sets at hand, the classes for a LightningModule that sees them batch by batch and on any
number of ranks.
"""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance  # torchmetrics.image has them with torch-fidelity only
from torchmetrics.image.kid import KernelInceptionDistance

from lightning_opt._checks import check_interval
from lightning_opt.registry import register

from ._dtype import moves_only
from .features import FeatureName, extract_features, features_for, load_features

Features = FeatureName | Literal["auto"] | nn.Module | None


@register(
    "tool",
    summary="Frechet distance between two sets of images (FID) in the features of a small net",
    paper="1706.08500",
)
def frechet_distance(samples: Tensor, reference: Tensor, features: Features = "auto") -> float:
    r"""Frechet distance between the Gaussians fitted to the features of two sets of images.

    .. math:: \lVert m_1 - m_2 \rVert^2 + \operatorname{tr}\bigl(C_1 + C_2 - 2 (C_1 C_2)^{1/2}\bigr)

    The estimate is too large, by about :math:`d^2 / 2n` for two sets of n from one distribution in d features of
    variance 1: it is comparable only between sets of the same size, and only in the same features. Score real images
    against the same reference beside it; :func:`score_samples` does.

    Args:
        samples: ``[N, C, H, W]``, floating point in [0, 1].
        reference: As many images that neither the model nor the feature net was trained on.
        features: ``"auto"`` for the shipped net of the images' size, or as for :func:`load_features`. None if
            ``samples`` and ``reference`` are features ``[N, d]`` already.

    Returns:
        The distance, computed in float64; 0 for equal Gaussians.

    Raises:
        ValueError: If the sets differ in size, hold fewer than 2, or are not images in [0, 1].

    Warns:
        UserWarning: If there are not more images than features, so that the covariances are singular.

    Cost: one pass of the net over both sets and an eigenvalue problem of d x d.

    Source: arXiv 1706.08500, equation 6.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(1000, 2, generator=generator, dtype=torch.float64)
        >>> round(frechet_distance(x + torch.tensor([3.0, 4.0]), x, features=None), 6)
        25.0
    """
    a, b = feature_pair(samples, reference, features)
    metric = FrechetDistance(AlreadyFeatures(a.shape[1])).to(a.device)
    metric.update(b, real=True)
    metric.update(a, real=False)
    return float(metric.compute())


@register(
    "tool",
    summary="Unbiased kernel distance between two sets of images (KID) in the features of a small net",
    paper="1801.01401",
)
def kernel_distance(
    samples: Tensor,
    reference: Tensor,
    features: Features = "auto",
    *,
    subsets: int = 1,
    subset_size: int | None = None,
    seed: int = 0,
) -> float:
    r"""Squared maximum mean discrepancy of the features of two sets of images, unbiased.

    The kernel is :math:`k(x, y) = (x^\top y / d + 1)^3`. The expectation is 0 for sets from one distribution, whatever
    their size, so the value may be negative.

    Args:
        samples: ``[N, C, H, W]``, floating point in [0, 1].
        reference: As many images that neither the model nor the feature net was trained on.
        features: As for :func:`frechet_distance`.
        subsets: Mean over this many random subsets, for sets whose N x N kernel matrices are too large.
        subset_size: Size of a subset; None for all N.
        seed: Seed of the choice of subsets; the global random state is neither used nor changed.

    Returns:
        The distance.

    Raises:
        ValueError: If the sets differ in size, hold fewer than 2, are not images in [0, 1], or if ``subset_size`` is
            not in [2, N].

    Cost: one pass of the net over both sets, and per subset three matrices of ``subset_size`` squared in float64.

    Source: arXiv 1801.01401, section 4.

    Example:
        >>> x = torch.eye(2, dtype=torch.float64)  # k is 1.5^3 for a row with itself, 1 for the two rows
        >>> kernel_distance(x, x, features=None) == 1 + 1 - (1.5**3 + 1)
        True
    """
    a, b = feature_pair(samples, reference, features)
    size = len(a) if subset_size is None else subset_size
    check_interval("subset_size", size, 2, len(a))
    metric = KernelDistance(AlreadyFeatures(a.shape[1]), subsets=subsets, subset_size=size, seed=seed)
    metric.update(b, real=True)
    metric.update(a, real=False)
    return float(metric.compute())


@register("module", summary="Frechet distance (FID) in the features of a small net, as a metric", paper="1706.08500")
class FrechetDistance(FrechetInceptionDistance):
    """:func:`frechet_distance` as a metric: torchmetrics' ``FrechetInceptionDistance`` in other features.

    Where covariances are singular it stays accurate, and torchmetrics' own may come out negative. Its sums are added
    over ranks and stay in float64 when the model around it is cast; neither they nor the net enter a checkpoint.

    Args:
        features: As for :func:`load_features`.
        reset_real_features: Set False to keep the real images' sums when the metric is reset after an epoch.
        **kwargs: As for :class:`torchmetrics.Metric`.

    Raises:
        ValueError: By ``update`` if images are not in [0, 1] or of another size than the net's; by ``compute`` if there
            are not as many real images as samples, or fewer than 2 of them.

    Warns:
        UserWarning: By ``compute``, if there are not more images than features.

    Example:
        >>> metric = FrechetDistance("digits8")
        >>> generator = torch.Generator().manual_seed(0)
        >>> for real in (True, False):
        ...     metric.update(torch.rand(100, 1, 8, 8, generator=generator), real=real)
        >>> float(metric.compute()) > 0
        True
    """

    def __init__(self, features: FeatureName | nn.Module, *, reset_real_features: bool = True, **kwargs: Any) -> None:
        super().__init__(
            feature=_InFloat64(features), normalize=True, reset_real_features=reset_real_features, **kwargs
        )

    def compute(self) -> Tensor:
        """The distance of all samples of all ranks, float64."""
        samples, real = int(self.fake_features_num_samples), int(self.real_features_num_samples)
        _check_counts(samples, real)
        if samples <= self.inception.num_features:
            warnings.warn(
                f"{samples} images in {self.inception.num_features} features: their covariance is singular, and the"
                " Frechet distance far too large. Take several times as many images, or the kernel distance.",
                stacklevel=2,
            )
        return _between_gaussians(
            *_moments(self.fake_features_sum, self.fake_features_cov_sum, samples),
            *_moments(self.real_features_sum, self.real_features_cov_sum, real),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "FrechetDistance":
        return super()._apply(moves_only(fn), *args, **kwargs)


@register("module", summary="Kernel distance (KID) in the features of a small net, as a metric", paper="1801.01401")
class KernelDistance(KernelInceptionDistance):
    """:func:`kernel_distance` as a metric: torchmetrics' ``KernelInceptionDistance`` in other features.

    It keeps the features of all images, in float64, and gives the mean over subsets alone, a number that can be logged.

    Args:
        features: As for :func:`load_features`.
        subsets: Mean over this many random subsets.
        subset_size: Size of a subset; None for all images.
        reset_real_features: Set False to keep the real images' features when the metric is reset after an epoch.
        seed: Seed of the choice of subsets, the same on every rank. torchmetrics' own draws from the global random
            state, which would change a training run.
        **kwargs: As for :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If a number is out of its range; by ``update`` if images are not in [0, 1] or of another size than
            the net's; by ``compute`` if there are not as many real images as samples, or fewer than ``subset_size``.

    Example:
        >>> metric = KernelDistance("digits8")
        >>> metric.update(torch.zeros(10, 1, 8, 8), real=True)
        >>> metric.update(torch.ones(10, 1, 8, 8), real=False)
        >>> float(metric.compute()) > 0
        True
    """

    def __init__(
        self,
        features: FeatureName | nn.Module,
        *,
        subsets: int = 1,
        subset_size: int | None = None,
        reset_real_features: bool = True,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_interval("subsets", subsets, 1)
        if subset_size is not None:
            check_interval("subset_size", subset_size, 2)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*will save all extracted features in buffer", UserWarning)
            super().__init__(
                feature=_InFloat64(features), subsets=subsets, reset_real_features=reset_real_features, **kwargs
            )
        self.all_images = subset_size is None
        self.subset_size = subset_size or 0
        self.seed = seed

    def compute(self) -> Tensor:
        """The distance of all samples of all ranks, float64."""
        samples, real = (sum(map(len, _as_list(part))) for part in (self.fake_features, self.real_features))
        _check_counts(samples, real)
        if self.all_images:
            self.subset_size = samples
        if self.subset_size > samples:
            raise ValueError(f"subset_size must be in [2, {samples}], the number of images, got {self.subset_size}")
        with torch.random.fork_rng(devices=[]):  # the subsets are drawn on the CPU
            torch.manual_seed(self.seed)
            mean, _ = super().compute()
        return mean

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "KernelDistance":
        return super()._apply(moves_only(fn), *args, **kwargs)


class AlreadyFeatures(nn.Identity):
    """In the place of a net, where the features are at hand."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def feature_pair(samples: Tensor, reference: Tensor, features: Features) -> tuple[Tensor, Tensor]:
    """Features ``[N, d]`` of two sets of images of the same size, in float64 on the samples' device."""
    if features is not None:
        net = features_for(samples, features, "samples")
        features_for(reference, net, "reference")
        _check_counts(len(samples), len(reference))
        return extract_features(samples, net), extract_features(reference.to(samples.device), net)
    for name, rows in (("samples", samples), ("reference", reference)):
        if rows.ndim != 2 or rows.shape[1] != samples.shape[-1]:
            raise ValueError(
                f"{name} must be of shape [N, {samples.shape[-1]}] for features=None, got {list(rows.shape)}"
            )
        if not rows.isfinite().all():
            raise ValueError(f"{name} must be finite, got {int((~rows.isfinite()).sum())} values that are not")
    _check_counts(len(samples), len(reference))
    return samples.double(), reference.to(samples.device).double()


class _InFloat64(nn.Module):
    """The features in float64, so that nothing behind them is computed in less."""

    def __init__(self, features: FeatureName | nn.Module) -> None:
        super().__init__()
        self.net = load_features(features)
        self.num_features = self.net.num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).double()


def _moments(total: Tensor, products: Tensor, count: int) -> tuple[Tensor, Tensor]:
    mean = total / count
    return mean, (products - count * mean.outer(mean)) / (count - 1)


def _between_gaussians(m1: Tensor, c1: Tensor, m2: Tensor, c2: Tensor) -> Tensor:
    """Equation 6 of arXiv 1706.08500, with tr (C1 C2)^1/2 as the sum of the singular values of a product of roots.

    torchmetrics sums the roots of the eigenvalues of C1 C2, which is not symmetric: where the covariances are singular,
    they come out wrong, and the distance of a set to itself with them.
    """
    cross = torch.linalg.svdvals(_root(c1).T @ _root(c2)).sum()
    return (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross


def _root(covariance: Tensor) -> Tensor:
    """R with R R' = C; eigenvalues that are rounding alone are 0."""
    values, vectors = torch.linalg.eigh(covariance)
    rounding = len(values) * torch.finfo(values.dtype).eps * values[-1].clamp(min=0)
    return vectors * torch.where(values > rounding, values, 0).sqrt()


def _check_counts(samples: int, reference: int) -> None:
    if samples != reference or samples < 2:
        raise ValueError(
            f"samples and reference must hold equally many images, at least 2, got {samples} and {reference}: a"
            " distance is comparable only between sets of the same size"
        )


def _as_list(states: Tensor | list[Tensor]) -> list[Tensor]:
    """What ranks have gathered is one tensor, what one process has kept is a list."""
    return [states] if isinstance(states, Tensor) else states
