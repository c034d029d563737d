"""What every rank of a data-parallel run holds for itself, while Lightning saves rank 0 alone."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def replica_state(trainer: pl.Trainer) -> dict[str, Any]:
    """Buffers such as BatchNorm's, which drift apart between two synchronizations, and whether one is due.

    DDP sends the buffers of rank 0 to the others when it runs forward, but not inside an accumulation window.
    """
    model = trainer.strategy.model
    if not isinstance(model, DistributedDataParallel):
        return {"buffers": {}}
    return {
        "sync_in_forward": model.require_forward_param_sync,
        "buffers": dict(trainer.lightning_module.named_buffers()),
    }


@torch.no_grad()
def load_replica_state(trainer: pl.Trainer, state: dict[str, Any]) -> None:
    """Take back what :func:`replica_state` returned; buffers without an entry stay as they are."""
    model = trainer.strategy.model
    if isinstance(model, DistributedDataParallel) and "sync_in_forward" in state:
        model.require_forward_param_sync = state["sync_in_forward"]
        for name, buffer in trainer.lightning_module.named_buffers():
            if name in state["buffers"]:
                buffer.copy_(state["buffers"][name])


def gather_states(trainer: pl.Trainer, state: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The states of all ranks, on the rank that writes the checkpoint; elsewhere ``None``.

    Args:
        trainer: On every rank.
        state: With an entry ``"replica"``; buffers equal to those of rank 0 are left out, as the checkpoint has them.
    """
    if trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
        return [state]
    states: list[Any] = [None] * trainer.world_size
    dist.gather_object(state, states if trainer.is_global_zero else None)
    if not trainer.is_global_zero:
        return None
    saved_anyway: dict[str, Tensor] = states[0]["replica"]["buffers"]
    for other in states[1:]:
        buffers: dict[str, Tensor] = other["replica"]["buffers"]
        other["replica"]["buffers"] = {k: v for k, v in buffers.items() if not torch.equal(v, saved_anyway[k])}
    states[0]["replica"]["buffers"] = {}
    return states
