"""The samplers of the multiplicative diffusion model as the paper writes them: on x, with sigma, mu and a step size."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def dale(
    x: Tensor,
    stein: Callable[[Tensor, float], Tensor],
    times: list[float],
    delta: float,
    sigma: float,
    mu: float,
    generator: torch.Generator,
    inner_steps: int = 1,
    factor: float = 1.0,
    anneal: float = 1.0,
) -> Tensor:
    """x <- x exp(delta sigma^2 x s - delta (mu - 1.5 sigma^2) + sqrt(delta) sigma Z) at each of the times."""
    for t in times:
        for _ in range(inner_steps):
            z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            exponent = delta * sigma**2 * x * stein(x, t) - delta * (mu - 1.5 * sigma**2)
            x = x * torch.exp(exponent + anneal * math.sqrt(delta) * sigma * z)
        anneal *= factor
    return x


def ambient(
    x: Tensor,
    stein: Callable[[Tensor, float], Tensor],
    times: list[float],
    delta: float,
    sigma: float,
    mu: float,
    generator: torch.Generator,
    inner_steps: int = 1,
    factor: float = 1.0,
    anneal: float = 1.0,
) -> Tensor:
    """x <- x (1 + 2 delta sigma^2 - delta mu + delta sigma^2 x s + sqrt(delta) sigma Z)."""
    for t in times:
        for _ in range(inner_steps):
            z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            step = 2 * delta * sigma**2 - delta * mu + delta * sigma**2 * x * stein(x, t)
            x = x * (1 + step + anneal * math.sqrt(delta) * sigma * z)
        anneal *= factor
    return x
