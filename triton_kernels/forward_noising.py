"""The noised sample and its regression target, block by block."""

import triton
import triton.language as tl


@triton.jit
def forward_noising(inputs, coefficients, FLAGS: tl.constexpr):
    """The two outputs of one block; see :func:`lightning_opt.diffusion.noise_with_target`."""
    mean_shift, rho, log_mean, log_std = coefficients
    state: tl.constexpr = FLAGS[0]
    target: tl.constexpr = FLAGS[1]
    log_input: tl.constexpr = FLAGS[2]
    y0 = inputs[0]
    if not log_input:
        y0 = tl.log(y0)
    noise = inputs[1]
    z0 = y0 - log_mean
    c_in = tl.rsqrt(rho * rho + log_std * log_std)
    if state == "scaled":
        first = c_in * (z0 + rho * noise)
    else:
        first = y0 + mean_shift + rho * noise
        if state == "positive":
            first = tl.exp(first)
    if target == "edm":
        second = c_in * (rho / log_std * z0 - log_std * noise)
    elif target == "hyvarinen":
        second = -1.0 - noise / rho
    else:
        tl.static_assert(target == "epsilon")
        second = noise
    return first, second
