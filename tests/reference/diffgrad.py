"""diffGrad (arXiv:1909.11015, section 3), the authors' placement of eps, and the relative friction."""

import numpy as np


def diffgrad(
    w,
    g,
    memory,
    t,
    *,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    decoupled=False,
    friction="absolute",
    kappa=1.0,
    eps_mode="paper",
    amsgrad=False,
):
    b1, b2 = betas
    if decoupled:
        w = w * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * w
    m = memory["m"] = b1 * memory.get("m", 0.0) + (1 - b1) * g
    v = memory["v"] = b2 * memory.get("v", 0.0) + (1 - b2) * g**2
    change = np.abs(memory.get("g", 0.0) - g)
    memory["g"] = g
    if friction == "relative":
        change = kappa * change / (np.sqrt(v / (1 - b2**t)) + eps)
    xi = 1 / (1 + np.exp(-change))
    if amsgrad:
        v = memory["largest"] = np.maximum(memory.get("largest", 0.0), v)
    if eps_mode == "authors":
        return w - lr * np.sqrt(1 - b2**t) / (1 - b1**t) * xi * m / (np.sqrt(v) + eps)
    return w - lr * xi * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
