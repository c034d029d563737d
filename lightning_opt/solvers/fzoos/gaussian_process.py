"""The surrogate of one client: a Gaussian process with an RBF kernel, its gradient and how sure that is."""

import math

import torch
from torch import Tensor

from lightning_opt._checks import check_interval

_JITTERS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3)


class GaussianProcess:
    """A Gaussian process fitted to values at n points, with ``k(a, b) = exp(-|a - b|^2 / (2 l^2))``.

    The values are fitted less their mean and in units of their standard deviation; ``noise`` is in these units, and
    what the methods return is in the units of the values again. Everything is computed in float64.

    Args:
        points: ``[n, d]``.
        values: ``[n]``.
        lengthscale: l, in the units of the points.
        noise: Variance of the noise of a value, as a share of the values' variance. Where the kernel matrix is
            numerically singular with it, 1e-6 to 1e-3 are added.
        least_variance: Variance of the noise in the units of the values; the larger of both counts.

    Raises:
        ValueError: If a number is out of range, the shapes do not fit, or points or values are not finite.

    Cost:
        O(n^2 (n + d)) to fit.

    Example:
        >>> x = torch.linspace(0, 1, 20, dtype=torch.float64)[:, None]
        >>> surrogate = GaussianProcess(x, (x[:, 0] - 0.2) ** 2, lengthscale=0.5)
        >>> float(surrogate.gradient(torch.tensor([0.7]))[0].round(decimals=2))
        1.0
    """

    def __init__(
        self, points: Tensor, values: Tensor, *, lengthscale: float, noise: float = 1e-6, least_variance: float = 0.0
    ) -> None:
        check_interval("lengthscale", lengthscale, 0, closed="()")
        check_interval("noise", noise, 0)
        check_interval("least_variance", least_variance, 0)
        if points.ndim != 2 or values.shape != points.shape[:1] or not len(values):
            raise ValueError(
                f"points [n, d] and values [n] needed, got {tuple(points.shape)} and {tuple(values.shape)}"
            )
        self.points = points.detach().to(torch.float64)
        values = values.detach().to(torch.float64)
        if not (self.points.isfinite().all() and values.isfinite().all()):
            raise ValueError("points and values must be finite")
        self.lengthscale = float(lengthscale)
        self.offset, self.scale = standard_units(values)
        self.targets = (values - self.offset) / self.scale
        self.noise = max(float(noise), least_variance / self.scale**2)
        self.factor = cholesky(rbf(self.points, self.points, self.lengthscale), self.noise)
        self.coefficients = torch.cholesky_solve(self.targets[:, None], self.factor)[:, 0]

    def mean(self, x: Tensor) -> Tensor:
        """The posterior mean at points ``[m, d]``: ``[m]``."""
        x = x.to(torch.float64)
        return self.offset + self.scale * (rbf(x, self.points, self.lengthscale) @ self.coefficients)

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient ``[d]`` of the posterior mean at one point ``[d]`` (arXiv:2308.04077)."""
        x = x.to(torch.float64)
        weights = rbf(x[None], self.points, self.lengthscale)[0] * self.coefficients
        return self.scale / self.lengthscale**2 * (weights @ self.points - weights.sum() * x)

    def gradient_uncertainty(self, x: Tensor) -> Tensor:
        """The trace of the posterior covariance of the gradient at points ``[m, d]``, in units of the scale: ``[m]``.

        It is ``d / l^2`` far from all data and 0 where the gradient is known. Cost: O(n^2 (n + m + d)).
        """
        x = x.to(torch.float64)
        center, d = x.mean(0), x.shape[1]
        points, x = self.points - center, x - center
        kernel = rbf(x, points, self.lengthscale)
        inverse = torch.cholesky_inverse(self.factor)  # of norm 1e6 at most: its rounding makes an error of 1e-7 here
        weights = kernel @ inverse
        # k^T (K^-1 o S) k with the inner products S_ij = (x_i - x) (x_j - x), taken apart so that they are made once
        explained = (
            (kernel @ (inverse * (points @ points.T)) * kernel).sum(1)
            - 2 * (weights * kernel * (x @ points.T)).sum(1)
            + x.square().sum(1) * (weights * kernel).sum(1)
        )
        return (d / self.lengthscale**2 - explained / self.lengthscale**4).clamp_min(0)

    def log_marginal_likelihood(self) -> float:
        """The logarithm of the density of the standardized values."""
        fit = self.targets @ self.coefficients
        volume = 2 * self.factor.diagonal().log().sum()
        return -0.5 * float(fit + volume + len(self.targets) * math.log(2 * math.pi))


def rbf(a: Tensor, b: Tensor, lengthscale: float) -> Tensor:
    """``exp(-|a_i - b_j|^2 / (2 l^2))`` for ``[m, d]`` and ``[n, d]``: ``[m, n]``."""
    # differences, not inner products: points lie within 1e-2 of each other, far from the origin
    distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.exp(-0.5 * (distances / lengthscale) ** 2)


def standard_units(values: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of values; a deviation of 1 where all are equal to rounding."""
    mean, deviation = float(values.mean()), float(values.std(unbiased=False))
    return mean, deviation if deviation > 1e-14 * max(abs(mean), 1e-300) else 1.0


def cholesky(matrix: Tensor, noise: float) -> Tensor:
    """The lower factor of ``matrix + noise I``, with 1e-6 to 1e-3 added where it is not positive definite.

    Raises:
        ValueError: If it is not positive definite even so.
    """
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    for jitter in _JITTERS:
        factor, failed = torch.linalg.cholesky_ex(matrix + (noise + jitter) * identity)
        if not failed and factor.isfinite().all():
            return factor
    raise ValueError(f"the kernel matrix is not positive definite, even with {_JITTERS[-1]} added to its diagonal")
