"""The training loss of the step that is about to be made, to measure its curvature."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from lightning_opt.curvature import (
    CurvatureOperator,
    GGNOperator,
    HessianOperator,
    NonFiniteCurvatureError,
    mean_over_ranks,
    probe_mode,
    split_at_outputs,
)

from ._name_patterns import matches

Curvature = Literal["hessian", "ggn"]
Products = Literal["autograd", "finite_difference"]


def check_has_curvature(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    who: str,
    loss_fn: LossFn | None,
    param_filter: Sequence[str] | None = None,
) -> None:
    """Refuse what :func:`module_probe` cannot measure; to be called in ``setup``.

    Args:
        trainer: About to fit.
        pl_module: Its module.
        who: The plugin that asks.
        loss_fn: As for :func:`module_probe`.
        param_filter: Patterns of the names of the parameters that are measured; see :func:`matches`.

    Raises:
        MisconfigurationException: As :func:`check_can_probe`; with parameters that are complex or of less than 32 bits,
            or embeddings with sparse gradients.
    """
    check_can_probe(trainer, pl_module, who, loss_fn)
    if str(trainer.precision) in ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16"):
        raise MisconfigurationException(
            f"{who} differentiates twice, for which precision={trainer.precision!r} is too coarse; use 32-true or a"
            " mixed precision, whose parameters are float32."
        )
    chosen = {n: p for n, p in pl_module.named_parameters() if p.requires_grad and matches(n, param_filter)}
    for name, p in chosen.items():
        if p.dtype not in (torch.float32, torch.float64):
            raise MisconfigurationException(
                f"{who} differentiates twice by real parameters of at least 32 bits, and {name} is {p.dtype}; convert"
                " it, or freeze it."
            )
    embeddings = [name for name, m in pl_module.named_modules() if isinstance(m, nn.Embedding) and m.sparse]
    sparse = [name for name in embeddings if matches(f"{name}.weight", param_filter)]
    if sparse:
        raise MisconfigurationException(
            f"{who} cannot differentiate twice through {sparse[0]}, whose gradients are sparse."
        )


def check_has_outputs(pl_module: pl.LightningModule, loss: Loss, batch: Any) -> None:
    """Refuse a loss whose Gauss-Newton matrix is not known; within :func:`module_probe`, in front of the first step.

    Raises:
        MisconfigurationException: If the loss does not call the module once, for a tensor of outputs.
    """
    try:
        with torch.no_grad(), contextlib.suppress(NonFiniteCurvatureError):
            split_at_outputs(pl_module, loss)[0](batch)
    except ValueError as error:
        raise MisconfigurationException(
            f"curvature='ggn' divides the training loss at the outputs of {type(pl_module).__name__}, but {error}. Call"
            " self(inputs) once in training_step, or use curvature='hessian'."
        ) from error


@contextlib.contextmanager
def module_probe(
    trainer: pl.Trainer, pl_module: pl.LightningModule, loss_fn: LossFn | None = None, batch_idx: int = 0
) -> Iterator[Loss]:
    """Within, ``loss(batch)`` is the loss that curvature is measured of; behind, all is as it was before.

    That is the training loss with batch statistics in normalization layers and without dropout, in float32 or wider.
    """
    with probing(trainer, pl_module, loss_fn, batch_idx) as loss, probe_mode(pl_module):
        yield loss


def loss_curvature(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    loss: Loss,
    parameters: Iterable[Tensor],
    window: Sequence[Any],
    *,
    curvature: Curvature = "hessian",
    products: Products = "autograd",
) -> CurvatureOperator:
    """The curvature of a loss of :func:`module_probe` on micro-batches, averaged over them and over ranks.

    Args:
        trainer: Fitting.
        pl_module: Its module; its outputs are those of ``"ggn"``.
        loss: From :func:`module_probe`; to be used within.
        parameters: Those that are measured.
        window: The micro-batches.
        curvature: The Hessian, or the generalized Gauss-Newton matrix.
        products: How products are made.
    """
    reduce = reduction(trainer)
    if curvature == "hessian":
        return HessianOperator(loss, parameters, window, method=products, reduce=reduce)
    forward, output_loss = split_at_outputs(pl_module, loss)
    return GGNOperator(forward, output_loss, parameters, window, method=products, reduce=reduce)


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
