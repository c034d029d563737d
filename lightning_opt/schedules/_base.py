"""What our schedules share: they count optimizer steps, and their rates depend on the step alone."""

import inspect
import math
import numbers
import warnings
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightning_opt._checks import check_choice


class StepSchedule(LRScheduler):
    """An ``LRScheduler`` that is stepped once an optimizer step, with rates in closed form.

    A subclass sets its arguments as attributes of the same names, calls ``super().__init__`` last, and gives
    :meth:`rate`.

    Args:
        optimizer: Its groups' ``lr`` are the base rates.
        total_steps: Optimizer steps of the run, or None where the schedule does not depend on them.
        extend: What a step beyond ``total_steps`` does: raise RuntimeError, or hold the final rate.
        last_epoch: Index of the last step done, as everywhere in torch; -1 to begin.

    Raises:
        ValueError: If a value is out of range.
        RuntimeError: In ``step``, beyond ``total_steps``.
    """

    interval: ClassVar[Literal["step"]] = "step"

    def __init__(
        self, optimizer: Optimizer, total_steps: int | None, extend: Literal["raise", "hold"], last_epoch: int
    ) -> None:
        check_choice("extend", extend, ["raise", "hold"])
        if isinstance(last_epoch, bool) or not isinstance(last_epoch, int) or last_epoch < -1:
            raise ValueError(f"last_epoch must be an integer >= -1, got {last_epoch!r}")
        self.total_steps, self.extend = total_steps, extend
        super().__init__(optimizer, last_epoch)

    def rate(self, step: int, base: float | Tensor, group: dict[str, Any]) -> float | Tensor:
        """The learning rate of a group.

        Args:
            step: Optimizer steps done, from 0; at most ``total_steps``.
            base: The group's initial rate.
            group: The group.
        """
        raise NotImplementedError

    @property
    def ends(self) -> bool:
        """Whether there is nothing to follow beyond ``total_steps``."""
        return self.total_steps is not None

    @override
    def get_lr(self) -> list[float | Tensor]:
        step = self.last_epoch
        if self.ends:
            assert self.total_steps is not None
            if step > self.total_steps and self.extend == "raise":
                raise RuntimeError(
                    f"{type(self).__name__} was made for total_steps={self.total_steps} and is stepped beyond them: it"
                    " must be stepped once an optimizer step (interval 'step' in Lightning) in a run of that length;"
                    " extend='hold' keeps the final rate"
                )
            step = min(step, self.total_steps)
        return [
            self.rate(step, base, group) for base, group in zip(self.base_lrs, self.optimizer.param_groups, strict=True)
        ]

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the saved schedule, with its arguments; warn where they differ from the constructor's."""
        for name in self._arguments():
            if name in state_dict and state_dict[name] != getattr(self, name):
                warnings.warn(
                    f"{type(self).__name__} continues the saved schedule with {name}={state_dict[name]!r}, not"
                    f" {getattr(self, name)!r}; start without its state to change it",
                    stacklevel=2,
                )
        super().load_state_dict(state_dict)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self._arguments())})"

    def _arguments(self) -> list[str]:
        return [name for name in inspect.signature(type(self)).parameters if name not in ("optimizer", "last_epoch")]


def check_steps(name: str, value: Any, low: int) -> int:
    """Return a number of steps as an int; a float with an integral value is accepted, and numpy's integers.

    Raises:
        ValueError: If it is None, infinite, no whole number or below ``low``.
    """
    if value is None:
        raise ValueError(
            f"{name} is needed: the number of optimizer steps of the run, in configure_optimizers"
            " self.trainer.estimated_stepping_batches; the lightning-opt command finds it out itself"
        )
    if value == math.inf:
        raise ValueError(f"{name} is infinite: the run has no known end; set the Trainer's max_steps or max_epochs")
    whole = (
        isinstance(value, (int, float, numbers.Integral))
        and not isinstance(value, bool)
        and value == value
        and int(value) == value
    )
    if not whole or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
    return int(value)
