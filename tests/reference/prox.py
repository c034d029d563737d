"""Proximal operators and mirror steps by definitions other than the ones that are computed."""

import numpy as np


def prox_l1(x: np.ndarray, threshold: float) -> np.ndarray:
    """By cases."""
    return np.where(x > threshold, x - threshold, np.where(x < -threshold, x + threshold, 0.0))


def project_ball(x: np.ndarray, radius: float) -> np.ndarray:
    norm = np.sqrt((x**2).sum())
    return x if norm <= radius else x * radius / norm


def project_simplex(x: np.ndarray, total: float) -> np.ndarray:
    """One row, by bisection on the threshold."""
    low, high = x.min() - total, x.max()
    for _ in range(200):
        middle = (low + high) / 2
        if np.maximum(x - middle, 0).sum() > total:
            low = middle
        else:
            high = middle
    return np.maximum(x - high, 0)


def entropy_step(x: np.ndarray, g: np.ndarray, rate: float) -> np.ndarray:
    """Rows of the last dimension."""
    moved = x * np.exp(-rate * g)
    return moved / moved.sum(axis=-1, keepdims=True)


def pnorm_step(x: np.ndarray, g: np.ndarray, rate: float, p: float) -> np.ndarray:
    """In the dual variable, whose inverse map is that of the conjugate exponent."""

    def gradient(v: np.ndarray, r: float) -> np.ndarray:
        norm = (np.abs(v) ** r).sum() ** (1 / r)
        return np.sign(v) * np.abs(v) ** (r - 1) * norm ** (2 - r) if norm > 0 else v

    return gradient(gradient(x, p) - rate * g, p / (p - 1))
