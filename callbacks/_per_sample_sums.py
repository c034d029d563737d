from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.func import functional_call

from lightning_opt._lightning.probe import Loss, probing
from lightning_opt.gradient_noise import per_sample_gradients


def per_sample_sums(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    batches: Sequence[tuple[Any, int]],
    mean: Sequence[Tensor],
    chunk_size: int,
    *,
    coordinates: bool,
) -> tuple[Tensor, Tensor | None]:
    r"""Number of samples, :math:`\sum \lVert g_i \rVert^2` and :math:`\sum \langle g_i, \bar g \rangle^2`; and squares.

    Args:
        trainer: In a step, before the weights change.
        pl_module: Its module.
        batches: The micro-batches of the step on this rank, and how many samples each holds.
        mean: The mean gradient of the step, one tensor a trained parameter.
        chunk_size: Samples at once.
        coordinates: Return :math:`\sum_i g_i^2` by coordinate too, flat.

    Raises:
        MisconfigurationException: If ``training_step`` cannot be vectorised.
    """
    trained = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
    direction = torch.cat([g.reshape(-1) for g in mean])
    sums = torch.zeros(3, dtype=torch.float64, device=direction.device)
    squares = torch.zeros_like(direction) if coordinates else None
    with probing(trainer, pl_module) as loss:
        holder = _Loss(pl_module, loss)

        def of_sample(parameters: dict[str, Tensor], sample: Any) -> Tensor:
            return functional_call(holder, {f"module.{name}": p for name, p in parameters.items()}, (sample,))

        for batch, samples in batches:
            for chunk in _vectorised(
                pl_module, per_sample_gradients(of_sample, trained, batch, samples, chunk_size=chunk_size)
            ):
                flat = torch.cat([g.reshape(len(g), -1) for g in chunk.values()], dim=1)
                sums[0] += len(flat)
                sums[1] += flat.double().square().sum()
                sums[2] += (flat @ direction).double().square().sum()
                if squares is not None:
                    squares += flat.square().sum(0)
    return sums, squares


def _vectorised(pl_module: pl.LightningModule, chunks: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    try:
        yield from chunks
    except torch.OutOfMemoryError:  # a RuntimeError, of another cause
        raise
    except (RuntimeError, ValueError) as error:
        raise MisconfigurationException(
            f"torch.func.vmap cannot run the training_step of {type(pl_module).__name__} on single samples: {error} Use"
            " AdaptiveBatchSize(estimator='micro')."
        ) from error


class _Loss(nn.Module):
    """A function of the parameters of a module."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, sample: Any) -> Tensor:
        return self.loss(sample)
