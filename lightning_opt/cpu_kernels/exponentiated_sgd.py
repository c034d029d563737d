"""Exponentiated SGD in its variants."""

from collections.abc import Callable
from math import sqrt
from typing import Any

from numba.extending import register_jitable

from ._math import clamp_min, sign, sinh_cosh, times_exp


def exponentiated_sgd(*, variant: str, momentum: bool, nesterov: bool) -> Callable[..., Any]:
    """One element of :class:`lightning_opt.optim.ExponentiatedSGD`."""

    def update(p, g, state, c):
        g = g + c.decay * (sign(p) if variant == "eg" else p)
        if momentum:
            buffer = state.momentum_buffer * c.keep + c.enter * g
            g = g + c.momentum * buffer if nesterov else buffer
            return step(p, g + (buffer - buffer), c), buffer  # NaN where infinite: cut below, it would stay unseen
        return (step(p, g, c),)

    @register_jitable
    def step(p, g, c):
        s = sign(p)
        if variant == "eg":
            return s * clamp_min(times_exp(abs(p), -c.lr * s * g, c.limit), c.floor)
        if variant == "gd_sign":
            moved = p - c.lr * g
            return s * clamp_min(s * moved, c.floor) + (type(p)(1) - abs(s)) * moved
        if variant == "hyper":
            # beta * sinh(asinh(p / beta) - d), by the addition theorem
            sinh, cosh_1 = sinh_cosh(c.lr * g, c.limit)
            return p + (p * cosh_1 - sqrt(p * p + c.beta * c.beta) * sinh)
        return p - c.lr * g

    return update
