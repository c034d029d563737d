"""Proximal SGD with the elementwise proximal operators."""

from collections.abc import Callable
from typing import Any

from ._math import clamp


def prox_sgd(*, prox: str) -> Callable[..., Any]:
    """One element of :class:`lightning_opt.optim.ProxSGD`."""

    def update(p, g, state, c):
        z = p - c.lr * (g + c.decay * p)
        if prox == "l1":
            return (z - clamp(z, c.threshold),)
        return (clamp(z, c.size) + (z - z),)  # what is infinite must show, and not be cut to the box

    return update
