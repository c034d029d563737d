"""Consensus-based optimization and consensus hopping as loops over particles and coordinates, from the paper."""

import math
from collections.abc import Callable

Point = list[float]


def consensus(points: list[Point], values: list[float], alpha: float) -> Point:
    least = min(values)
    weights = [math.exp(-alpha * (value - least)) for value in values]
    return [sum(w * x[k] for w, x in zip(weights, points, strict=True)) / sum(weights) for k in range(len(points[0]))]


def move(point: Point, center: Point, xi: Point, dt: float, lam: float, sigma: float, isotropic: bool) -> Point:
    distance = [x - c for x, c in zip(point, center, strict=True)]
    length = math.sqrt(sum(d**2 for d in distance))
    return [
        x - lam * dt * d + sigma * math.sqrt(dt) * (length if isotropic else d) * n
        for x, d, n in zip(point, distance, xi, strict=True)
    ]


def train(
    f: Callable[[Point], float],
    particles: list[Point],
    epochs: int,
    steps: int,
    order: Callable[[int], list[int]],
    noise: Callable[[int], list[Point]],
    kick: Callable[[int], list[Point]],
    *,
    batch: int,
    full: bool,
    dt: float,
    lam: float,
    sigma: float,
    alpha: float,
    tol: float,
    isotropic: bool,
) -> list[Point]:
    """The authors' training of networks: batches of particles, a kick on stagnation, cooling after an epoch.

    Returns:
        The consensus after every step.
    """
    path, before, moves = [], None, 0
    for epoch in range(1, epochs + 1):
        for step in range(steps):
            permutation = order((epoch - 1) * steps + step)
            for start in range(0, len(particles), batch):
                some = permutation[start : start + batch]
                center = consensus([particles[i] for i in some], [f(particles[i]) for i in some], alpha)
                xi, extra = noise(moves), kick(moves)
                for i in range(len(particles)) if full else some:
                    particles[i] = move(particles[i], center, xi[i], dt, lam, sigma, isotropic)
                if before is not None and max(abs(c - b) for c, b in zip(center, before, strict=True)) < tol:
                    for i, point in enumerate(particles):
                        particles[i] = [x + sigma * math.sqrt(dt) * n for x, n in zip(point, extra[i], strict=True)]
                before, moves = center, moves + 1
            path.append(before)
        sigma *= math.log2(epoch + 1) / math.log2(epoch + 2)
        alpha *= 2
    return path
