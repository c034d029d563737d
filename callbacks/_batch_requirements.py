"""What :class:`AdaptiveBatchSize` needs of a Trainer, a module and a loader, and the bounds that follow from them."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_opt._lightning.probe import check_can_probe
from lightning_opt.data import ResumableLoader

from ._batch_cycle import Estimator


def check_trainer(trainer: pl.Trainer, pl_module: pl.LightningModule, estimator: Estimator) -> None:
    """Refuse what cannot be done; to be called in ``setup``.

    Raises:
        MisconfigurationException: With manual optimization, accumulation of the Trainer's own, a strategy that is
            neither of one device nor DDP, a ``training_step`` that takes ``dataloader_iter``, or an estimator that
            cannot work there.
    """
    who = "AdaptiveBatchSize decides itself when the optimizer steps"
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{who}, and {type(pl_module).__name__} optimizes by hand; use automatic optimization with one optimizer."
        )
    if trainer.accumulate_grad_batches != 1:
        raise MisconfigurationException(
            f"{who}; leave accumulate_grad_batches at 1 (it is {trainer.accumulate_grad_batches}), and set b0 and"
            " max_micro instead."
        )
    if trainer.strategy.handles_gradient_accumulation or not isinstance(
        trainer.strategy, SingleDeviceStrategy | DDPStrategy
    ):
        raise MisconfigurationException(
            f"{who}, from whole gradients, and {type(trainer.strategy).__name__} accumulates or shards them; use a"
            " single device or DDP."
        )
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            f"{who}, batch by batch, and the training_step takes dataloader_iter; let it take the batch."
        )
    if estimator == "worker" and trainer.world_size == 1:
        raise MisconfigurationException(
            "AdaptiveBatchSize(estimator='worker') compares the gradients of ranks, and there is one; use 'micro'."
        )
    if estimator == "per_sample":
        check_can_probe(trainer, pl_module, "AdaptiveBatchSize(estimator='per_sample')")


def check_model(trainer: pl.Trainer, pl_module: pl.LightningModule, estimator: Estimator) -> None:
    """Refuse optimizers and layers that do not fit; to be called in ``on_fit_start``.

    Raises:
        MisconfigurationException: With LBFGS, complex parameters, or ``"per_sample"`` with BatchNorm.
    """
    for name, p in pl_module.named_parameters():
        if p.requires_grad and p.is_complex():
            raise MisconfigurationException(
                f"AdaptiveBatchSize compares real gradients, and {name} is {p.dtype}; hold it as real numbers"
                " (torch.view_as_real), or freeze it."
            )
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
        raise MisconfigurationException(
            "AdaptiveBatchSize accumulates over several batches, which LBFGS would evaluate again; use another"
            " optimizer."
        )
    if estimator == "per_sample" and any(isinstance(m, _BatchNorm) for m in pl_module.modules()):
        raise MisconfigurationException(
            "AdaptiveBatchSize(estimator='per_sample') needs gradients of single samples, which BatchNorm mixes;"
            " use estimator='micro'."
        )


def limit_epoch(loader: ResumableLoader, limit: int | float | None) -> int:
    """Let an epoch hold as many samples as the limit's batches of the loader's own size; return their number."""
    loader.limit = None
    size = loader.initial_batch_size
    whole = len(loader.sampler) // size if loader.drop_last else -(-len(loader.sampler) // size)  # type: ignore[arg-type]
    batches = int(whole * limit) if isinstance(limit, float) else min(whole, limit or whole)
    if batches < whole:
        loader.limit = batches * size
    return batches


def largest_batch(trainer: pl.Trainer, loader: ResumableLoader, b_max: int | None) -> int:
    """``b_max``, bounded by the samples of an epoch on all ranks; warns where that is less than was given."""
    order = loader.sampler
    epoch = sum(order.end(0, 1, rank) for rank in range(order.num_replicas))  # type: ignore[attr-defined]
    if b_max is None or b_max <= epoch:
        return epoch if b_max is None else b_max
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector of Lightning's
        rank_zero_warn(
            f"AdaptiveBatchSize(b_max={b_max}) is more than the {epoch} samples of an epoch, which bound it."
        )
    return epoch


def first_batch(b0: int | None, b_max: int | None, loader_batch: int) -> int:
    """Samples of the first step.

    Args:
        b0: As given.
        b_max: As given.
        loader_batch: Samples of a batch of the loader's on all ranks.

    Raises:
        MisconfigurationException: If there is one sample, or there are more than ``b_max``.
    """
    start = b0 or loader_batch
    if start < 2:
        raise MisconfigurationException(
            "AdaptiveBatchSize compares samples of a batch, and the loader's holds one; set b0=2 or more."
        )
    if b_max is not None and start > b_max:
        raise MisconfigurationException(
            f"AdaptiveBatchSize(b_max={b_max}) is below the loader's {start} samples a step; lower its batch_size or"
            " raise b_max."
        )
    return start
