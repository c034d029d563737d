"""Lion and the elementwise kernels of Lion-K."""

from collections.abc import Callable
from math import sqrt
from typing import Any

from ._math import clamp, sign


def lion(*, kernel: str) -> Callable[..., Any]:
    """One element of :class:`lightning_opt.optim.LionK`."""

    def update(p, g, state, c):
        z = c.beta1 * state.exp_avg + c.weight1 * g
        if kernel == "sign":
            direction = sign(z)
        elif kernel == "soft":
            direction = sign(z) if abs(z) > c.e else type(z)(0)
        elif kernel == "huber":
            direction = clamp(z / c.e, type(z)(1))
        elif kernel == "relativistic":
            direction = z / sqrt(z * z + c.e * c.e)
        else:  # quadratic
            direction = z
        direction = direction + type(z)(0) * z  # the sign of NaN is 0, and that of inf is finite: it must show
        direction = direction + (z - z)  # the sign of NaN is 0, and that of inf is finite: what is wrong must show
        return p * c.shrink - c.size * direction, state.exp_avg * c.beta2 + c.weight2 * g

    return update
