"""Runge-Kutta pairs the slow way: order conditions from rooted trees, a step in loops, an adaptive solver."""

import functools
import itertools

import numpy as np


@functools.cache
def trees(order):
    """All rooted trees with this many nodes, each the sorted tuple of its subtrees."""
    if order == 1:
        return ((),)
    found = set()
    for parts in _partitions(order - 1):
        for children in itertools.product(*(trees(n) for n in parts)):
            found.add(tuple(sorted(children)))
    return tuple(sorted(found))


def _partitions(n, largest=None):
    if n == 0:
        yield ()
    for part in range(min(n, largest or n), 0, -1):
        for rest in _partitions(n - part, part):
            yield (part, *rest)


def size(tree):
    return 1 + sum(map(size, tree))


def density(tree):
    """gamma: the product of the sizes of all subtrees."""
    value = size(tree)
    for child in tree:
        value *= density(child)
    return value


def stage_weights(tree, a):
    """The elementary weight of every stage (Butcher's product over the subtrees)."""
    weights = [1] * len(a)
    for child in tree:
        inner = stage_weights(child, a)
        weights = [w * sum(x * y for x, y in zip(row, inner, strict=False)) for w, row in zip(weights, a, strict=True)]
    return weights


def elementary_weight(tree, a, b):
    """Phi: the order condition of the tree is Phi = 1 / gamma."""
    return sum(x * y for x, y in zip(b, stage_weights(tree, a), strict=True))


def step(f, t, y, h, pair):
    """State, error estimate and stages, in numpy."""
    k = []
    for c, row in zip(pair.c, pair.a, strict=True):
        argument = y + h * sum((float(x) * v for x, v in zip(row, k, strict=True)), np.zeros_like(y))
        k.append(f(t + float(c) * h, argument))
    y1 = y + h * sum(float(x) * v for x, v in zip(pair.b, k, strict=True))
    return y1, h * sum(float(x) * v for x, v in zip(pair.error, k, strict=True)), k


def adaptive(f, y, t, end, pair, tolerance):
    """Starts and sizes of the accepted steps and the last state, forward in time, rtol = atol = tolerance."""

    def norm(x, scale):
        return np.sqrt(np.mean((x / scale) ** 2))

    scale = tolerance + tolerance * abs(y)
    f0 = f(t, y)
    d0, d1 = norm(y, scale), norm(f0, scale)
    h0 = min(0.01 * d0 / d1, end - t)
    d2 = norm(f(t + h0, y + h0 * f0) - f0, scale) / h0
    h = min(100 * h0, (0.01 / max(d1, d2)) ** (1 / pair.order), end - t)
    accepted, rejected, grows = [], 0, True
    while t < end:
        last = t + 1.01 * h >= end
        h = end - t if last else h
        y1, error, _ = step(f, t, y, h, pair)
        ratio = norm(error, tolerance + tolerance * np.maximum(abs(y), abs(y1)))
        factor = min(10, max(0.2, 0.9 * ratio ** (-1 / pair.order)))
        if ratio <= 1:
            accepted.append((t, h))
            t, y = end if last else t + h, y1
            h *= factor if grows else min(1, factor)
            grows = True
        else:
            rejected += 1
            h *= factor
            grows = False
    return accepted, rejected, y
