"""Distances between sets of features, from their definitions, in float64 numpy."""

import numpy as np
from scipy.linalg import sqrtm


def gaussian_frechet(m1, c1, m2, c2):
    """Dowson and Landau's closed form, with the symmetric root: tr (C1^1/2 C2 C1^1/2)^1/2."""
    root = sqrtm(c1)
    return float(np.sum((m1 - m2) ** 2) + np.trace(c1 + c2) - 2 * np.trace(sqrtm(root @ c2 @ root)).real)


def frechet(x, y):
    """Of the Gaussians fitted to two sets of rows."""
    return gaussian_frechet(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))


def kernel(x, y):
    """Unbiased squared MMD with the cubic kernel, by loops over pairs."""
    d = x.shape[1]
    k = lambda a, b: (a @ b / d + 1) ** 3  # noqa: E731
    within_x = np.mean([k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])
    within_y = np.mean([k(y[i], y[j]) for i in range(len(y)) for j in range(len(y)) if i != j])
    return within_x + within_y - 2 * np.mean([k(a, b) for a in x for b in y])


def precision_recall(samples, reference, k):
    """Equations 1 and 2 of arXiv 1904.06991, by loops over pairs."""

    def share_inside(points, centers):
        radii = [
            sorted(np.linalg.norm(c - o) for j, o in enumerate(centers) if j != i)[k - 1] for i, c in enumerate(centers)
        ]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centers, radii, strict=True)) for p in points])

    return share_inside(samples, reference), share_inside(reference, samples)
