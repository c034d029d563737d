"""A sampler's step on log states, block by block."""

import triton
import triton.language as tl


@triton.jit
def log_step(inputs, coefficients, FLAGS: tl.constexpr):
    """The step of one block; see :func:`lightning_opt.diffusion.log_step`."""
    skip, gain, constant, pull, shift, scale = coefficients
    y = inputs[0]
    denoised = skip * y + gain * inputs[1] + constant
    state = (1.0 - pull) * y + pull * denoised + shift
    if FLAGS[0]:
        state = state + scale * inputs[2]
    return state, denoised
