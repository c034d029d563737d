"""AdaGrad-Norm in numpy float64: arXiv:1806.01811, algorithm 1."""

import numpy as np


def adagrad_norm(w, g, memory, t, *, lr, v0, weight_decay=0.0):
    v = memory["v"] = memory.get("v", v0) + (g * g).sum()
    return w - lr * weight_decay * w - lr * g / np.sqrt(v)
