"""The micro-batches of a step, kept while it is accumulated, through checkpoints too."""

from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor


def save_window(
    trainer: pl.Trainer, callback: pl.Callback, checkpoint: dict[str, Any], window: list[Any], key: str = "windows"
) -> None:
    """Add the micro-batches of every rank to a checkpoint in the middle of a step; in ``on_save_checkpoint``."""
    if not window or trainer.state.status == TrainerStatus.INTERRUPTED:  # a rank that crashed must not wait for others
        return
    if not _is_plain(window):
        rank_zero_warn(
            f"{type(callback).__name__}: batches of {type(window[0]).__name__} cannot be saved, so a run resumed from"
            " this checkpoint, in the middle of an accumulation window, is not exact."
        )
        return
    own = move_data_to_device(window, "cpu")  # type: ignore[arg-type]
    windows: list[Any] = [own]
    if trainer.world_size > 1 and dist.is_initialized():
        windows = [None] * trainer.world_size
        dist.gather_object(own, windows if trainer.is_global_zero else None)
    checkpoint["callbacks"][callback.state_key][key] = windows


def load_window(
    trainer: pl.Trainer, callback: pl.Callback, checkpoint: dict[str, Any], key: str = "windows"
) -> list[Any]:
    """This rank's micro-batches in a checkpoint, on the device; in ``on_load_checkpoint``."""
    windows = checkpoint["callbacks"].get(callback.state_key, {}).get(key, [])
    if len(windows) != trainer.world_size:
        return []
    return list(move_data_to_device(windows[trainer.global_rank], trainer.strategy.root_device))


def _is_plain(value: Any) -> bool:
    """Whether a checkpoint can hold it: tensors and builtins."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value.keys())) and all(map(_is_plain, value.values()))
    return isinstance(value, Tensor) or type(value) in (type(None), bool, int, float, str, bytes)
