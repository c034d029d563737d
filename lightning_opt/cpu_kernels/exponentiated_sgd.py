"""Exponentiated SGD in its variants."""

from collections.abc import Callable
from math import asinh, sinh
from typing import Any

from numba.extending import register_jitable

from ._math import clamp, clamp_min, exp, sign


def exponentiated_sgd(*, variant: str, momentum: bool, nesterov: bool) -> Callable[..., Any]:
    """One element of :class:`lightning_opt.optim.ExponentiatedSGD`."""

    def update(p, g, state, c):
        g = g + c.decay * (sign(p) if variant == "eg" else p)
        if momentum:
            buffer = state.momentum_buffer * c.keep + c.enter * g
            g = g + c.momentum * buffer if nesterov else buffer
            g = g + type(g)(0) * buffer  # NaN where it is infinite: clamped below, it would stay unseen
            return step(p, g, c), buffer
        return (step(p, g, c),)

    @register_jitable
    def step(p, g, c):
        s = sign(p)
        if variant == "eg":
            return s * clamp_min(abs(p) * exp(clamp(-c.lr * s * g, -c.limit, c.limit)), c.floor)
        if variant == "gd_sign":
            moved = p - c.lr * g
            return moved if s == 0 else s * clamp_min(s * moved, c.floor)
        if variant == "hyper":
            return c.beta * sinh(asinh(p / c.beta) - clamp(c.lr * g, -c.limit, c.limit))
        return p - c.lr * g

    return update
