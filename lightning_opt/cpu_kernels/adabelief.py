"""AdaBelief, element by element."""

from collections.abc import Callable
from math import sqrt
from typing import Any


def adabelief(*, amsgrad: bool) -> Callable[..., Any]:
    """The update of one element; see :class:`lightning_opt.optim.AdaBelief`."""

    def update(p, g, state, c):
        g = g + c.coupled * p
        exp_avg = state.exp_avg * c.beta1 + c.weight1 * g
        surprise = g - exp_avg
        exp_avg_var = state.exp_avg_var * c.beta2 + c.weight2 * surprise * surprise
        if amsgrad:
            largest = max(exp_avg_var + c.accumulated, state.max_exp_avg_var)
            root = sqrt(largest * c.scale + c.offset) + c.outer
            return p * c.shrink - c.size * exp_avg / root, exp_avg, exp_avg_var, largest
        root = sqrt(exp_avg_var * c.scale + c.offset) + c.outer
        return p * c.shrink - c.size * exp_avg / root, exp_avg, exp_avg_var

    return update
