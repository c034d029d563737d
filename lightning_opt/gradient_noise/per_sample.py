"""Gradients of every sample of a batch, in chunks."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_map

from lightning_opt._checks import check_interval

from .statistics import GradientStatistics

Loss = Callable[[dict[str, Tensor], Any], Tensor]


def per_sample_gradients(
    loss: Loss, parameters: Mapping[str, Tensor], batch: Any, samples: int, *, chunk_size: int = 32
) -> Iterator[dict[str, Tensor]]:
    """The gradient of the loss of each sample, a chunk at a time, by ``torch.func.vmap``.

    Args:
        loss: ``loss(parameters, sample)`` where a sample has the structure of the batch and a first dimension of 1; it
            must be what ``torch.func`` can differentiate.
        parameters: By name.
        batch: Nested tensors with the samples in their first dimension.
        samples: How many.
        chunk_size: Samples at once.

    Yields:
        The gradients of a chunk by name of the parameter, samples in the first dimension.

    Raises:
        ValueError: If ``chunk_size`` is below 1.

    Cost:
        ``chunk_size`` gradients in memory; one more forward and backward pass, usually slower than that of the batch.

    Example:
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> (g,) = per_sample_gradients(lambda p, x: (p["w"] * x).sum(), {"w": torch.ones(())}, x, samples=2)
        >>> g["w"]
        tensor([1., 2.])
    """
    check_interval("chunk_size", chunk_size, 1)
    values = {name: p.detach() for name, p in parameters.items()}

    def of_one(values: dict[str, Tensor], sample: Any) -> Tensor:
        return loss(values, tree_map(lambda x: x.unsqueeze(0) if isinstance(x, Tensor) else x, sample))

    gradients = vmap(grad(of_one), in_dims=(None, 0), randomness="different")
    for start in range(0, samples, chunk_size):
        chunk = tree_map(lambda x, start=start: x[start : start + chunk_size] if isinstance(x, Tensor) else x, batch)
        yield gradients(values, chunk)


def per_sample_statistics(
    loss: Loss, parameters: Mapping[str, Tensor], batch: Any, samples: int, *, chunk_size: int = 32
) -> GradientStatistics:
    """Statistics of all samples' gradients, in two passes and the memory of one chunk.

    The first pass finds the mean, the second the variances about it, so nothing cancels.

    Args:
        loss: As for :func:`per_sample_gradients`; it must not draw random numbers, or the passes differ.
        parameters: By name.
        batch: Nested tensors with the samples in their first dimension.
        samples: How many, at least two.
        chunk_size: Samples at once.

    Raises:
        ValueError: If there are fewer than two samples.
    """
    if samples < 2:
        raise ValueError(f"samples must be >= 2, got {samples}")

    def chunks() -> Iterator[Tensor]:
        for chunk in per_sample_gradients(loss, parameters, batch, samples, chunk_size=chunk_size):
            yield torch.cat([g.reshape(len(g), -1) for g in chunk.values()], dim=1)

    mean = sum((chunk.sum(0) for chunk in chunks()), start=torch.zeros(())) / samples
    squares, along = torch.zeros_like(mean), torch.zeros((), dtype=mean.dtype, device=mean.device)
    for chunk in chunks():
        deviation = chunk - mean
        squares += deviation.square().sum(0)
        along += (deviation @ mean).square().sum()
    variance = squares / (samples - 1)
    return GradientStatistics(
        samples=samples,
        groups=samples,
        grad_norm_sq=(mean @ mean).item(),
        var_trace=variance.sum().item(),
        var_along=(along / (samples - 1)).item(),
        mean=mean,
        variance=variance,
    )
