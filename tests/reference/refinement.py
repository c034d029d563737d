"""The refinement of schedules as arXiv:2310.07831 writes it, step by step, without regard to speed."""

import math

import numpy as np


def median_filter(values: np.ndarray, width: int) -> np.ndarray:
    """Medians of windows of odd width; at the borders the outermost value is repeated."""
    half = width // 2
    padded = [values[0]] * half + list(values) + [values[-1]] * half
    return np.array([sorted(padded[i : i + width])[half] for i in range(len(values))])


def smooth(norms: np.ndarray, tau: float) -> np.ndarray:
    """The end extended by reflection about the last value, filtered, and cut off again."""
    width = 2 * math.floor(math.floor(tau * len(norms)) / 2) + 1
    extended = list(norms)
    last = len(norms) - 1
    for k in range(1, 2 * width + 1):
        place = (last - k) % (2 * last)  # reflected again at the beginning, should it come so far
        extended.append(norms[place if place <= last else 2 * last - place])
    return median_filter(np.array(extended), width)[: len(norms)]


def refine(norms: np.ndarray, power: int, tau: float) -> np.ndarray:
    """Algorithms 1 (power 2) and 2 (power 1) for norms that need no floor, in extended precision."""
    smoothed = smooth(norms, tau).astype(np.longdouble)
    weights = smoothed**-power
    schedule = [weights[t] * weights[t + 1 :].sum() for t in range(len(weights))]
    return np.array(schedule / max(schedule), dtype=np.float64)


def bound(norms: np.ndarray, rates: np.ndarray, distance: float) -> float:
    """The last iterate's bound with explicit sums."""
    total = len(rates)
    value = distance**2 / (2 * rates.sum()) + (rates**2 * norms**2).sum() / (2 * rates.sum())
    for k in range(total - 1):
        tail = sum(rates[t] ** 2 * norms[t] ** 2 for t in range(k, total))
        value += rates[k] * tail / (rates[k + 1 :].sum() * rates[k:].sum()) / 2
    return value
