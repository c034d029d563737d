"""Exponentiated SGD in its variants."""

from collections.abc import Callable
from math import asinh, sinh
from typing import Any

from numba.extending import register_jitable

from ._math import clamp, exp, maximum, sign


def exponentiated_sgd(*, variant: str, momentum: bool, nesterov: bool) -> Callable[..., Any]:
    """One element of :class:`lightning_opt.optim.ExponentiatedSGD`."""

    def update(p, g, state, c):
        g = g + c.decay * (sign(p) if variant == "eg" else p)
        if momentum:
            buffer = state.momentum_buffer * c.keep + c.enter * g
            return step(p, g + c.momentum * buffer if nesterov else buffer, c), buffer
        return (step(p, g, c),)

    @register_jitable
    def step(p, g, c):
        s = sign(p)
        if variant == "eg":
            return s * maximum(abs(p) * exp(-clamp(c.lr * s * g, -c.limit, c.limit)), c.floor)
        if variant == "gd_sign":
            moved = p - c.lr * g
            return moved if s == 0 else s * maximum(s * moved, c.floor)
        if variant == "hyper":
            return c.beta * sinh(asinh(p / c.beta) - clamp(c.lr * g, -c.limit, c.limit))
        return p - c.lr * g

    return update
