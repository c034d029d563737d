"""Exponentiated AdamW, block by block."""

import triton
import triton.language as tl

from ._math import clamp, maximum, sign, times_exp

STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
COEFFICIENTS = ("beta1", "weight1", "beta2", "weight2", "scale", "eps", "size", "shrink", "limit", "floor")
FLAGS = ("additive", "amsgrad")


@triton.jit
def exponentiated_adamw(p, g, states, coefficients, FLAGS: tl.constexpr):
    """The update of one block; see :class:`lightning_opt.optim.ExponentiatedAdamW`."""
    beta1, weight1, beta2, weight2, scale, eps, size, shrink, limit, floor = coefficients
    additive: tl.constexpr = FLAGS[0]
    amsgrad: tl.constexpr = FLAGS[1]
    exp_avg = states[0] * beta1 + weight1 * g
    exp_avg_sq = states[1] * beta2 + weight2 * g * g
    base = exp_avg_sq
    if amsgrad:
        base = maximum(exp_avg_sq, states[2])
    step = tl.div_rn(size * exp_avg, tl.sqrt_rn(scale * base) + eps)
    p = p * shrink
    if additive:
        p = p - step
    else:
        s = sign(p)
        p = s * maximum(times_exp(tl.abs(p), -clamp(s * step, limit)), floor)
    return p, (exp_avg, exp_avg_sq, base) if amsgrad else (exp_avg, exp_avg_sq)
