"""DEIS as the paper writes it, in x and t, by adaptive quadrature; and problems whose noise prediction is known."""

import math
from collections.abc import Callable, Sequence

import torch
from scipy.integrate import quad
from torch import Tensor


def coefficient(
    past: Sequence[float],
    target: float,
    j: int,
    transition: Callable[[float, float], float],
    weight: Callable[[float], float],
) -> float:
    """C_ij of arXiv:2204.13902, psi(t', u) w(u) l_j(u) from the newest of the past times, the first, to t'."""

    def integrand(u: float) -> float:
        lagrange = math.prod((u - other) / (past[j] - other) for k, other in enumerate(past) if k != j)
        return transition(target, u) * weight(u) * lagrange

    return quad(integrand, past[0], target, epsabs=1e-13, epsrel=1e-13)[0]


class GaussianMixture:
    """Numbers from a mixture of Gaussians under noise rho: the exact noise prediction of z = x0 + rho * eps.

    The default is the logarithm of the two-mode log-normal mixture that samplers are measured on.
    """

    def __init__(
        self,
        weights: Sequence[float] = (0.35, 0.65),
        means: Sequence[float] = (-0.3, 0.9),
        deviations: Sequence[float] = (0.15, 0.25),
    ) -> None:
        self.weights, self.means, self.deviations = (
            torch.tensor(part, dtype=torch.float64) for part in (weights, means, deviations)
        )

    def denoised(self, z: Tensor, rho: float) -> Tensor:
        """E[x0 | z]."""
        variance = self.deviations**2 + rho**2
        away = z[..., None].double() - self.means
        share = (self.weights.log() - variance.log() / 2 - away**2 / (2 * variance)).softmax(dim=-1)
        return (share * (self.means + self.deviations**2 / variance * away)).sum(dim=-1)

    def epsilon(self, z: Tensor, rho: float) -> Tensor:
        return (z - self.denoised(z, rho)) / rho

    def sample(self, count: int, rho: float, generator: torch.Generator) -> Tensor:
        """Exact draws at noise level rho."""
        mode = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, generator=generator, dtype=torch.float64)
        return self.means[mode] + (self.deviations[mode] ** 2 + rho**2).sqrt() * noise

    def solve(self, z: Tensor, rho_from: float, rho_to: float, steps: int = 1500) -> Tensor:
        """The probability-flow ODE by classical Runge-Kutta steps, uniform in the cube root of rho."""
        grid = torch.linspace(rho_from ** (1 / 3), rho_to ** (1 / 3), steps + 1, dtype=torch.float64).tolist()
        for now, after in zip(grid, grid[1:], strict=False):
            now, after = now**3, after**3
            h = after - now
            k1 = self.epsilon(z, now)
            k2 = self.epsilon(z + h / 2 * k1, now + h / 2)
            k3 = self.epsilon(z + h / 2 * k2, now + h / 2)
            k4 = self.epsilon(z + h * k3, after)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return z


def power_grid(high: float, low: float, steps: int, power: float = 3.0) -> Tensor:
    """Falling numbers, even in their 1 / power-th powers."""
    return torch.linspace(high ** (1 / power), low ** (1 / power), steps + 1, dtype=torch.float64) ** power


def run(calls: Sequence, epsilon: Callable[[Tensor, float], Tensor], v: Tensor) -> Tensor:
    """Follow a plan of network calls, keeping every prediction."""
    history: list[Tensor] = []
    start = v
    for call in calls:
        history.insert(0, epsilon(v, call.rho))
        start = v if call.stage == 0 else start
        v = start + sum(c * e for c, e in zip(call.coefficients, history, strict=False))
    return v
