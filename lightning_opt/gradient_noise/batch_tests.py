"""The tests of a batch size, and what follows from them (arXiv:2402.11215)."""

import math
from typing import Literal

import torch

from lightning_opt._checks import check_choice, check_interval

from .statistics import GradientStatistics

BatchTest = Literal["norm", "inner_product", "augmented_inner_product", "coordinate"]


def required_batch_size(
    statistics: GradientStatistics,
    test: BatchTest = "norm",
    *,
    eta: float = 0.5,
    theta: float = 0.9,
    nu: float = 5.84,
    quantile: float = 0.95,
    debias: bool = False,
) -> float:
    r"""The batch size at which the noise of the mean gradient would pass a test.

    With the trace S of the covariance of one sample's gradient, the variance V of its inner product with the mean
    gradient :math:`\bar g`, and the variance W orthogonal to it, the least b with

    - ``"norm"``: :math:`S / b \le \eta^2 \lVert \bar g \rVert^2`;
    - ``"inner_product"``: :math:`V / b \le \theta^2 \lVert \bar g \rVert^4`;
    - ``"augmented_inner_product"``: that, and :math:`W / b \le \nu^2 \lVert \bar g \rVert^2`;
    - ``"coordinate"``: :math:`\mathrm{Var}_j / b \le \eta^2 \bar g_j^2` in a share ``quantile`` of the coordinates (in
      all, as in the theory, with 1: a single gradient near zero then asks for everything).

    Args:
        statistics: Of one batch.
        test: Which test.
        eta: Noise that the norm and coordinate tests accept, relative to the gradient; positive. Smaller means larger
            batches.
        theta: The same of the inner product tests.
        nu: The same orthogonal to the gradient.
        quantile: Share of coordinates that must pass, in (0, 1].
        debias: Take :math:`\lVert \bar g \rVert^2 - S / b` for the squared norm, which is unbiased; the norm test is
            then the gradient noise scale of arXiv:1812.06162 over :math:`\eta^2`. The authors do not.

    Returns:
        A whole number as a float: 0 where there is no noise, ``inf`` where there is noise and no gradient, NaN where
        the statistics are not finite.

    Raises:
        ValueError: If a value is out of range, or the statistics lack what the test needs.

    Example:
        >>> statistics = GradientStatistics(samples=4, groups=4, grad_norm_sq=0.25, var_trace=1.0)
        >>> required_batch_size(statistics, eta=0.5)
        16.0
    """
    check_thresholds(test, eta=eta, theta=theta, nu=nu, quantile=quantile)
    norm_sq = max(statistics.unbiased_grad_norm_sq, 1e-30) if debias else statistics.grad_norm_sq
    if test == "norm":
        return _ceil(_ratio(statistics.var_trace, eta**2 * norm_sq))
    if test == "coordinate":
        if statistics.variance is None or statistics.mean is None:
            raise ValueError("test='coordinate' needs the variance of each coordinate, which these statistics lack")
        mean_sq = statistics.mean.square()
        if debias:
            mean_sq = (mean_sq - statistics.variance / statistics.samples).clamp_min(1e-30)
        requests = statistics.variance / (eta**2 * mean_sq)
        requests = torch.where(statistics.variance == 0, torch.zeros_like(requests), requests)
        if requests.isnan().any():
            return math.nan
        rank = min(max(math.ceil(quantile * requests.numel()), 1), requests.numel())
        return _ceil(requests.kthvalue(rank).values.item())
    if statistics.var_along is None or statistics.var_orthogonal is None:
        raise ValueError(f"test={test!r} needs the variance along the gradient, which these statistics lack")
    along = _ratio(statistics.var_along, theta**2 * norm_sq**2)
    if test == "inner_product":
        return _ceil(along)
    orthogonal = _ratio(statistics.var_orthogonal, nu**2 * norm_sq)
    return _ceil(math.nan if math.isnan(along) or math.isnan(orthogonal) else max(along, orthogonal))


def check_thresholds(test: str, *, eta: float, theta: float, nu: float, quantile: float) -> None:
    """Raise ValueError, naming it, for a value that a test cannot use; ``inf`` is a threshold that all pass."""
    check_choice("test", test, ["norm", "inner_product", "augmented_inner_product", "coordinate"])
    for name, value in (("eta", eta), ("theta", theta), ("nu", nu)):
        if value != math.inf:
            check_interval(name, value, 0.0, closed="(]")
    check_interval("quantile", quantile, 0.0, 1.0, closed="(]")


def next_batch_size(current: int, requested: float, b_max: int, growth_cap: float | None = None) -> int:
    """The monotone rule: as requested, never smaller, at most ``growth_cap`` times as large, and at most ``b_max``.

    Args:
        current: The batch size now.
        requested: What :func:`required_batch_size` returned; NaN asks for nothing.
        b_max: The largest batch size.
        growth_cap: How much it may grow at once, above 1; None for any growth.

    Raises:
        ValueError: If ``growth_cap`` is not above 1.

    Example:
        >>> next_batch_size(32, 1000.0, b_max=4096), next_batch_size(32, 1000.0, b_max=4096, growth_cap=2.0)
        (1000, 64)
        >>> next_batch_size(32, 5.0, b_max=4096)
        32
    """
    if growth_cap is not None:
        check_interval("growth_cap", growth_cap, 1.0, closed="(]")
        requested = min(requested, math.ceil(growth_cap * current)) if not math.isnan(requested) else requested
    if math.isnan(requested):
        return current
    return max(current, int(min(requested, b_max)))


def split_batch(batch: int, max_micro: int | None = None, world_size: int = 1) -> tuple[int, int]:
    """Divide a batch into micro-batches of equal size.

    The fewest micro-batches that ``max_micro`` allows, and then the smallest that hold the batch, so the batch is
    exceeded by less than their number. (The authors fill micro-batches up to ``max_micro`` and exceed it by more.)

    Args:
        batch: Samples on all ranks together.
        max_micro: The most samples of a micro-batch on a rank; None for no bound.
        world_size: Number of ranks.

    Returns:
        Samples of a micro-batch on each rank, and micro-batches of a step. The effective batch is their product times
        ``world_size``, at least ``batch``.

    Raises:
        ValueError: If a number is below 1.

    Example:
        >>> split_batch(1000, max_micro=256), split_batch(1000, max_micro=256, world_size=2)
        ((250, 4), (250, 2))
    """
    for name, value in (("batch", batch), ("max_micro", max_micro), ("world_size", world_size)):
        if value is not None:
            check_interval(name, value, 1)
    accum = 1 if max_micro is None else -(-batch // (world_size * max_micro))
    return -(-batch // (world_size * accum)), accum


def _ratio(noise: float, allowed: float) -> float:
    if noise == 0:
        return 0.0
    return noise / allowed if allowed != 0 else math.copysign(math.inf, noise) if not math.isnan(noise) else math.nan


def _ceil(value: float) -> float:
    return float(math.ceil(value)) if math.isfinite(value) else value
