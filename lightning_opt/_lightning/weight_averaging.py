"""The weights that Lightning's WeightAveraging holds beside those that are trained."""

import contextlib
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging


@contextlib.contextmanager
def averaged_weights(trainer: Any, pl_module: pl.LightningModule) -> Iterator[None]:
    """Within, the module has the averaged weights, as in a validation, if a WeightAveraging callback has made some.

    Args:
        trainer: Fitting, outside of a validation, in which Lightning has swapped the weights already.
        pl_module: Its module.
    """
    averaging = [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]
    averaging = [c for c in averaging if c._average_model is not None and int(c._average_model.n_averaged) > 0]
    for callback in averaging:
        callback._swap_models(pl_module)
    try:
        yield
    finally:
        for callback in reversed(averaging):
            callback._swap_models(pl_module)
