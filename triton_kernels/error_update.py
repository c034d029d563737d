"""What error feedback compresses, and what it adds to the error, block by block."""

import triton
import triton.language as tl


@triton.jit
def error_update(inputs, coefficients, FLAGS: tl.constexpr):
    """``(g - h) + eta e`` to be compressed, or ``e + (g - h)`` where all gradients are finite, in one pass."""
    gradient, estimate, error = inputs
    residual = gradient - estimate
    if FLAGS[0]:
        return (residual + coefficients[0] * error,)
    return (error + tl.where(coefficients[0] != 0, residual, 0.0),)
