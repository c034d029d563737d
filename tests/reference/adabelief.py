"""AdaBelief (arXiv:2010.07468, algorithm 2, and the authors' options), eps accumulated in s as the authors do."""

import numpy as np


def adabelief(
    w,
    g,
    memory,
    t,
    *,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-16,
    weight_decay=0.0,
    decoupled=True,
    fixed_decay=False,
    rectify=False,
    degenerated_to_sgd=True,
    amsgrad=False,
):
    b1, b2 = betas
    if fixed_decay:
        w = w * (1 - weight_decay)
    elif decoupled:
        w = w * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * w
    m = memory["m"] = b1 * memory.get("m", 0.0) + (1 - b1) * g
    s = memory["s"] = b2 * memory.get("s", 0.0) + (1 - b2) * (g - m) ** 2 + eps
    if amsgrad:
        s = memory["largest"] = np.maximum(memory.get("largest", 0.0), s)
    m_hat = m / (1 - b1**t)
    if not rectify:
        return w - lr * m_hat / (np.sqrt(s / (1 - b2**t)) + eps)
    r_inf = 2 / (1 - b2) - 1
    r = r_inf - 2 * t * b2**t / (1 - b2**t)
    if r >= 5:
        a = np.sqrt((1 - b2**t) * (r - 4) * (r - 2) * r_inf / ((r_inf - 4) * (r_inf - 2) * r))
        return w - lr * a * m_hat / (np.sqrt(s) + eps)
    return w - lr * m_hat if degenerated_to_sgd else w
