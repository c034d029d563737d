"""Micro-batches that a measurement waits for, kept through checkpoints."""

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
    """Add the micro-batches that every rank has gathered to a checkpoint; in ``on_save_checkpoint``."""
    if not window or trainer.state.status == TrainerStatus.INTERRUPTED:  # a rank that crashed must not wait for others
        return
    odd = _first_odd(window)
    if odd is not None:
        rank_zero_warn(
            f"{type(callback).__name__}: batches that hold {odd.__name__} cannot be saved, so a run resumed from this"
            " checkpoint, in the middle of what it measures on, is not exact."
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


def _first_odd(value: Any) -> type | None:
    """A type within that a checkpoint cannot hold: neither a tensor nor a builtin."""
    if type(value) is dict:
        value = [*value.keys(), *value.values()]
    if type(value) in (list, tuple):
        return next((odd for odd in map(_first_odd, value) if odd is not None), None)
    plain = isinstance(value, Tensor) or type(value) in (type(None), bool, int, float, str, bytes)
    return None if plain else type(value)
