"""What FZooS is measured beside: finite differences, plain and with the corrections of gradient-based methods."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_opt._checks import check_choice, check_interval

from .adam import Adam
from .box import Bounds, Box
from .evaluate import Objective, finite, one_by_one
from .fzoos import check_fits
from .result import MinimizeResult


def fedzo_minimize(
    fns: Sequence[Callable[[Tensor], float | Tensor]],
    x0: Tensor,
    *,
    rounds: int,
    correction: Literal["none", "prox", "scaffold"] = "none",
    local_steps: int = 10,
    lr: float = 0.01,
    directions: int = 20,
    mu: float = 0.01,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
    progress: bool = False,
) -> MinimizeResult:
    """FedZO: local Adam on forward differences along random orthonormal directions; clients are simulated.

    Args:
        fns: One function a client, as for :func:`fzoos_minimize`.
        x0: The start ``[d]``.
        rounds: Rounds of ``local_steps`` steps.
        correction: From the second round on. ``"prox"`` adds ``x - x_r`` to the gradient, with x_r the round's start
            (FedProx with weight 1). ``"scaffold"`` adds the clients' mean gradient of the last round less one's own
            (SCAFFOLD, option II).
        local_steps: Steps of a client in a round.
        lr: Of the local Adam, whose moments start from zero every round; in units of the bounds.
        directions: Differences a step, at most d orthonormal ones; their projections are summed and divided by their
            number.
        mu: Length of a difference, in units of the bounds.
        bounds: As for :func:`fzoos_minimize`.
        seed: Of the directions.
        progress: Show a progress bar.

    Returns:
        As of :func:`fzoos_minimize`; ``objective`` is the clients' mean where they evaluated the server's points, so
        unknown (NaN) for the last.

    Raises:
        ValueError: If an argument is out of its range.
        NonFiniteObjectiveError: If a function returns NaN or infinity.

    Cost:
        ``local_steps * (directions + 1)`` evaluations of a client a round, and d numbers sent and received (2 d with
        ``"scaffold"``).

    Source: Fang et al. (2022), arXiv:2201.09531; corrections and constants as in the experiments of arXiv:2308.04077.

    Example:
        >>> fns = [lambda x, c=c: ((x - c) ** 2).sum() for c in (0.3, 0.5)]
        >>> result = fedzo_minimize(fns, torch.full((4,), 0.6), rounds=6, lr=0.03, directions=4)
        >>> result.x.round(decimals=1).tolist(), int(result.queries[-1])
        ([0.4, 0.4, 0.4, 0.4], 600)
    """
    check_choice("correction", correction, ("none", "prox", "scaffold"))
    check_interval("rounds", rounds, 0)
    check_interval("local_steps", local_steps, 1)
    check_interval("directions", directions, 1)
    check_interval("lr", lr, 0, closed="()")
    check_interval("mu", mu, 0, closed="()")
    check_fits(x0, len(fns), max_dim=2**31)
    box = Box(bounds, len(x0))
    directions = min(directions, len(x0))
    generators = [torch.Generator().manual_seed(seed * len(fns) + k) for k in range(len(fns))]
    server = box.to_unit(x0)
    own = [torch.zeros_like(server) for _ in fns]  # mean gradients of the last round
    shared = torch.zeros_like(server)
    points, values, queries, num_bytes = [server], list[float](), [0], [0]
    for number in tqdm(range(rounds), unit="round", disable=not progress):
        ends, starts = [], []
        for k, fn in enumerate(fns):
            x, adam, total = server, Adam(lr, server), torch.zeros_like(server)
            for t in range(local_steps):
                value, gradient = _difference(one_by_one(fn), k, x, directions, mu, box, generators[k])
                if t == 0:
                    starts.append(value)
                total += gradient
                if correction == "prox" and number:
                    gradient = gradient + x - server
                if correction == "scaffold" and number:
                    gradient = gradient + shared - own[k]
                x = box.clip(x - adam.step(gradient))
            own[k] = total / local_steps
            ends.append(x)
        server, shared = torch.stack(ends).mean(0), torch.stack(own).mean(0)
        points.append(server)
        values.append(sum(starts) / len(fns))
        queries.append(queries[-1] + len(fns) * local_steps * (directions + 1))
        num_bytes.append(num_bytes[-1] + (2 if correction == "scaffold" else 1) * 2 * 8 * len(x0))
    trajectory = torch.stack([box.from_unit(point) for point in points])
    return MinimizeResult(
        x=trajectory[-1],
        points=trajectory,
        objective=torch.tensor([*values, math.nan], dtype=torch.float64),
        queries=torch.tensor(queries),
        num_bytes=torch.tensor(num_bytes),
    )


def _difference(
    objective: Objective,
    client: int,
    x: Tensor,
    count: int,
    mu: float,
    box: Box,
    generator: torch.Generator,
) -> tuple[float, Tensor]:
    """The value at x, and a gradient from forward differences along random orthonormal directions."""
    directions = torch.linalg.qr(torch.randn(len(x), count, generator=generator, dtype=torch.float64)).Q.T
    points = torch.cat([x[None], box.clip(x + mu * directions)])
    values = finite(objective(box.from_unit(points)), f"client {client}")
    return float(values[0]), (values[1:] - values[0]) / (count * mu) @ directions
