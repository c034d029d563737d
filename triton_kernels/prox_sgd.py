"""Proximal SGD with the elementwise proximal operators, block by block."""

import triton
import triton.language as tl

from ._math import clamp

STATES = ()
COEFFICIENTS = ("lr", "decay", "threshold", "size")
FLAGS = ("prox",)


@triton.jit
def prox_sgd(p, g, states, coefficients, FLAGS: tl.constexpr):
    """The update of one block; see :class:`lightning_opt.optim.ProxSGD`."""
    lr, decay, threshold, size = coefficients
    prox: tl.constexpr = FLAGS[0]
    z = p - lr * (g + decay * p)
    if prox == "l1":
        z = z - clamp(z, threshold)
    else:
        tl.static_assert(prox == "box")
        z = clamp(z, size) + 0.0 * z  # what is infinite must show, and not be cut to the box
    return z, ()
