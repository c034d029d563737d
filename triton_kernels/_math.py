"""Functions on float32 blocks that updates share, of operations that the interpreter has too."""

import triton
import triton.language as tl


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN, as in torch."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def maximum(x, y):
    """The larger of two numbers; NaN if either is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamp(x, limit):
    """Cut x to the range from -limit to limit; NaN stays NaN."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def times_exp(x, y):
    """Multiply x by exp(y), within 1.5 units in the last place: the exp of the hardware would lose two bits a step."""
    rest, scale1, scale2 = _reduced_exp(y)
    scaled = x * scale1
    return tl.where(y > 88.72283, x * float("inf"), (scaled + scaled * rest) * scale2)


@triton.jit
def sinh_cosh(x):
    """sinh(x) and cosh(x) - 1, both accurate relative to themselves; NaN above 88."""
    rest, scale1, scale2 = _reduced_exp(x)
    scale = scale1 * scale2
    e = scale + scale * rest  # exp(x)
    e1 = (scale - 1) + scale * rest  # exp(x) - 1
    half = 0.5 * e1
    quotient = tl.div_rn(e1, e)
    return half + 0.5 * quotient, half * quotient


@triton.jit
def _reduced_exp(x):
    """exp(x) as (1 + rest) * scale1 * scale2 with powers of two, so that nothing overflows on the way."""
    x = tl.where(x < -104.0, -104.0, tl.where(x > 89.0, 89.0, x))  # exp is 0 below and inf above
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = x - n * 0.693359375 + n * 2.12194440e-4  # ln 2 in two parts, the first of 10 bits: exact times n
    # minimax polynomial of degree 5 for (exp(r) - 1 - r) / r^2, r in [-ln(2)/2, ln(2)/2] (Cephes)
    y = 1.9875691500e-4 * r + 1.3981999507e-3
    y = y * r + 8.3334519073e-3
    y = y * r + 4.1665795894e-2
    y = y * r + 1.6666665459e-1
    y = y * r + 5.0000001201e-1
    n = tl.where(n == n, n, 0.0).to(tl.int32)
    half = n >> 1
    return y * r * r + r, _power_of_two(half), _power_of_two(n - half)


@triton.jit
def _power_of_two(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def round_stochastically(x, key, index):
    """float32 rounded to bfloat16 with the bits that ``lightning_opt.optim`` draws too; inf and NaN stay."""
    bits = x.to(tl.uint32, bitcast=True)
    noise = mix(index + key) & 0xFFFF
    rounded = (((bits + noise) >> 16) << 16).to(tl.float32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded, x).to(tl.bfloat16)


@triton.jit
def mix(x):
    """A bijective hash of uint32 with low bias."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)
