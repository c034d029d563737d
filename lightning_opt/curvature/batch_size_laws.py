import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from lightning_opt._checks import check_choice, check_interval


def rescale_lr(lr: float, base_batch: int, batch: int, rule: Literal["linear", "sqrt"] = "linear") -> float:
    """The learning rate for another batch size by a rule of thumb.

    Linear for SGD, square root for Adam. Both are upper bounds: the sharpness of a batch approaches that of all data,
    after which a larger batch allows no larger rate. :func:`predict_max_lr` knows that, from two measurements.

    Args:
        lr: The rate that works with ``base_batch``.
        base_batch: Batch size, positive.
        batch: The other batch size, positive.
        rule: ``"linear"`` or ``"sqrt"``.

    Raises:
        ValueError: If a number is not positive or the rule unknown.

    Source: arXiv:2006.09092, section 4.

    Example:
        >>> rescale_lr(0.1, 128, 512), rescale_lr(4e-4, 128, 512, rule="sqrt")
        (0.4, 0.0008)
    """
    check_interval("lr", lr, 0, closed="()")
    check_interval("base_batch", base_batch, 0, closed="()")
    check_interval("batch", batch, 0, closed="()")
    check_choice("rule", rule, ("linear", "sqrt"))
    ratio = batch / base_batch
    return lr * (ratio if rule == "linear" else math.sqrt(ratio))


def minibatch_eigenvalue(
    eigenvalue: float, noise: float, num_parameters: int, batch_size: int, dataset_size: int | None = None
) -> float:
    r"""An extreme eigenvalue of the Hessian of a batch, from that of all data.

    With :math:`r = \sqrt{P / b}`: :math:`\lambda + r^2 s^2 / \lambda` if :math:`|\lambda| > r s`, else the edge
    :math:`\pm 2 r s` of the noise, which hides it.

    Args:
        eigenvalue: :math:`\lambda`, the largest (positive) or smallest (negative) of all data.
        noise: :math:`s`, standard deviation of an entry of the Hessian of one sample.
        num_parameters: :math:`P`.
        batch_size: :math:`B`.
        dataset_size: :math:`N`; :math:`b = B / (1 - B / N)`, or :math:`B` without it.

    Raises:
        ValueError: If a number is out of its range.

    Source: arXiv:2006.09092, theorem 1 (the transition of Baik, Ben Arous and Peche for a spiked Wigner matrix).

    Example:
        >>> [minibatch_eigenvalue(l, 1.0, 600, 600) for l in (4.0, 2.0, 0.5)]
        [4.25, 2.5, 2.0]
    """
    check_interval("noise", noise, 0)
    check_interval("num_parameters", num_parameters, 1)
    spread = math.sqrt(num_parameters * _inverse(batch_size, dataset_size)) * noise
    if abs(eigenvalue) > spread:
        return eigenvalue + spread**2 / eigenvalue
    return math.copysign(2 * spread, eigenvalue)


class MaxLR(NamedTuple):
    """The largest stable learning rate as a function of the batch size.

    Attributes:
        sharpness: Largest eigenvalue of all data.
        noise: What a batch of one adds to it.
        dataset_size: Number of samples; None for a stream.
    """

    sharpness: float
    noise: float
    dataset_size: int | None

    def __call__(self, batch_size: int, momentum: float = 0.0) -> float:
        """2 (1 + momentum) / sharpness of a batch."""
        return 2 * (1 + momentum) / (self.sharpness + self.noise * _inverse(batch_size, self.dataset_size))


def predict_max_lr(batch_sizes: Sequence[int], ritz_max: Sequence[float], dataset_size: int | None = None) -> MaxLR:
    r"""The largest stable learning rate for any batch size, from the sharpness measured at two or more.

    Fits :math:`\lambda(B) = \lambda_1 + c / b` with :math:`b = B / (1 - B / N)`, exactly through two points, by least
    squares through more. It saturates for :math:`B \to N`, which the linear rule does not.

    Args:
        batch_sizes: At least two different ones.
        ritz_max: The largest Ritz value at each, averaged over several batches where batches are small.
        dataset_size: :math:`N`.

    Returns:
        A function of batch size and momentum.

    Raises:
        ValueError: If there are fewer than two sizes, or the fitted sharpness of all data is not positive.

    Source: arXiv:2006.09092, theorem 1 for a fixed eigenvalue; the fit is ours.

    Example:
        >>> largest = predict_max_lr([8, 512], [4.0, 1.0], dataset_size=1024)
        >>> round(largest(8), 9), round(largest(1024), 3) >= round(largest(512), 3)
        (0.5, True)
    """
    if len(batch_sizes) != len(ritz_max) or len(set(batch_sizes)) < 2:
        raise ValueError(
            f"batch_sizes must be two or more different ones, each with a Ritz value, got {batch_sizes} and {ritz_max}"
        )
    x = [_inverse(size, dataset_size) for size in batch_sizes]
    mean_x, mean_y = sum(x) / len(x), sum(ritz_max) / len(x)
    slope = sum((a - mean_x) * (y - mean_y) for a, y in zip(x, ritz_max, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )
    limit = mean_y - slope * mean_x
    if not limit > 0:
        raise ValueError(
            f"ritz_max must grow less than in proportion to 1 / batch size, got {ritz_max} at {batch_sizes}"
        )
    return MaxLR(limit, slope, dataset_size)


def _inverse(batch_size: int, dataset_size: int | None) -> float:
    """1 / b: how far the mean of a batch is from that of all data."""
    check_interval("batch_size", batch_size, 1, *([] if dataset_size is None else [dataset_size]))
    return 1 / batch_size - (0.0 if dataset_size is None else 1 / dataset_size)
