"""Lion-K with the elementwise kernels, block by block."""

import triton
import triton.language as tl

from ._math import clamp, sign

STATES = ("exp_avg",)
COEFFICIENTS = ("beta1", "weight1", "beta2", "weight2", "size", "shrink", "e")
FLAGS = ("kernel",)


@triton.jit
def lion(p, g, states, coefficients, FLAGS: tl.constexpr):
    """The update of one block; see :class:`lightning_opt.optim.LionK`."""
    beta1, weight1, beta2, weight2, size, shrink, e = coefficients
    kernel: tl.constexpr = FLAGS[0]
    z = beta1 * states[0] + weight1 * g
    if kernel == "sign":
        u = sign(z)
    elif kernel == "soft":
        u = tl.where(tl.abs(z) <= e, 0.0, sign(z))
    elif kernel == "huber":
        u = clamp(tl.div_rn(z, e), 1.0)
    elif kernel == "relativistic":
        u = tl.div_rn(z, tl.sqrt_rn(z * z + e * e))
    else:
        tl.static_assert(kernel == "quadratic")
        u = z
    u = u + 0.0 * z  # the sign of NaN is 0, and that of inf is finite: what is wrong must show
    return p * shrink - size * u, (states[0] * beta2 + weight2 * g,)
