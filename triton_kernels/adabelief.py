"""AdaBelief, block by block."""

import triton
import triton.language as tl

from ._math import maximum

STATES = ("exp_avg", "exp_avg_var", "max_exp_avg_var")
COEFFICIENTS = (
    "beta1",
    "weight1",
    "beta2",
    "weight2",
    "accumulated",
    "scale",
    "offset",
    "outer",
    "size",
    "coupled",
    "shrink",
)
FLAGS = ("amsgrad",)


@triton.jit
def adabelief(p, g, states, coefficients, FLAGS: tl.constexpr):
    """The update of one block; see :class:`lightning_opt.optim.AdaBelief`."""
    beta1, weight1, beta2, weight2, accumulated, scale, offset, outer, size, coupled, shrink = coefficients
    amsgrad: tl.constexpr = FLAGS[0]
    g = g + coupled * p
    exp_avg = states[0] * beta1 + weight1 * g
    surprise = g - exp_avg
    exp_avg_var = states[1] * beta2 + weight2 * surprise * surprise
    base = exp_avg_var
    if amsgrad:
        base = maximum(exp_avg_var + accumulated, states[2])
    root = tl.sqrt_rn(base * scale + offset) + outer
    p = p * shrink - tl.div_rn(size * exp_avg, root)
    return p, (exp_avg, exp_avg_var, base) if amsgrad else (exp_avg, exp_avg_var)
