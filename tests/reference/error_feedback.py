"""The recursions of error feedback in numpy, one rank after the other, from the papers."""

from collections.abc import Callable

import numpy as np

Gradient = Callable[[int, np.ndarray], np.ndarray]  # of rank and point


def top_k(v: np.ndarray, k: int) -> np.ndarray:
    kept = np.zeros_like(v)
    places = np.argsort(-np.abs(v), kind="stable")[:k]
    kept[places] = v[places]
    return kept


def ef21(gradient: Gradient, x: np.ndarray, n: int, k: int, lr: float, steps: int) -> np.ndarray:
    """Richtarik, Sokolov, Fatkhullin 2021, algorithm 2, from exact first gradients. Returns the iterates."""
    h = [gradient(i, x) for i in range(n)]
    path = [x]
    for _ in range(steps):
        x = x - lr * np.mean(h, axis=0)
        h = [h[i] + top_k(gradient(i, x) - h[i], k) for i in range(n)]
        path.append(x)
    return np.array(path)


def ef21_w(gradient: Gradient, x: np.ndarray, weights: list[float], k: int, lr: float, steps: int) -> np.ndarray:
    """Richtarik, Gasanov, Burlachenko 2024, algorithm 2, from exact first gradients."""
    n = len(weights)
    h = [gradient(i, x) / (n * w) for i, w in enumerate(weights)]
    path = [x]
    for _ in range(steps):
        x = x - lr * sum(w * h_i for w, h_i in zip(weights, h, strict=True))
        h = [h[i] + top_k(gradient(i, x) / (n * w) - h[i], k) for i, w in enumerate(weights)]
        path.append(x)
    return np.array(path)


def ef21_sgdm(gradient: Gradient, x: np.ndarray, n: int, k: int, lr: float, steps: int, beta: float) -> np.ndarray:
    """Fatkhullin, Tyurin, Richtarik 2023, algorithm 1, from exact first gradients."""
    v = [gradient(i, x) for i in range(n)]
    h = list(v)
    path = [x]
    for _ in range(steps):
        x = x - lr * np.mean(h, axis=0)
        v = [(1 - beta) * v[i] + beta * gradient(i, x) for i in range(n)]
        h = [h[i] + top_k(v[i] - h[i], k) for i in range(n)]
        path.append(x)
    return np.array(path)


def econtrol(gradient: Gradient, x: np.ndarray, n: int, k: int, lr: float, steps: int, eta: float) -> np.ndarray:
    """Gao, Islamov, Stich 2023, algorithm 2, from exact first gradients, which the first step uses."""
    h = [gradient(i, x) for i in range(n)]
    e = [np.zeros_like(x) for _ in range(n)]
    path = [x]
    x = x - lr * np.mean(h, axis=0)
    path.append(x)
    for _ in range(steps - 1):
        mean = np.mean(h, axis=0)
        for i in range(n):
            g = gradient(i, x)
            delta = top_k(eta * e[i] + g - h[i], k)
            e[i] = e[i] + g - h[i] - delta
            h[i] = h[i] + delta
            mean = mean + delta / n
        x = x - lr * mean
        path.append(x)
    return np.array(path)


def ef14(gradient: Gradient, x: np.ndarray, n: int, k: int, lr: float, steps: int) -> np.ndarray:
    """Karimireddy, Rebjock, Stich, Jaggi 2019, algorithm 2, with errors of gradients instead of steps."""
    e = [np.zeros_like(x) for _ in range(n)]
    path = [x]
    for _ in range(steps):
        mean = np.zeros_like(x)
        for i in range(n):
            p = gradient(i, x) + e[i]
            delta = top_k(p, k)
            e[i] = p - delta
            mean = mean + delta / n
        x = x - lr * mean
        path.append(x)
    return np.array(path)


def naive(gradient: Gradient, x: np.ndarray, n: int, k: int, lr: float, steps: int) -> np.ndarray:
    """Compression and nothing else."""
    path = [x]
    for _ in range(steps):
        x = x - lr * np.mean([top_k(gradient(i, x), k) for i in range(n)], axis=0)
        path.append(x)
    return np.array(path)
