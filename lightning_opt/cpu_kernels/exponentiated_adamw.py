"""AdamW in the exponent."""

from collections.abc import Callable
from math import sqrt
from typing import Any

from ._math import clamp_min, maximum, sign, times_exp


def exponentiated_adamw(*, additive: bool, amsgrad: bool) -> Callable[..., Any]:
    """One element of :class:`lightning_opt.optim.ExponentiatedAdamW`."""

    def update(p, g, state, c):
        exp_avg = state.exp_avg * c.beta1 + c.weight1 * g
        exp_avg_sq = state.exp_avg_sq * c.beta2 + c.weight2 * g * g
        largest = maximum(exp_avg_sq, state.max_exp_avg_sq) if amsgrad else exp_avg_sq
        step = c.size * exp_avg / (sqrt(c.scale * largest) + c.eps)
        p = p * c.shrink
        if additive:
            p = p - step
        else:
            s = sign(p)
            p = s * clamp_min(times_exp(abs(p), -s * step, c.limit), c.floor)
        if amsgrad:
            return p, exp_avg, exp_avg_sq, largest
        return p, exp_avg, exp_avg_sq

    return update
