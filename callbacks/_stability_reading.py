"""Measuring trace and top eigenvalue of the curvature of the step at hand, and relating them to its rate."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.optim import Optimizer

from lightning_opt._checks import check_choice, check_interval
from lightning_opt._lightning.probe import LossFn
from lightning_opt.curvature import (
    CurvatureOperator,
    GGNOperator,
    HessianOperator,
    NonFiniteCurvatureError,
    Stability,
    lanczos,
    stability,
)
from lightning_opt.curvature._trace_by_parameter import Trace, estimates, output_loss

from ._learning_rate import largest_lr
from ._loss_curvature import Products, module_probe, reduction
from ._optimizer_metric import heavy_ball_unit, in_metric, momentum_of

ForwardFn = Callable[[pl.LightningModule, Any], Tensor]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure; the arguments of :class:`StabilityMonitor` of these names."""

    trace: Trace
    num_probes: int
    lambda_max_steps: int
    products: Products
    batch_size: int | None
    dataset_size: int | Literal["auto", "infinite"]
    mse_factor: float
    loss_fn: LossFn | None
    forward_fn: ForwardFn | None
    seed: int
    per_layer: bool = False

    @classmethod
    def of(cls, callback: Any) -> "Settings":
        """Those that a callback keeps under their own names; what it lacks has its default."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: getattr(callback, name) for name in names if hasattr(callback, name)})

    def check(self) -> None:
        """Raise ValueError if one is out of its range."""
        check_choice("trace", self.trace, get_args(Trace))
        check_interval("num_probes", self.num_probes, 2)
        check_interval("lambda_max_steps", self.lambda_max_steps, 2)
        check_choice("products", self.products, get_args(Products))
        if self.batch_size is not None:
            check_interval("batch_size", self.batch_size, 1)
        if isinstance(self.dataset_size, str):
            check_choice("dataset_size", self.dataset_size, ("auto", "infinite"))
        else:
            check_interval("dataset_size", self.dataset_size, 1)
        check_interval("mse_factor", self.mse_factor, 0, closed="()")
        check_interval("seed", self.seed, 0)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one measurement gives.

    Attributes:
        stability: In units of a heavy ball.
        lambda_error: An eigenvalue lies within it of ``lambda_max``.
        unit: Rate of that heavy ball over rate of the optimizer.
        by_parameter: Shares in the trace; empty unless asked for.
    """

    stability: Stability
    lambda_error: float
    unit: float
    by_parameter: dict[str, float]


def read_stability(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    optimizer: Optimizer,
    window: Sequence[Any],
    settings: Settings,
    batch_idx: int,
) -> Reading | None:
    """Measure on the micro-batches of a step; None before Adam's first step.

    Raises:
        NonFiniteCurvatureError: If a product holds NaN or infinity, or the rate or the shares of the edge would.
    """
    if not math.isfinite(largest_lr(optimizer)) or not momentum_of(optimizer) < 1:
        raise NonFiniteCurvatureError(
            f"the learning rate is {largest_lr(optimizer)} and the momentum {momentum_of(optimizer)}"
        )
    generator = torch.Generator().manual_seed(settings.seed + trainer.global_step)
    with _curvature(trainer, pl_module, optimizer, window, settings, batch_idx) as (plain, forward):
        operator = in_metric(plain, optimizer)
        if operator is None:
            return None
        ritz = lanczos(operator, settings.lambda_max_steps, generator=generator)
        shares = [1 / len(window)] * len(window)
        if settings.trace == "fisher_mc":  # each rank draws labels of its own samples
            generator.manual_seed(settings.seed + trainer.global_step + trainer.global_rank * 2**32)
        parts = estimates(
            settings.trace, operator, forward, window, shares,
            num_probes=settings.num_probes, mse_factor=settings.mse_factor, generator=generator,
        )  # fmt: skip
        if settings.trace != "hutchinson":
            parts = _averaged(trainer, parts)
        names = _names(pl_module, operator)
    samples = parts.sum(dim=1)
    stderr = 0.0 if settings.trace == "exact_mse" else samples.std().item() / math.sqrt(len(samples))
    by_parameter: dict[str, float] = {}
    if settings.per_layer:
        by_parameter = dict(zip(names, parts.mean(dim=0).tolist(), strict=True))
    unit = heavy_ball_unit(optimizer)
    reading = stability(
        samples.mean().item(),
        ritz.ritz_values[-1].item(),
        lr=largest_lr(optimizer) * unit,
        batch_size=settings.batch_size or _samples(trainer, pl_module, window),
        momentum=momentum_of(optimizer),
        dataset_size=_dataset_size(trainer, settings.dataset_size),
        trace_stderr=stderr,
    )
    return Reading(reading, ritz.residuals[-1].item(), unit, by_parameter)


@contextlib.contextmanager
def _curvature(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    optimizer: Optimizer,
    window: Sequence[Any],
    settings: Settings,
    batch_idx: int,
) -> Iterator[tuple[CurvatureOperator, Callable[[Any], Tensor] | None]]:
    """The Hessian of the loss, or the Gauss-Newton matrix with the network's outputs."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    reduce = reduction(trainer)
    with module_probe(trainer, pl_module, settings.loss_fn, batch_idx) as loss:
        if settings.trace == "hutchinson":
            yield HessianOperator(loss, parameters, window, method=settings.products, reduce=reduce), None
            return
        forward = functools.partial(settings.forward_fn or _call_on_inputs, pl_module)
        yield (
            GGNOperator(
                lambda batch: (forward(batch), None),
                output_loss(settings.trace, settings.mse_factor),
                parameters,
                window,
                method=settings.products,
                reduce=reduce,
            ),
            forward,
        )


def _call_on_inputs(pl_module: pl.LightningModule, batch: Any) -> Tensor:
    return pl_module(batch[0] if isinstance(batch, (list, tuple)) else batch)


def _averaged(trainer: pl.Trainer, parts: Tensor) -> Tensor:
    reduce = reduction(trainer)
    return parts if reduce is None else reduce(parts.to(trainer.strategy.root_device)).cpu()


def _names(pl_module: pl.LightningModule, operator: CurvatureOperator) -> list[str]:
    names = {id(p): name for name, p in pl_module.named_parameters()}
    return [names.get(id(p), f"parameter {number}") for number, p in enumerate(operator.params)]


def _samples(trainer: pl.Trainer, pl_module: pl.LightningModule, window: Sequence[Any]) -> float:
    """Samples of the step, over micro-batches and ranks."""
    count = torch.tensor(float(sum(extract_batch_size(batch) for batch in window)), device=pl_module.device)
    reduce = reduction(trainer)
    return count.item() if reduce is None else reduce(count).item() * trainer.world_size


def _dataset_size(trainer: pl.Trainer, given: int | str) -> int | None:
    """Samples of an epoch; None if the loader does not tell, or samples are drawn independently."""
    if isinstance(given, int):
        return given
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    return len(dataset) if given == "auto" and isinstance(dataset, Sized) else None
