"""The tests of a batch size in numpy float64, as arXiv:2402.11215 writes them, one sample at a time."""

import math

import numpy as np


def variances(gradients, weights=None):
    """S, V, W and the variance of each coordinate of rows; a row is the mean of `weights` samples."""
    g = np.asarray(gradients, dtype=np.float64)
    n = np.ones(len(g)) if weights is None else np.asarray(weights, dtype=np.float64)
    mean = sum(n_j * h for n_j, h in zip(n, g, strict=True)) / n.sum()
    norm_sq = mean @ mean
    coordinate = sum(n_j * (h - mean) ** 2 for n_j, h in zip(n, g, strict=True)) / (len(g) - 1)
    along = sum(n_j * (h @ mean - norm_sq) ** 2 for n_j, h in zip(n, g, strict=True)) / (len(g) - 1)
    parts = [h - (h @ mean) / norm_sq * mean for h in g]
    orthogonal = sum(n_j * o @ o for n_j, o in zip(n, parts, strict=True)) / (len(g) - 1)
    return {"mean": mean, "S": coordinate.sum(), "V": along, "W": orthogonal, "coordinate": coordinate}


def requested(gradients, test, eta=0.5, theta=0.9, nu=5.84, quantile=0.95):
    """The batch size that each test asks for, before it is rounded up."""
    v = variances(gradients)
    norm_sq = v["mean"] @ v["mean"]
    inner = v["V"] / (theta**2 * norm_sq**2)
    return {
        "norm": v["S"] / (eta**2 * norm_sq),
        "inner_product": inner,
        "augmented_inner_product": max(inner, v["W"] / (nu**2 * norm_sq)),
        "coordinate": sorted(v["coordinate"] / (eta**2 * v["mean"] ** 2))[math.ceil(quantile * len(v["mean"])) - 1],
    }[test]
