"""The training loss of the step that is about to be made, to measure its curvature."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.apply_func import apply_to_collection  # type: ignore[attr-defined]
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_opt._lightning.probe import Loss, LossFn, check_can_probe, probing
from lightning_opt._lightning.restart import is_accumulating
from lightning_opt.curvature import mean_over_ranks, probe_mode

Products = Literal["autograd", "finite_difference"]


def check_has_curvature(trainer: pl.Trainer, pl_module: pl.LightningModule, who: str, loss_fn: LossFn | None) -> None:
    """Refuse what :func:`module_probe` cannot measure; to be called in ``setup``.

    Raises:
        MisconfigurationException: As :func:`check_can_probe`; with parameters of less than 32 bits, or embeddings with
            sparse gradients.
    """
    check_can_probe(trainer, pl_module, who, loss_fn)
    if str(trainer.precision) in ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16"):
        raise MisconfigurationException(
            f"{who} differentiates twice, for which precision={trainer.precision!r} is too coarse; use 32-true or a"
            " mixed precision, whose parameters are float32."
        )
    sparse = [name for name, m in pl_module.named_modules() if isinstance(m, nn.Embedding) and m.sparse]
    if sparse:
        raise MisconfigurationException(
            f"{who} cannot differentiate twice through {sparse[0]}, whose gradients are sparse."
        )


@contextlib.contextmanager
def module_probe(
    trainer: pl.Trainer, pl_module: pl.LightningModule, loss_fn: LossFn | None = None, batch_idx: int = 0
) -> Iterator[Loss]:
    """Within, ``loss(batch)`` is the loss that curvature is measured of; behind, all is as it was before.

    That is the training loss with batch statistics in normalization layers and without dropout, in float32 or wider.
    """
    with contextlib.ExitStack() as stack:
        loss = stack.enter_context(probing(trainer, pl_module, loss_fn, batch_idx))
        stack.enter_context(probe_mode(pl_module))
        if any(isinstance(m, nn.RNNBase) for m in pl_module.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))  # its layers differentiate once only
        yield loss


def reduction(trainer: pl.Trainer) -> Callable[[Tensor], Tensor] | None:
    """The mean over ranks, where there are several."""
    return mean_over_ranks if trainer.world_size > 1 and dist.is_initialized() else None


def completes_step(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """In ``on_train_batch_start``: whether the optimizer steps behind this micro-batch."""
    return not (pl_module.automatic_optimization and is_accumulating(trainer))


def part_of(batch: Any, samples: int) -> Any:
    """The first samples of a batch."""
    size = extract_batch_size(batch)
    if size <= samples:
        return batch
    return apply_to_collection(batch, Tensor, lambda t: t[:samples] if t.ndim and len(t) == size else t)
