"""The checkpoint callback that the command adds to every fit."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_opt._checks import check_choice, check_interval
from lightning_opt._lightning.checkpoints import save_now


class PeriodicCheckpoint(ModelCheckpoint):
    """Saves a checkpoint every N steps and one at the end, and links ``last.ckpt`` to the newest.

    It is for resuming, not for choosing: to keep the best by a metric, add a ``ModelCheckpoint`` with ``monitor`` to
    ``trainer.callbacks`` beside it. The previous checkpoint is removed only after the next one is completely written,
    so a run that is killed at any time leaves a loadable one.

    Args:
        every_n_train_steps: Optimizer steps between two checkpoints.
        save_top_k: 1 keeps only the newest, -1 keeps all.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> PeriodicCheckpoint(every_n_train_steps=500).save_last
        'link'
    """

    def __init__(self, every_n_train_steps: int = 100, save_top_k: int = 1) -> None:
        check_interval("every_n_train_steps", every_n_train_steps, 1)
        check_choice("save_top_k", save_top_k, (1, -1))
        super().__init__(every_n_train_steps=every_n_train_steps, save_top_k=save_top_k, save_last="link")

    @property
    def state_key(self) -> str:
        """One key whatever the interval, so that a resumed run may choose another."""
        return "PeriodicCheckpoint"

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        """Save every N steps, and at ``max_steps`` before Lightning counts the epoch as over."""
        super().on_train_batch_end(trainer, pl_module, *rest)
        if trainer.global_step == trainer.max_steps:
            save_now(self, trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save behind the last epoch, before a WeightAveraging callback puts averaged weights in place of the trained.

        They would be trained on if the run is extended.
        """
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs:
            save_now(self, trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of the run."""
        save_now(self, trainer)
