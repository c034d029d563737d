"""The evolution strategy with covariance matrix adaptation (Hansen, arXiv:1604.00772), as the paper trains with it."""

from collections.abc import Callable

import numpy as np


def cma_es(
    function: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
    rng: np.random.Generator,
    *,
    deviation: float = 0.1,
    population: int = 128,
    generations: int = 10_000,
    patience: int = 100,
) -> tuple[np.ndarray, float]:
    """Minimize a function of several variables.

    Args:
        function: From points ``[population, n]`` to values ``[population]``; infinity is worse than any number.
        start: The first mean, ``[n]``.
        rng: Where the samples come from.
        deviation: The first standard deviation.
        population: Samples a generation.
        generations: At most.
        patience: From this generation on, stop when the best is older than half of the generations so far.

    Returns:
        The best point seen and its value.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> point, value = cma_es(lambda p: ((p - [1.0, 2.0]) ** 2).sum(1), np.zeros(2), rng, generations=150)
        >>> point.round(6).tolist()
        [1.0, 2.0]
    """
    n = len(start)
    parents = population // 2
    weights = np.log((population + 1) / 2) - np.log(np.arange(1, parents + 1))
    weights /= weights.sum()
    effective = 1 / (weights**2).sum()
    # equations 55 to 58 of the tutorial, positive weights only
    c_sigma = (effective + 2) / (n + effective + 5)
    d_sigma = 1 + 2 * max(0.0, np.sqrt((effective - 1) / (n + 1)) - 1) + c_sigma
    c_path = (4 + effective / n) / (n + 4 + 2 * effective / n)
    c_one = 2 / ((n + 1.3) ** 2 + effective)
    c_mu = min(1 - c_one, 2 * (0.25 + effective + 1 / effective - 2) / ((n + 2) ** 2 + effective))
    length = np.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))  # of a standard normal vector

    mean, sigma = start.astype(np.float64), deviation
    covariance, path, sigma_path = np.eye(n), np.zeros(n), np.zeros(n)
    best, best_value, best_age = mean.copy(), float(function(mean[None])[0]), 0
    for generation in range(1, generations + 1):
        axes, basis = np.linalg.eigh(covariance)
        spread = np.sqrt(np.maximum(axes, 1e-300))
        y = (rng.standard_normal((population, n)) * spread) @ basis.T
        points = mean + sigma * y
        values = function(points)
        values = np.where(np.isnan(values), np.inf, values)
        order = np.argsort(values, kind="stable")[:parents]
        if values[order[0]] < best_value:
            best, best_value, best_age = points[order[0]].copy(), float(values[order[0]]), generation
        if generation >= patience and best_age < generation / 2:
            break
        step = weights @ y[order]
        mean = mean + sigma * step
        sigma_path = (1 - c_sigma) * sigma_path
        sigma_path += np.sqrt(c_sigma * (2 - c_sigma) * effective) * (basis @ ((basis.T @ step) / spread))
        norm = np.linalg.norm(sigma_path)
        steady = norm / np.sqrt(1 - (1 - c_sigma) ** (2 * generation)) < (1.4 + 2 / (n + 1)) * length
        path = (1 - c_path) * path + steady * np.sqrt(c_path * (2 - c_path) * effective) * step
        kept = 1 - c_one - c_mu + (1 - steady) * c_one * c_path * (2 - c_path)
        covariance = kept * covariance + c_one * np.outer(path, path)
        covariance += c_mu * (y[order].T * weights) @ y[order]
        sigma *= np.exp((c_sigma / d_sigma) * (norm / length - 1))
        if not (np.isfinite(sigma) and np.isfinite(covariance).all() and sigma > 1e-300):
            break
    return best, best_value
