"""What the command adds to a scheduler of the config: its length in steps, and when it is stepped."""

import inspect
from collections.abc import Callable
from typing import Any, Literal

from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from .errors import UserError

Interval = Literal["step", "epoch"]
_EVERY_STEP = (OneCycleLR, CyclicLR)  # their documentation says that they change the rate after every batch


def with_total_steps(cls: type, arguments: dict[str, Any], total_steps: Callable[[], float]) -> dict[str, Any]:
    """The arguments of a scheduler, with ``total_steps`` filled in where the class takes it and it is null.

    Args:
        cls: The scheduler's class.
        arguments: As configured.
        total_steps: Called only if it is needed: the optimizer steps of the run, infinite if that is not known.

    Raises:
        UserError: If they are needed and infinite.
    """
    if "total_steps" not in inspect.signature(cls).parameters or arguments.get("total_steps") is not None:
        return arguments
    if arguments.get("steps_per_epoch") is not None:  # OneCycleLR takes that in its place
        return arguments
    total = total_steps()
    if total == float("inf"):
        raise UserError(
            f"{cls.__name__}: total_steps cannot be found out, since this run has no known end (training data without"
            " length, or no limit of epochs); give --lr_scheduler.total_steps or --trainer.max_steps."
        )
    return {**arguments, "total_steps": int(total)}


def interval_of(scheduler: Any, given: Interval | None) -> Interval:
    """When the scheduler is stepped: as given, as its class says, else every epoch."""
    own: Interval = "step" if isinstance(scheduler, _EVERY_STEP) else "epoch"
    says: Interval = getattr(scheduler, "interval", own)
    return given or says


def remark(scheduler: Any, given: Interval | None) -> str | None:
    """What to tell a user who did not say when a scheduler of another package is stepped."""
    if given is not None or hasattr(scheduler, "interval") or not isinstance(scheduler, LRScheduler):
        return None
    if isinstance(scheduler, ReduceLROnPlateau):
        return None
    interval = interval_of(scheduler, None)
    other = "epoch" if interval == "step" else "step"
    return (
        f"lr_scheduler: {type(scheduler).__name__} is stepped every {interval.replace('step', 'optimizer step')};"
        f" --lr_scheduler_interval={other} changes that."
    )
