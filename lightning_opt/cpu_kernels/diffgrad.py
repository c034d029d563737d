"""DiffGrad."""

from collections.abc import Callable
from math import sqrt
from typing import Any

from ._math import maximum, sigmoid


def diffgrad(*, relative: bool, amsgrad: bool) -> Callable[..., Any]:
    """One element of :class:`lightning_opt.optim.DiffGrad`."""

    def update(p, g, state, c):
        g = g + c.coupled * p
        exp_avg = state.exp_avg * c.beta1 + c.weight1 * g
        exp_avg_sq = state.exp_avg_sq * c.beta2 + c.weight2 * g * g
        change = abs(state.previous_grad - g)
        if relative:
            change = c.kappa * change / (sqrt(c.unbias * exp_avg_sq) + c.eps)
        base = maximum(exp_avg_sq, state.max_exp_avg_sq) if amsgrad else exp_avg_sq
        p = p * c.shrink - c.size * sigmoid(change) * exp_avg / (sqrt(c.scale * base) + c.eps)
        if amsgrad:
            return p, exp_avg, exp_avg_sq, g, base
        return p, exp_avg, exp_avg_sq, g

    return update
