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
    PreconditionedOperator,
    Stability,
    lanczos,
    stability,
)

from ._learning_rate import largest_lr
from ._loss_curvature import Products, module_probe, reduction
from ._optimizer_metric import heavy_ball_unit, in_metric, momentum_of

Trace = Literal["hutchinson", "fisher_mc", "exact_mse"]
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
        NonFiniteCurvatureError: If a product holds NaN or infinity.
    """
    generator = torch.Generator().manual_seed(settings.seed + trainer.global_step)
    with _curvature(trainer, pl_module, optimizer, window, settings, batch_idx) as (plain, forward):
        operator = in_metric(plain, optimizer)
        if operator is None:
            return None
        ritz = lanczos(operator, settings.lambda_max_steps, generator=generator)
        if settings.trace == "hutchinson":
            parts = _hutchinson(operator, settings.num_probes, generator)
        elif settings.trace == "fisher_mc":
            assert forward is not None
            generator.manual_seed(settings.seed + trainer.global_step + trainer.global_rank * 2**32)
            parts = _averaged(trainer, _fisher(operator, forward, window, settings.num_probes, generator))
        else:
            assert forward is not None
            parts = _averaged(trainer, settings.mse_factor * _exact(operator, forward, window))
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
        # any loss with the same curvature in the outputs, so targets are not needed
        of_outputs = _log_partition if settings.trace == "fisher_mc" else _Quadratic(settings.mse_factor)
        yield (
            GGNOperator(
                lambda batch: (forward(batch), None),
                of_outputs,
                parameters,
                window,
                method=settings.products,
                reduce=reduce,
            ),
            forward,
        )


def _call_on_inputs(pl_module: pl.LightningModule, batch: Any) -> Tensor:
    return pl_module(batch[0] if isinstance(batch, (list, tuple)) else batch)


def _log_partition(outputs: Tensor, _: Any) -> Tensor:
    """Cross-entropy without its linear part."""
    return outputs.logsumexp(dim=1).mean()


class _Quadratic:
    """Half the squared error, summed over outputs, mean over samples, times a factor, without its linear part."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, outputs: Tensor, _: Any) -> Tensor:
        return self.factor / 2 * outputs.square().sum() / len(outputs)


def _hutchinson(operator: CurvatureOperator, num_probes: int, generator: torch.Generator) -> Tensor:
    """Estimates of the trace ``[probes, parameters]`` from random signs."""
    rows = []
    for _ in range(num_probes):
        signs = torch.randint(0, 2, (operator.size,), generator=generator).mul_(2).sub_(1)
        v = signs.to(operator.device, operator.dtype)
        rows.append(_sums(operator, v * (operator @ v)))
    return torch.stack(rows).to("cpu", torch.float64)


def _fisher(
    operator: CurvatureOperator,
    forward: Callable[[Any], Tensor],
    window: Sequence[Any],
    num_probes: int,
    generator: torch.Generator,
) -> Tensor:
    """Estimates ``[probes, parameters]`` from labels drawn from the network's own prediction.

    Scores of different samples are independent with mean zero, so the squared norm of their sum is, on average, the sum
    of their squared norms: one backward pass a probe.
    """
    rows = torch.zeros(num_probes, len(operator.params), dtype=torch.float64)
    for batch in window:
        logits = forward(batch)
        if logits.ndim != 2:
            raise ValueError(f"trace='fisher_mc' needs logits [samples, classes], got shape {list(logits.shape)}")
        p = logits.detach().softmax(dim=1)
        for number in range(num_probes):
            labels = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
            score = p.scatter_add(1, labels, -torch.ones_like(p[:, :1]))
            gradients = torch.autograd.grad(logits, operator.params, score, retain_graph=True, allow_unused=True)
            gradient = operator.flatten(gradients) * _scale(operator)
            rows[number] += _sums(operator, gradient.square()).to("cpu", torch.float64) / len(p) / len(window)
    return rows


def _exact(operator: CurvatureOperator, forward: Callable[[Any], Tensor], window: Sequence[Any]) -> Tensor:
    """The mean over samples of the squared norms of the outputs' gradients ``[1, parameters]``."""
    row = torch.zeros(1, len(operator.params), dtype=torch.float64)
    for batch in window:
        outputs = forward(batch)
        for entry in outputs.flatten():
            gradients = torch.autograd.grad(entry, operator.params, retain_graph=True, allow_unused=True)
            gradient = operator.flatten(gradients) * _scale(operator)
            row[0] += _sums(operator, gradient.square()).to("cpu", torch.float64) / len(outputs) / len(window)
    return row


def _scale(operator: CurvatureOperator) -> Tensor | float:
    """What a gradient is multiplied by in the metric of the optimizer."""
    return operator.scale if isinstance(operator, PreconditionedOperator) else 1.0


def _sums(operator: CurvatureOperator, vector: Tensor) -> Tensor:
    """Sums of the parts of a vector that belong to the parameters, in float64."""
    return torch.stack([part.sum(dtype=torch.float64) for part in operator.unflatten(vector)])


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
