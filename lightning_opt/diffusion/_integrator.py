from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .deis import NetworkCall, network_calls


class Plan:
    """A sampler on a grid: the calls of the network, and an integrator that begins at any step of them.

    Args:
        levels: Noise levels ``[N + 1]``, falling.
        scale: Factor of v at a noise level, in ``x = scale * v + shift``. Picklable, as a scheduler is.
        shift: Shift at a noise level.
        **options: Those of :func:`network_calls`.
    """

    def __init__(
        self, levels: Tensor, *, scale: Callable[[float], float], shift: Callable[[float], float], **options: Any
    ) -> None:
        self._levels, self._scale, self._shift, self._options = levels, scale, shift, options
        self.calls = network_calls(levels, **options)

    def begin(self, index: int) -> "Integrator":
        """The integrator of the calls from a place on, with no predictions before.

        Raises:
            ValueError: If the call is not the first of its step.
        """
        if self.calls[index].stage:
            raise ValueError(
                f"the run begins at call {index} of {len(self.calls)}, which is stage {self.calls[index].stage + 1} of "
                "a step; begin at the first of a step's calls (with a multistep method, use warmup='low_order')"
            )
        steps_before = sum(call.stage == 0 for call in self.calls[:index])
        calls = network_calls(self._levels, skip=steps_before, **self._options) if steps_before else self.calls
        return Integrator(calls, self._scale, self._shift)


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
        scale: Callable[[float], float],
        shift: Callable[[float], float],
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
        self._staged = any(update.stage for update in self._updates)
        self._done = 0
        self._history: list[Tensor] = []
        self._start = torch.empty(0)

    def update(self, call: int, x: Tensor, epsilon: Tensor) -> Tensor:
        """The sample after a call of the plan.

        Args:
            call: Its place in the plan: the next, or one of the last few again, which is then done anew.
            x: The sample at the call, float32 or float64.
            epsilon: The noise predicted there; it is kept.

        Raises:
            ValueError: If the shape is another than in the calls before.
        """
        del self._history[: self._done - call]
        if self._history and self._history[0].shape != x.shape:
            raise ValueError(
                f"the sample has the shape {tuple(x.shape)}, but the predictions kept from the calls before have "
                f"{tuple(self._history[0].shape)}; call set_timesteps to begin with another batch"
            )
        update = self._updates[call]
        if update.stage == 0:
            self._start = x.clone() if self._staged else x  # the caller's, who may change it between stages
        self._history.insert(0, epsilon)
        del self._history[self._longest :]
        self._done = call + 1
        after = self._start * update.factor if update.factor != 1 else self._start
        terms = [(c, eps) for c, eps in zip(update.coefficients, self._history, strict=False) if c]
        for i, (c, eps) in enumerate(terms):
            after = after.add(eps, alpha=c) if i == 0 else after.add_(eps, alpha=c)
        return after.add_(update.shift) if update.shift else after
