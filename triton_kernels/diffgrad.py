"""DiffGrad, block by block."""

import triton
import triton.language as tl

from ._math import maximum

STATES = ("exp_avg", "exp_avg_sq", "previous_grad", "max_exp_avg_sq")
COEFFICIENTS = (
    *("beta1", "weight1", "beta2", "weight2"),
    *("unbias", "kappa", "eps", "scale", "size", "coupled", "shrink"),
)
FLAGS = ("relative", "amsgrad")


@triton.jit
def diffgrad(p, g, states, coefficients, FLAGS: tl.constexpr):
    """The update of one block; see :class:`lightning_opt.optim.DiffGrad`."""
    beta1, weight1, beta2, weight2, unbias, kappa, eps, scale, size, coupled, shrink = coefficients
    relative: tl.constexpr = FLAGS[0]
    amsgrad: tl.constexpr = FLAGS[1]
    g = g + coupled * p
    exp_avg = states[0] * beta1 + weight1 * g
    exp_avg_sq = states[1] * beta2 + weight2 * g * g
    change = tl.abs(states[2] - g)
    if relative:
        change = tl.div_rn(kappa * change, tl.sqrt_rn(unbias * exp_avg_sq) + eps)
    friction = tl.div_rn(1.0, 1.0 + tl.exp(-change))
    base = exp_avg_sq
    if amsgrad:
        base = maximum(exp_avg_sq, states[3])
    root = tl.sqrt_rn(scale * base) + eps
    p = p * shrink - tl.div_rn(size * friction * exp_avg, root)
    return p, (exp_avg, exp_avg_sq, g, base) if amsgrad else (exp_avg, exp_avg_sq, g)
