"""Random Fourier features: what lets clients send a surrogate as M numbers."""

import math

import torch
from torch import Tensor

from lightning_opt._checks import check_interval

from .gaussian_process import cholesky, standard_units


class RandomFeatures:
    """M features whose inner products approximate the RBF kernel: ``sqrt(2 / M) cos(V^T x + b)``.

    A function is then M weights, so that the mean of the clients' functions is the mean of their weights. All clients
    draw the same features from one seed (Rahimi and Recht, 2007; arXiv:2308.04077). In float64.

    Args:
        dim: d.
        n_features: M; the kernel is approximated to about ``1 / sqrt(M)``.
        lengthscale: l of the kernel.
        seed: Of the features; the global random state is neither used nor changed.

    Raises:
        ValueError: If a number is out of range.

    Cost: ``8 M (d + 1)`` bytes.

    Example:
        >>> features = RandomFeatures(2, 1000, lengthscale=1.0, seed=0)
        >>> x = torch.rand(30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> weights = features.fit(x, x.square().sum(dim=1), noise=1e-6)
        >>> features.gradient(torch.tensor([0.5, 0.25]), weights).round(decimals=2).tolist()
        [1.0, 0.5]
    """

    def __init__(self, dim: int, n_features: int, *, lengthscale: float, seed: int) -> None:
        check_interval("dim", dim, 1)
        check_interval("n_features", n_features, 1)
        check_interval("lengthscale", lengthscale, 0, closed="()")
        generator = torch.Generator().manual_seed(seed)
        self._directions = torch.randn(dim, n_features, generator=generator, dtype=torch.float64)
        self.phases = 2 * math.pi * torch.rand(n_features, generator=generator, dtype=torch.float64)
        self.lengthscale = float(lengthscale)
        self._amplitude = math.sqrt(2 / n_features)

    @property
    def frequencies(self) -> Tensor:
        """V, ``[d, M]``; another lengthscale only scales it."""
        return self._directions / self.lengthscale

    def __call__(self, x: Tensor) -> Tensor:
        """The features ``[m, M]`` of points ``[m, d]``."""
        return self._amplitude * torch.cos(x.to(torch.float64) @ self.frequencies + self.phases)

    def fit(self, points: Tensor, values: Tensor, *, noise: float = 1e-6, least_variance: float = 0.0) -> Tensor:
        """The weights ``[M]`` of a function with these values, up to a constant, by ridge regression in dual form.

        Args:
            points: ``[n, d]``.
            values: ``[n]``, fitted less their mean and in units of their standard deviation.
            noise: The ridge, as the noise of :class:`GaussianProcess`.
            least_variance: As there.

        Returns:
            Weights in the units of the values, so that those of several clients can be averaged.
        """
        values = values.to(torch.float64)
        offset, scale = standard_units(values)
        features = self(points)
        factor = cholesky(features @ features.T, max(noise, least_variance / scale**2))
        dual = torch.cholesky_solve(((values - offset) / scale)[:, None], factor)[:, 0]
        return scale * (dual @ features)

    def gradient(self, x: Tensor, weights: Tensor) -> Tensor:
        """The gradient ``[d]`` at one point ``[d]`` of the function with these weights."""
        waves = torch.sin(x.to(torch.float64) @ self.frequencies + self.phases)
        return -self._amplitude * (self.frequencies @ (waves * weights))
