"""When the Trainer writes a row to its loggers, writing one at the same step, and reading the last one."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from torch import Tensor


def is_log_step(trainer: Any, every_n_steps: int | None = None) -> bool:
    """Whether the optimizer step under way, or about to begin, is one that is logged.

    Asks no tensor, so nothing waits for the device.

    Args:
        trainer: A Trainer that is fitting.
        every_n_steps: Log every so many steps; None asks the Trainer's ``log_every_n_steps``.
    """
    if trainer.fast_dev_run:
        return True
    n = trainer.log_every_n_steps if every_n_steps is None else every_n_steps
    return n > 0 and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % n == 0


def row_is_due(trainer: Any) -> bool:
    """Whether the Trainer writes a row to its loggers when the present training batch ends."""
    accumulates = trainer.fit_loop._should_accumulate() and trainer.lightning_module.automatic_optimization
    return not accumulates and (trainer._logger_connector.should_update_logs or bool(trainer.fast_dev_run))


def write_row(trainer: Any, values: Mapping[str, Any]) -> None:
    """Give values to every logger at the present step, whether or not the Trainer writes a row of its own there.

    They also appear in ``trainer.logged_metrics`` and ``trainer.callback_metrics``. Unlike what ``self.log`` takes, a
    value is never repeated in a later row.

    Args:
        trainer: A Trainer that is fitting, within a training batch.
        values: Floats and 0-dim tensors by name.
    """
    connector = trainer._logger_connector
    tensors = {name: torch.as_tensor(value) for name, value in values.items()}
    connector._logged_metrics.update(tensors)
    connector._callback_metrics.update(tensors)
    if trainer.loggers:
        row = convert_tensors_to_scalars(dict(values))
        row.setdefault("epoch", trainer.current_epoch)
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def last_values(trainer: Any) -> dict[str, Tensor | float]:
    """What was last logged under each name.

    A new value is a new object. ``trainer.logged_metrics`` would also compute what an epoch has gathered so far, in a
    distributed run with communication; this never does.
    """
    return dict(trainer._logger_connector._logged_metrics)
