"""A probe leaves no trace, uses no global random state, and does not wait for the device where nothing is logged."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch.overrides import TorchFunctionMode

from ..contract import require
from .subject import LOG_EVERY, Subject, baseline, check, require_equal, require_same_training, run

_WAITS = {"item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "equal", "allclose", "unique"}
_WAITS |= {"__bool__", "__float__", "__int__", "__index__", "__format__", "__repr__", "__contains__"}


@check
def leaves_no_trace(subject: Subject) -> None:
    """Training is bit for bit what it is without the callback, random states and other logged values included."""
    subject.needs_observer()
    require_same_training(subject.outcome, baseline(), "with the callback against without")
    require_equal(subject.outcome.random_states, baseline().random_states, "random states after the run")


@check
def uses_no_random_state(subject: Subject) -> None:
    """The global random states of python, numpy and torch are neither used nor changed."""
    outcome = subject.run(plain=True)
    require_equal(outcome.random_states, baseline(plain=True).random_states, "random states after the run")


@check
def waits_for_nothing_between_logged_steps(subject: Subject) -> None:
    """On steps that are not logged the callback asks no tensor for its value, which would wait for a device."""
    subject.needs_observer()
    with_callback, without = _waits(subject.build()), _waits()
    for step, names in with_callback.items():
        if step % LOG_EVERY:
            extra = names - without[step]
            require(not extra, f"in step {step}, not logged: {', '.join(sorted(extra))}")


class _Watch(TorchFunctionMode):
    """Counts, by step, the calls that need the value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.calls: dict[int, Counter[str]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        masked = name == "__getitem__" and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool
        if self.step and (name in _WAITS or masked):
            self.calls[self.step][name] += 1
        return func(*args, **(kwargs or {}))


class _Clock(pl.Callback):
    """Tells the watch which step is under way.

    It comes last, so what others read when a batch starts counts to the step before: it was logged then.
    """

    def __init__(self, watch: _Watch) -> None:
        self.watch = watch

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Begin a step."""
        self.watch.step = trainer.global_step + 1
        self.watch.calls[self.watch.step] = Counter()


def _waits(*callbacks: pl.Callback) -> dict[int, Counter[str]]:
    with _Watch() as watch:
        run(*callbacks, _Clock(watch))
    return watch.calls
