from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_opt._lightning.log_rows import write_row

from ._arguments import described_by_arguments
from ._log_values import is_wanted
from ._loss_curvature import completes_step
from ._window import load_window, save_window


class StepProbe(pl.Callback):
    """What callbacks share that measure on the batches about to be trained on, and log it behind the step.

    The micro-batches that a measurement waits for are kept through checkpoints, so that a run resumed in the middle of
    an accumulation window measures what the whole run does.
    """

    _optimizer: Optimizer | None
    _window: list[Any]  # micro-batches that the next measurement is made on
    _row: dict[str, float]  # to be logged behind the step

    def __init__(self) -> None:
        self._let_go()

    def __repr__(self) -> str:
        return described_by_arguments(self)

    def _gather(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> list[Any] | None:
        """Take a micro-batch of a step that is to be measured; behind the last one comes the whole window."""
        self._window.append(batch)
        if not completes_step(trainer, pl_module):
            return None
        window, self._window = self._window, []
        return window

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._row:
            row, self._row = self._row, {}
            if is_wanted(trainer):
                write_row(trainer, row)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        save_window(trainer, self, checkpoint, self._window)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._window = load_window(trainer, self, checkpoint)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._let_go()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._let_go()

    def _let_go(self) -> None:
        """Drop what belongs to a Trainer."""
        self._optimizer, self._window, self._row = None, [], {}
