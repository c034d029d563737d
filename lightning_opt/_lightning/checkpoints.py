"""Saving through a ModelCheckpoint at a moment that it does not choose itself."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint


def save_now(callback: ModelCheckpoint, trainer: pl.Trainer) -> None:
    """Save a checkpoint as ``callback`` would at its next turn, unless it saved at this very step already.

    Lightning 2.6 leaves the steps after the last multiple of ``every_n_train_steps`` unsaved when training ends.
    """
    if not callback._should_skip_saving_checkpoint(trainer):
        candidates = callback._monitor_candidates(trainer)
        callback._save_topk_checkpoint(trainer, candidates)
        callback._save_last_checkpoint(trainer, candidates)
