"""The noised sample and its regression target."""

from collections.abc import Callable
from math import log, sqrt
from typing import Any

import numpy as np

from .fast_exp import fast_exp

_ONE = np.float32(1)


def forward_noising(*, state: str, target: str, log_input: bool) -> Callable[..., Any]:
    """One element of :func:`lightning_opt.diffusion.noise_with_target`."""

    def noised(v, c):
        y0 = v.clean if log_input else log(v.clean)
        z0 = y0 - c.log_mean
        c_in = _ONE / sqrt(c.rho * c.rho + c.log_std * c.log_std)
        if state == "scaled":
            first = c_in * (z0 + c.rho * v.noise)
        elif state == "positive":
            first = fast_exp(y0 + c.mean_shift + c.rho * v.noise)
        else:
            first = y0 + c.mean_shift + c.rho * v.noise
        if target == "edm":
            second = c_in * (c.rho / c.log_std * z0 - c.log_std * v.noise)
        elif target == "hyvarinen":
            second = -_ONE - v.noise / c.rho
        else:
            second = v.noise
        return first, second

    return noised
