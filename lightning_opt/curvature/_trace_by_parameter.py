"""Estimates of the trace of a curvature, parameter by parameter, from random signs, random labels, or exactly."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ._krylov import rademacher
from .operator import CurvatureOperator
from .preconditioned import PreconditionedOperator

Trace = Literal["hutchinson", "fisher_mc", "exact_mse"]
Forward = Callable[[Any], Tensor]


def output_loss(trace: Trace, mse_factor: float) -> Callable[[Tensor, Any], Tensor]:
    """A loss whose curvature in the outputs is that of ``"fisher_mc"`` or ``"exact_mse"``, and needs no targets."""
    return log_partition if trace == "fisher_mc" else Quadratic(mse_factor)


def estimates(
    trace: Trace,
    operator: CurvatureOperator,
    forward: Forward | None,
    batches: Sequence[Any],
    shares: Sequence[float],
    *,
    num_probes: int,
    mse_factor: float,
    generator: torch.Generator,
) -> Tensor:
    """Estimates of the trace by parameter ``[probes, parameters]``, one of them where it is exact.

    Args:
        trace: How.
        operator: The Hessian for ``"hutchinson"``, else the Gauss-Newton matrix of :func:`output_loss`.
        forward: The outputs ``[samples, outputs]`` of a batch; not for ``"hutchinson"``.
        batches: The data.
        shares: What each batch weighs; they sum to 1.
        num_probes: Of the two that draw.
        mse_factor: Of ``"exact_mse"``.
        generator: On the CPU.
    """
    if trace == "hutchinson":
        return from_signs(operator, num_probes, generator)
    assert forward is not None
    if trace == "fisher_mc":
        return from_labels(operator, forward, batches, shares, num_probes, generator)
    return mse_factor * from_outputs(operator, forward, batches, shares)


def log_partition(outputs: Tensor, _: Any) -> Tensor:
    """Cross-entropy without its linear part: its curvature in the outputs is that of cross-entropy."""
    return outputs.logsumexp(dim=1).mean()


class Quadratic:
    """Half the squared error, summed over outputs, mean over samples, times a factor, without its linear part."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, outputs: Tensor, _: Any) -> Tensor:
        return self.factor / 2 * outputs.square().sum() / len(outputs)


def from_signs(operator: CurvatureOperator, num_probes: int, generator: torch.Generator) -> Tensor:
    """Estimates of the trace ``[probes, parameters]`` from vectors of random signs (Hutchinson, 1989)."""
    rows = []
    for _ in range(num_probes):
        v = rademacher(operator, generator)
        rows.append(_sums(operator, v * (operator @ v)))
    return torch.stack(rows).to("cpu", torch.float64)


def from_labels(
    operator: CurvatureOperator,
    forward: Forward,
    batches: Sequence[Any],
    shares: Sequence[float],
    num_probes: int,
    generator: torch.Generator,
) -> Tensor:
    """Estimates ``[probes, parameters]`` from labels drawn from the network's own prediction.

    Scores of different samples are independent with mean zero, so the squared norm of their sum is, on average, the sum
    of their squared norms: one backward pass a probe.

    Args:
        operator: In whose metric gradients are measured.
        forward: The logits ``[samples, classes]`` of a batch.
        batches: The data.
        shares: What each batch weighs; they sum to 1.
        num_probes: Labels drawn a sample.
        generator: On the CPU.
    """
    rows = torch.zeros(num_probes, len(operator.params), dtype=torch.float64)
    for batch, share in zip(batches, shares, strict=True):
        logits = forward(batch)
        if logits.ndim != 2:
            raise ValueError(f"trace='fisher_mc' needs logits [samples, classes], got shape {list(logits.shape)}")
        p = logits.detach().softmax(dim=1)
        for number in range(num_probes):
            labels = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
            score = p.scatter_add(1, labels, -torch.ones_like(p[:, :1]))
            gradients = torch.autograd.grad(logits, operator.params, score, retain_graph=True, allow_unused=True)
            rows[number] += _squares(operator, gradients) * share / len(p)
    return rows


def from_outputs(
    operator: CurvatureOperator, forward: Forward, batches: Sequence[Any], shares: Sequence[float]
) -> Tensor:
    """The mean over samples of the squared norms of the outputs' gradients ``[1, parameters]``, exactly."""
    row = torch.zeros(1, len(operator.params), dtype=torch.float64)
    for batch, share in zip(batches, shares, strict=True):
        outputs = forward(batch)
        for entry in outputs.flatten():
            gradients = torch.autograd.grad(entry, operator.params, retain_graph=True, allow_unused=True)
            row[0] += _squares(operator, gradients) * share / len(outputs)
    return row


def _squares(operator: CurvatureOperator, gradients: Sequence[Tensor | None]) -> Tensor:
    """Squared norms of a gradient by parameter, in the metric of the optimizer."""
    scale = operator.scale if isinstance(operator, PreconditionedOperator) else 1.0
    return _sums(operator, (operator.flatten(gradients) * scale).square()).to("cpu", torch.float64)


def _sums(operator: CurvatureOperator, vector: Tensor) -> Tensor:
    """Sums of the parts of a vector that belong to the parameters, in float64."""
    return torch.stack([part.sum(dtype=torch.float64) for part in operator.unflatten(vector)])
