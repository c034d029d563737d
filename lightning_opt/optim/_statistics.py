"""Cheap samples of large tensors, for statistics."""

from torch import Tensor


def sample(tensor: Tensor, limit: int = 100_000) -> Tensor:
    """At most about ``limit`` elements, evenly spaced in memory, as a vector."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // limit)]
