"""exp2 and exp of float32 as short evolved polynomials, within one unit in the last place of the true value.

This file holds the coefficients and the reference in plain torch. ``lightning_opt.cpu_kernels.fast_exp`` and
``lightning_opt.triton_kernels.fast_exp`` are the same arithmetic for use inside compiled kernels, where it takes the
place of the exponential of the C library or of the hardware. The programs were found by ``lightning-opt evolve``: six
operations each, fused multiply-adds rounded once but for one product. They are polynomials, though not by Horner's
rule; by that, six multiply-adds reach 0.95 and 0.89 ULP before the range reduction, these 0.84 and 0.83.

Over all 2^32 numbers of float32, beside the double-precision functions of the C library
(``lightning-opt verify-exp``, CPU; benchmarks/results/exp_ulp.json):

==============  ===================  ====================
function        largest error (ULP)  inputs with >= 1 ULP
==============  ===================  ====================
``fast_exp2``   0.868                0
``fast_exp``    0.986                0
``torch.exp2``  0.885                0
``torch.exp``   0.568                0
==============  ===================  ====================

exp2 is exact at every integer from -149 to 127. Results below 2^-126 are subnormal and rounded once; a device that
flushes those gives 0 there. NaN gives NaN.

Source: AutoNumerics-Zero (arXiv:2312.08472) for the aim, float32 below 1 ULP in the fewest operations, and the search;
docs/methods/autonumerics.md has the commands.
"""

from typing import Any

import torch
from torch import Tensor

EXP2_COEFFICIENTS = tuple(
    map(
        float.fromhex,
        ("0x1.a49020p-5", "0x1.231b58p-2", "0x1.6e88c2p-7", "0x1.9c8c74p+0", "0x1.78ace0p-4", "0x1.62e430p-1"),
    )
)
"""Of the program for 2^r, r from -1/2 to 1/2: six fused multiply-adds. All are float32 numbers."""

EXP_COEFFICIENTS = tuple(map(float.fromhex, ("-0x1.81f31ap-3", "0x1.5a99ecp-4", "0x1.665f46p-1", "0x1.32acb0p-2")))
"""Of the program for exp(r), r from -log(2)/2 to log(2)/2: five fused multiply-adds and a product."""

LOG2E = float.fromhex("0x1.715476p+0")
LN2_HIGH, LN2_LOW = 0.693359375, float.fromhex("-0x1.bd0106p-13")  # of 10 bits and the rest: n * LN2_HIGH is exact
EXP2_RANGE = (-152.0, 129.0)  # beyond, the result is 0 or infinite, as it is at these
EXP_RANGE = (-105.0, 89.5)


def fast_exp2(x: Tensor) -> Tensor:
    """2 to the power of x, by the polynomial of the fused kernels; differentiable.

    This is the specification in plain torch, several passes over memory: ``torch.exp2`` is faster here.

    Args:
        x: float32, any shape and device.

    Returns:
        float32 of the same shape.

    Raises:
        ValueError: If x is not float32.

    Example:
        >>> fast_exp2(torch.tensor([-1.0, 0.5, 3.0]))
        tensor([0.5000, 1.4142, 8.0000])
    """
    _check(x)
    return _Exponential.apply(x, _exp2, torch.log(torch.tensor(2.0, dtype=torch.float64)).item())


def fast_exp(x: Tensor) -> Tensor:
    """The exponential of x, by the polynomial of the fused kernels; differentiable.

    This is the specification in plain torch, several passes over memory: ``torch.exp`` is faster here.

    Args:
        x: float32, any shape and device.

    Returns:
        float32 of the same shape.

    Raises:
        ValueError: If x is not float32.

    Example:
        >>> fast_exp(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.3679, 1.0000, 2.7183])
    """
    _check(x)
    return _Exponential.apply(x, _exp, 1.0)


class _Exponential(torch.autograd.Function):
    """A function that is its own derivative up to a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Any, factor: float) -> Tensor:
        y = function(x)
        ctx.save_for_backward(y)
        ctx.factor = factor
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        return gradients[0] * y * ctx.factor, None, None


def _exp2(x: Tensor) -> Tensor:
    x = x.clamp(*EXP2_RANGE)  # NaN stays
    n = x.round()  # x - n is exact
    r = x - n
    a, b, c, d, e, f = EXP2_COEFFICIENTS
    t = _fma(r, a, b)
    t = _fma(t, t, c)
    t = _fma(t, _fma(t, r, d), e)
    return _scale(_fma(_fma(t, r, f), r, 1.0), n)


def _exp(x: Tensor) -> Tensor:
    x = x.clamp(*EXP_RANGE)
    n = (x.double() * LOG2E).round().float()  # of the exact product
    r = _fma(n, -LN2_LOW, _fma(n, -LN2_HIGH, x))
    a, b, c, d = EXP_COEFFICIENTS
    t = _fma(r, a, b)
    t = _fma(t, t, c)
    t = t * _fma(r, d, t)
    return _scale(_fma(_fma(t, r, 1.0), r, 1.0), n)


def _fma(a: Tensor | float, b: Tensor | float, c: Tensor | float) -> Tensor:
    """The sum ``a * b + c`` of float32, rounded once (twice where float64 is halfway: one time in 2^29)."""
    a, b, c = (x.double() if isinstance(x, Tensor) else x for x in (a, b, c))
    return (a * b + c).float()  # type: ignore[union-attr]


def _scale(p: Tensor, n: Tensor) -> Tensor:
    """The product p * 2^n with powers of two that float32 has, so that a subnormal result is rounded once."""
    k = n.nan_to_num().int()
    half = k >> 1
    return p * _power_of_two(half) * _power_of_two(k - half)


def _power_of_two(k: Tensor) -> Tensor:
    return ((k + 127) << 23).view(torch.float32)


def _check(x: Tensor) -> None:
    if x.dtype != torch.float32:
        raise ValueError(f"x must be float32, got {str(x.dtype).removeprefix('torch.')}: convert it first")
