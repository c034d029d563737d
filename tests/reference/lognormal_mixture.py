"""A mixture of log-normal distributions, blurred by geometric Brownian motion: all in closed form, in float64."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor


@dataclass(frozen=True)
class LognormalMixture:
    """Weights (k,), means and standard deviations of log x0 (k, d); the coordinates of a component are independent."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    def log_density(self, y: Tensor, shift: float, rho: float) -> Tensor:
        """Log density of y = log x_t, (n, d) to (n,): a component gains the variance rho^2 and moves by the shift."""
        return self._joint(y, shift, rho).logsumexp(-1)

    def epsilon(self, y: Tensor, shift: float, rho: float) -> Tensor:
        """E[eps | log x_t = y], (n, d) to (n, d): minus rho times the gradient of the log density."""
        share = self._joint(y, shift, rho).softmax(-1)
        z = (y[:, None, :] - shift - self.means) / (self.stds**2 + rho**2)
        return rho * torch.einsum("nk,nkd->nd", share, z)

    def hyvarinen(self, y: Tensor, shift: float, rho: float) -> Tensor:
        """X times the gradient of log p(x): the density of x is that of log x over x."""
        return -1 - self.epsilon(y, shift, rho) / rho

    def sample_log(self, n: int, generator: torch.Generator) -> Tensor:
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[k] + self.stds[k] * noise

    def spread_out(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Log x0 and standard normal noise, (n, d) each, at low-discrepancy points: their means converge quicker."""
        d = self.means.shape[1]
        engine = torch.quasirandom.SobolEngine(1 + 2 * d, scramble=True, seed=seed)
        u = engine.draw(n, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
        k = torch.searchsorted(self.weights.cumsum(0)[:-1], u[:, 0].contiguous())
        z = math.sqrt(2) * torch.erfinv(2 * u[:, 1:] - 1)
        return self.means[k] + self.stds[k] * z[:, :d], z[:, d:]

    def log_quantiles(self, n: int) -> Tensor:
        """The quantiles of log x0 at (i + 1/2) / n, in one dimension, by bisection."""
        levels = (np.arange(n) + 0.5) / n
        mean, std, weight = (v.double().flatten().numpy() for v in (self.means, self.stds, self.weights))
        low, high = np.full(n, (mean - 12 * std).min()), np.full(n, (mean + 12 * std).max())
        for _ in range(50):
            middle = 0.5 * (low + high)
            below = (weight * ndtr((middle[:, None] - mean) / std)).sum(1) < levels
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return torch.from_numpy(0.5 * (low + high))

    def _joint(self, y: Tensor, shift: float, rho: float) -> Tensor:
        variance = self.stds**2 + rho**2
        z = y[:, None, :] - shift - self.means
        return (-0.5 * (z**2 / variance + torch.log(2 * math.pi * variance))).sum(-1) + self.weights.log()

    def to(self, dtype: torch.dtype) -> "LognormalMixture":
        return LognormalMixture(self.weights.to(dtype), self.means.to(dtype), self.stds.to(dtype))


def one_dimensional() -> LognormalMixture:
    """The two-mode target of the published checks of the samplers."""
    return LognormalMixture(*(torch.tensor(v).double() for v in ([0.35, 0.65], [[-0.3], [0.9]], [[0.15], [0.25]])))


def two_dimensional() -> LognormalMixture:
    """Two modes apart along the diagonal, so that the coordinates depend on each other."""
    return LognormalMixture(
        *(torch.tensor(v).double() for v in ([0.4, 0.6], [[-0.3, 0.8], [0.7, -0.2]], [[0.15, 0.3], [0.25, 0.15]]))
    )


def gauss_hermite(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the standard normal distribution."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
