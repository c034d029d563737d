"""exp2 and exp of float32 as short polynomials, within one unit in the last place of the true value.

This file holds the coefficients and the reference in plain torch. ``lightning_opt.cpu_kernels.fast_exp`` and
``lightning_opt.triton_kernels.fast_exp`` are the same arithmetic for use inside compiled kernels, where it takes the
place of the exponential of the C library or of the hardware. Every operation but the reduction is a fused
multiply-add, rounded once.

Over all 2^32 numbers of float32, beside the double-precision functions of the C library
(``lightning-opt verify-exp``, CPU; benchmarks/results/exp_ulp.json):

==============  ===================  ====================
function        largest error (ULP)  inputs with >= 1 ULP
==============  ===================  ====================
``fast_exp2``   0.886                0
``fast_exp``    0.875                0
``torch.exp2``  0.885                0
``torch.exp``   0.568                0
==============  ===================  ====================

exp2 is exact at every integer from -149 to 127. Results below 2^-126 are subnormal and rounded once; a device that
flushes those gives 0 there. NaN gives NaN.

Source: AutoNumerics-Zero (arXiv:2312.08472) for the aim, float32 below 1 ULP in the fewest operations; the coefficients
are our own, tuned after rounding to float32.
"""

from typing import Any

import torch
from torch import Tensor

EXP2_COEFFICIENTS = tuple(
    map(
        float.fromhex,
        ("0x1.62e430p-1", "0x1.ebfbd8p-3", "0x1.c6aee8p-5", "0x1.3b2d4cp-7", "0x1.5f3e52p-10", "0x1.41fbbcp-13"),
    )
)
"""Of r, r^2, ... r^6 in 2^r for r from -1/2 to 1/2; the constant is 1. All are float32 numbers."""

EXP_COEFFICIENTS = (
    1.0,
    0.5,
    *map(float.fromhex, ("0x1.555550p-3", "0x1.55547cp-5", "0x1.11130ap-7", "0x1.6d9556p-10", "0x1.9e8ee2p-13")),
)
"""Of r, r^2, ... r^7 in exp(r) for r from -log(2)/2 to log(2)/2; the constant is 1. All are float32 numbers."""

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
    c1, c2, c3, c4, c5, c6 = EXP2_COEFFICIENTS
    q = _fma(_fma(_fma(_fma(c6, r, c5), r, c4), r, c3), r, c2)
    return _scale(1 + _fma(c1, r, r * r * q), n)


def _exp(x: Tensor) -> Tensor:
    x = x.clamp(*EXP_RANGE)
    n = (x.double() * LOG2E).round().float()  # of the exact product
    r = _fma(n, -LN2_LOW, _fma(n, -LN2_HIGH, x))
    p: Tensor | float = EXP_COEFFICIENTS[-1]
    for c in (*EXP_COEFFICIENTS[-2::-1], 1.0):
        p = _fma(p, r, c)
    return _scale(p, n)  # type: ignore[arg-type]


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
