"""Mean and variance of the gradient of the step under way, the same on every rank."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_opt.gradient_noise import GradientStatistics

from ._batch_cycle import BatchCycle
from ._group_gradients import check_dense
from ._per_sample_sums import per_sample_sums


@torch.no_grad()
def step_statistics(
    trainer: pl.Trainer, pl_module: pl.LightningModule, cycle: BatchCycle, chunk_size: int
) -> GradientStatistics | None:
    """What the window of the cycle, which is tested, says about the noise of its gradient.

    Args:
        trainer: In ``on_before_optimizer_step``.
        pl_module: Its module.
        cycle: With the collector of the window's groups, or the batches of ``"per_sample"``.
        chunk_size: Samples at once for ``"per_sample"``.

    Returns:
        The statistics; None where there are fewer than two groups.

    Raises:
        RuntimeError: For sparse gradients.
    """
    test = cycle.grouping.test
    coordinates = test == "coordinate"
    parameters = [p for p in pl_module.parameters() if p.requires_grad]
    mean = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    check_dense(mean)
    squares: Tensor | None = None
    if cycle.collector is not None:
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        sums = cycle.collector.sums(mean, scale)
        squares = cycle.collector.sum_of_squares(scale) if coordinates else None
    elif cycle.grouping.estimator == "per_sample":
        sums, squares = per_sample_sums(trainer, pl_module, cycle.batches, mean, chunk_size, coordinates=coordinates)
    else:
        return None
    # of rank 0 alone, so that all ranks have the same to the last bit
    norm_sq = torch.stack([g.double().square().sum() for g in mean]).sum() if trainer.is_global_zero else 0.0
    sums = torch.cat([sums, torch.as_tensor([norm_sq]).to(sums)])
    if trainer.world_size > 1:
        sums = trainer.strategy.reduce(sums, reduce_op="sum")  # type: ignore[assignment]
        squares = squares if squares is None else trainer.strategy.reduce(squares, reduce_op="sum")  # type: ignore[assignment]
    groups, sum_sq, sum_dot_sq, grad_norm_sq = sums.tolist()
    if groups < 2:
        return None
    return GradientStatistics.from_sums(
        samples=cycle.window.planned,
        groups=int(groups),
        grad_norm_sq=grad_norm_sq,
        sum_sq=sum_sq,
        sum_dot_sq=sum_dot_sq if "inner_product" in test else None,
        mean=torch.cat([g.reshape(-1) for g in mean]) if coordinates else None,
        sum_of_squares=squares,
    )
