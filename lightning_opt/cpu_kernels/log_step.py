"""A sampler's step on log states."""

from collections.abc import Callable
from typing import Any

import numpy as np

_ONE = np.float32(1)


def log_step(*, noise: bool) -> Callable[..., Any]:
    """One element of :func:`lightning_opt.diffusion.log_step`."""

    def step(v, c):
        denoised = c.skip * v.y + c.gain * v.output + c.constant
        state = (_ONE - c.pull) * v.y + c.pull * denoised + c.shift
        if noise:
            state = state + c.scale * v.noise
        return state, denoised

    return step
