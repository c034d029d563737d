"""Counter-based normal noise, the numbers of ``lightning_opt.diffusion.philox_normal``, computed where it is needed."""

import triton
import triton.language as tl


@triton.jit
def normals(counter, seed_low, seed_high):
    """The four normal numbers of each counter of a block.

    Args:
        counter: A block of uint64.
        seed_low: The seed's low 32 bits, uint32.
        seed_high: Its high 32 bits.
    """
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox_impl(low, high, zero, zero, seed_low, seed_high)
    z0, z1 = box_muller(a, b)
    z2, z3 = box_muller(c, d)
    return z0, z1, z2, z3


@triton.jit
def box_muller(first, second):
    """Two independent normal numbers from two random uint32: a radius and an angle."""
    radius = tl.sqrt(-2.0 * _log(tl.fma(first.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)))
    quarter = (second + 0x20000000) >> 30  # turns, to the nearest quarter
    x = (second - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    z = x * x  # of an angle from -pi/4 to pi/4; the polynomials are those of Cephes
    sin = tl.fma(tl.fma(tl.fma(z, -1.9515295891e-4, 8.3321608736e-3), z, -1.6666654611e-1) * z, x, x)
    cos = tl.fma(tl.fma(z, 2.443315711809948e-5, -1.388731625493765e-3), z, 4.166664568298827e-2)
    cos = tl.fma(cos * z, z, tl.fma(z, -0.5, 1.0))
    odd = (quarter & 1) != 0
    first_sign = tl.where(((quarter + 1) & 2) != 0, -radius, radius)
    second_sign = tl.where((quarter & 2) != 0, -radius, radius)
    return first_sign * tl.where(odd, sin, cos), second_sign * tl.where(odd, cos, sin)


@triton.jit
def _log(u):
    """The logarithm of a normal float32, accurate near 1 too, where that of the hardware is not."""
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23  # the bits of sqrt(1/2)
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    e = e.to(tl.float32)
    z = f * f
    p = tl.fma(f, 7.0376836292e-2, -1.1514610310e-1)
    p = tl.fma(p, f, 1.1676998740e-1)
    p = tl.fma(p, f, -1.2420140846e-1)
    p = tl.fma(p, f, 1.4249322787e-1)
    p = tl.fma(p, f, -1.6668057665e-1)
    p = tl.fma(p, f, 2.0000714765e-1)
    p = tl.fma(p, f, -2.4999993993e-1)
    p = tl.fma(p, f, 3.3333331174e-1)
    return tl.fma(e, 0.693359375, f + tl.fma(z, -0.5, tl.fma(e, -2.12194440e-4, p * f * z)))
