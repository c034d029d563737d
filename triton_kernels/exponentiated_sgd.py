"""Exponentiated SGD, block by block."""

import triton
import triton.language as tl

from ._math import clamp, maximum, sign, sinh_cosh, times_exp

STATES = ("momentum_buffer",)
COEFFICIENTS = ("lr", "keep", "enter", "momentum", "decay", "limit", "floor", "beta")
FLAGS = ("variant", "momentum", "nesterov")


@triton.jit
def exponentiated_sgd(p, g, states, coefficients, FLAGS: tl.constexpr):
    """The update of one block; see :class:`lightning_opt.optim.ExponentiatedSGD`."""
    lr, keep, enter, momentum, decay, limit, floor, beta = coefficients
    variant: tl.constexpr = FLAGS[0]
    has_momentum: tl.constexpr = FLAGS[1]
    nesterov: tl.constexpr = FLAGS[2]
    s = sign(p)
    g = g + decay * (s if variant == "eg" else p)
    if has_momentum:
        buffer = states[0] * keep + enter * g
        g = g + momentum * buffer if nesterov else buffer
        g = g + 0.0 * buffer  # NaN where it is infinite: clamped below, it would stay unseen
    if variant == "eg":
        p = s * maximum(times_exp(tl.abs(p), -clamp(lr * s * g, limit)), floor)
    elif variant == "gd_sign":
        moved = p - lr * g
        p = s * maximum(s * moved, floor) + (1 - tl.abs(s)) * moved
    elif variant == "hyper":
        # beta * sinh(asinh(p / beta) - d), by the addition theorem, which needs no asinh and no large exponents
        sinh, cosh_1 = sinh_cosh(clamp(lr * g, limit))
        p = p + (p * cosh_1 - tl.sqrt_rn(p * p + beta * beta) * sinh)
    else:
        tl.static_assert(variant == "additive")
        p = p - lr * g
    return p, (buffer,) if has_momentum else ()
