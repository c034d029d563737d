from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .deis import NetworkCall


class _Update(NamedTuple):
    """``x_next = factor * x_start + shift + sum_k coefficients[k] * eps_k``."""

    factor: float
    shift: float
    coefficients: tuple[float, ...]
    stage: int


class Integrator:
    """Follows a plan of network calls: keeps the noise predictions and where the step began.

    It works on x itself, ``x = scale(rho) * v + shift(rho)``, with all numbers of a step multiplied out beforehand.

    Args:
        calls: The plan.
        scale: Factor of v at a noise level.
        shift: Shift of x at a noise level.
    """

    def __init__(
        self,
        calls: Sequence[NetworkCall],
        scale: Callable[[float], float] = lambda rho: 1.0,
        shift: Callable[[float], float] = lambda rho: 0.0,
    ) -> None:
        self._updates: list[_Update] = []
        start = calls[0].rho
        for call in calls:
            start = call.rho if call.stage == 0 else start
            factor = scale(call.rho_next) / scale(start)
            coefficients = tuple(scale(call.rho_next) * c for c in call.coefficients)
            moved = shift(call.rho_next) - factor * shift(start)
            self._updates.append(_Update(factor, moved, coefficients, call.stage))
        self._longest = max(len(update.coefficients) for update in self._updates)
        self._done = 0
        self._history: list[Tensor] = []
        self._start = torch.empty(0)

    def update(self, x: Tensor, epsilon: Tensor) -> Tensor:
        """The sample after the next call of the plan.

        Args:
            x: The sample at the call, float32 or float64.
            epsilon: The noise predicted there.

        Raises:
            ValueError: If the shape is another than in the calls before.
        """
        if self._history and self._history[0].shape != x.shape:
            raise ValueError(
                f"the sample has the shape {tuple(x.shape)}, but the predictions kept from the calls before have "
                f"{tuple(self._history[0].shape)}; call set_timesteps to begin with another batch"
            )
        update = self._updates[self._done]
        if update.stage == 0:
            self._start = x
        self._history.insert(0, epsilon)
        del self._history[self._longest :]
        after = self._start * update.factor if update.factor != 1 else self._start
        terms = [(c, eps) for c, eps in zip(update.coefficients, self._history, strict=False) if c]
        for i, (c, eps) in enumerate(terms):
            after = after.add(eps, alpha=c) if i == 0 else after.add_(eps, alpha=c)
        if update.shift:
            after = after.add_(update.shift)
        self._done += 1
        if self._done == len(self._updates):  # free the memory of a finished run
            self._history, self._start = [], torch.empty(0)
        return after
