"""AdaBelief."""

from collections.abc import Callable
from math import sqrt
from typing import Any

from ._math import maximum


def adabelief(*, amsgrad: bool) -> Callable[..., Any]:
    """One element of :class:`lightning_opt.optim.AdaBelief`."""

    def update(p, g, state, c):
        g = g + c.coupled * p
        exp_avg = state.exp_avg * c.beta1 + c.weight1 * g
        surprise = g - exp_avg
        exp_avg_var = state.exp_avg_var * c.beta2 + c.weight2 * surprise * surprise
        # the largest s so far, eps included; else s without the eps, which the offset holds
        base = maximum(exp_avg_var + c.accumulated, state.max_exp_avg_var) if amsgrad else exp_avg_var
        p = p * c.shrink - c.size * exp_avg / (sqrt(base * c.scale + c.offset) + c.outer)
        if amsgrad:
            return p, exp_avg, exp_avg_var, base
        return p, exp_avg, exp_avg_var

    return update
