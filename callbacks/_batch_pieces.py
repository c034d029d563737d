from collections.abc import Sequence
from typing import Any

from torch import Tensor


def split_samples(batch: Any, samples: int, sizes: Sequence[int]) -> list[Any]:
    """Divide a batch into parts, along the first dimension of its tensors.

    Args:
        batch: A tensor with the samples in its first dimension, or dicts, lists and tuples of such; a list of as many
            entries as there are samples is divided too, and what holds no tensor goes to every part.
        samples: How many the batch holds.
        sizes: Samples of each part; they sum to ``samples``.

    Raises:
        ValueError: If a tensor has another first dimension, or nothing can be divided.

    Example:
        >>> import torch
        >>> split_samples({"x": torch.arange(3), "names": ["a", "b", "c"]}, 3, [2, 1])
        [{'x': tensor([0, 1]), 'names': ['a', 'b']}, {'x': tensor([2]), 'names': ['c']}]
    """
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    found: list[Tensor] = []
    parts = [_part(batch, samples, end - size, end, found) for size, end in zip(sizes, ends, strict=True)]
    if not found:
        raise ValueError(f"a batch of type {type(batch).__name__} holds no tensor with the samples in dimension 0")
    return parts


def _part(value: Any, samples: int, start: int, end: int, found: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        if value.ndim == 0:
            return value
        if len(value) != samples:
            raise ValueError(f"a tensor of shape {tuple(value.shape)} in a batch of {samples} samples")
        found.append(value)
        return value[start:end]
    if isinstance(value, dict):
        return type(value)((key, _part(entry, samples, start, end, found)) for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        if len(value) == samples and not any(isinstance(entry, (Tensor, dict, list, tuple)) for entry in value):
            return value[start:end]
        parts = [_part(entry, samples, start, end, found) for entry in value]
        return type(value)(parts) if type(value) in (list, tuple) else type(value)(*parts)  # a named tuple
    if value is None or isinstance(value, (str, bytes, int, float)):
        return value
    raise ValueError(f"a {type(value).__name__} in the batch")
