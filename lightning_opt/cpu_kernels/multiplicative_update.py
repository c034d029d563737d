"""The multiplicative update of a sampler."""

import math
from collections.abc import Callable
from typing import Any

from .fast_exp import fast_exp


def multiplicative_update(*, prediction: bool, noise: bool, log_state: bool, poly: bool) -> Callable[..., Any]:
    """One element of :func:`lightning_opt.diffusion.multiplicative_update`."""

    def update(v, c):
        exponent = c.a
        if prediction:
            exponent = exponent + c.b * v.prediction
        if noise:
            exponent = exponent + c.c * v.noise
        if log_state:
            return (v.x + exponent,)
        return (v.x * (fast_exp(exponent) if poly else math.exp(exponent)),)

    return update
