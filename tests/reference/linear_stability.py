"""Naive linear stability: the map of second moments applied by its definition, and simulated SGD."""

import itertools

import torch
from torch import Tensor


def radius(jacobian: Tensor, lr: float, batch_size: int, momentum: float = 0.0, replacement: bool = True) -> float:
    """Spectral radius of E[A (x) A], with the mean taken over every batch that can be drawn."""
    n, p = jacobian.shape
    batches = (
        itertools.product(range(n), repeat=batch_size) if replacement else itertools.combinations(range(n), batch_size)
    )
    eye, zero = torch.eye(p, dtype=torch.float64), torch.zeros(p, p, dtype=torch.float64)
    total, count = torch.zeros(4 * p * p, 4 * p * p, dtype=torch.float64), 0
    for batch in batches:
        g = jacobian[list(batch)]
        step = eye - lr * g.T @ g / batch_size
        matrix = torch.cat([torch.cat([step + momentum * eye, -momentum * eye], 1), torch.cat([eye, zero], 1)])
        total += torch.kron(matrix, matrix)
        count += 1
    values = torch.linalg.eigvals(total / count).abs()
    return values.max().item()
