"""The multiplicative update of a sampler, block by block."""

import triton
import triton.language as tl

from .fast_exp import fast_exp


@triton.jit
def multiplicative_update(inputs, coefficients, FLAGS: tl.constexpr):
    """The update of one block; see :func:`lightning_opt.diffusion.multiplicative_update`."""
    a, b, c = coefficients
    prediction: tl.constexpr = FLAGS[0]
    noise: tl.constexpr = FLAGS[1]
    log_state: tl.constexpr = FLAGS[2]
    poly: tl.constexpr = FLAGS[3]
    x = inputs[0]
    exponent = a
    if prediction:
        exponent = exponent + b * inputs[1]
    if noise:
        exponent = exponent + c * inputs[1 + prediction]
    if log_state:
        result = x + exponent
    elif poly:
        result = x * fast_exp(exponent)
    else:
        result = x * tl.exp(exponent)
    return (result,)
