"""Problems that optimizers are run on, and the runner."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

Gradient = Callable[[Tensor, int], Tensor]


def noisy_quadratic(steps: int, dim: int = 20, seed: int = 0) -> tuple[Tensor, Gradient]:
    """A start, and the gradient D (w - c) + noise, the noise fixed for each step; float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    start, c, d, noise = draw(dim), draw(dim), 0.5 + 1.5 * draw(dim).abs(), draw(steps, dim)
    return start, lambda w, t: d * (w - c) + noise[t]


def trajectory(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], start: Tensor, gradient: Gradient, steps):
    """The start and every iterate of an optimizer, ``[steps + 1, ...]``."""
    p = nn.Parameter(start.clone())
    optimizer = make([p])
    iterates = [start.clone()]
    for t in range(steps):
        p.grad = gradient(p.detach(), t).clone()  # some peers write into it
        optimizer.step()
        iterates.append(p.detach().clone())
    return torch.stack(iterates)


def naive_trajectory(step: Callable, start: Tensor, gradient: Gradient, steps: int) -> Tensor:
    """The same for ``step(w, g, memory, t) -> w`` on numpy arrays; ``memory`` is a dict that starts empty."""
    w, memory, iterates = start.numpy().copy(), {}, [start.clone()]
    for t in range(steps):
        g = gradient(torch.from_numpy(w), t).numpy()
        w = np.asarray(step(w, g, memory, t + 1))
        iterates.append(torch.from_numpy(w.copy()))
    return torch.stack(iterates)
