from typing import Literal, Protocol, get_args, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException

Possession = Literal["learning rate", "batch size", "closure"]

_OF_LIGHTNING: dict[type[Callback], frozenset[Possession]] = {
    BaseFinetuning: frozenset({"learning rate"}),  # of the groups that it adds
    BatchSizeFinder: frozenset({"batch size"}),
    GradientAccumulationScheduler: frozenset({"batch size"}),
    LearningRateFinder: frozenset({"learning rate"}),
    StochasticWeightAveraging: frozenset({"learning rate"}),
}


@runtime_checkable
class Owner(Protocol):
    """A callback that sets something that nobody else may set in the same run."""

    @property
    def owns(self) -> frozenset[Possession]:
        """What it sets; an attribute of the class, or of a callback that sets it in some settings only."""


def check_sole_owner(trainer: pl.Trainer, callback: Owner) -> None:
    """Refuse a Trainer in which another callback sets what this one sets; to be called in ``setup``.

    Args:
        trainer: With all its callbacks.
        callback: The one that asks.

    Raises:
        MisconfigurationException: If another callback of the Trainer, ours or Lightning's, owns the same.
    """
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        shared = callback.owns & possessions(other)
        if other is not callback and shared:
            (what, *_) = sorted(shared, key=get_args(Possession).index)
            raise MisconfigurationException(
                f"{type(callback).__name__} and {type(other).__name__} both set the {what}; keep one of them."
            )


def check_no_scheduler(trainer: pl.Trainer, callback: Callback) -> None:
    """Refuse learning-rate schedulers beside a callback that sets the rate; to be called in ``on_fit_start``.

    Raises:
        MisconfigurationException: If ``configure_optimizers`` returned a scheduler.
    """
    if trainer.lr_scheduler_configs:
        scheduler = type(trainer.lr_scheduler_configs[0].scheduler).__name__
        raise MisconfigurationException(
            f"{type(callback).__name__} and the scheduler {scheduler} both set the learning rate; keep one of them."
        )


def possessions(callback: Callback) -> frozenset[Possession]:
    """What a callback sets."""
    if isinstance(callback, Owner):
        return callback.owns
    return next((what for cls, what in _OF_LIGHTNING.items() if isinstance(callback, cls)), frozenset())
