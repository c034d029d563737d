"""Exponentiated gradient as in the reference code of arXiv:2510.02730, EG+- (Kivinen & Warmuth, 1997), hypentropy."""

import numpy as np


def sgd_momentum(g, memory, *, momentum, dampening, nesterov):
    """torch.optim.SGD's treatment of the gradient."""
    if momentum == 0:
        return g
    first = "buffer" not in memory
    memory["buffer"] = g.copy() if first else momentum * memory["buffer"] + (1 - dampening) * g
    return g + momentum * memory["buffer"] if nesterov else memory["buffer"]


def eg(w, g, memory, t, *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
    s = np.sign(w)
    g = sgd_momentum(g + weight_decay * s, memory, momentum=momentum, dampening=dampening, nesterov=nesterov)
    return w * np.exp(-lr * s * g)


def gd_sign(w, g, memory, t, *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, threshold=1e-18):
    s = np.sign(w)
    g = sgd_momentum(g + weight_decay * w, memory, momentum=momentum, dampening=dampening, nesterov=nesterov)
    moved = w - lr * g
    return np.where(s * moved < 0, threshold * s, moved)


def hypentropy(w, g, memory, t, *, lr, beta, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
    g = sgd_momentum(g + weight_decay * w, memory, momentum=momentum, dampening=dampening, nesterov=nesterov)
    return beta * np.sinh(np.arcsinh(w / beta) - lr * g)


def adamw_eg(w, g, memory, t, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False):
    b1, b2 = betas
    w = w * (1 - lr * weight_decay)
    m = memory["m"] = b1 * memory.get("m", 0.0) + (1 - b1) * g
    v = memory["v"] = b2 * memory.get("v", 0.0) + (1 - b2) * g * g
    if amsgrad:
        v = memory["largest"] = np.maximum(memory.get("largest", 0.0), v)
    denominator = np.sqrt(v) / np.sqrt(1 - b2**t) + eps
    return w * np.exp(-(lr / (1 - b1**t)) * np.sign(w) * m / denominator)


def eg_plus_minus(w, g, memory, t, *, lr, p, q, budget=None):
    """``p`` and ``q`` are the parts of the start."""
    p, q = memory.get("parts", (p, q))
    p, q = p * np.exp(-lr * g), q * np.exp(lr * g)
    if budget is not None:
        total = np.sum(p + q)
        p, q = p * budget / total, q * budget / total
    memory["parts"] = p, q
    return p - q
