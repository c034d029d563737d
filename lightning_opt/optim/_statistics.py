"""Cheap samples of large tensors, for statistics."""

import torch
from torch import Tensor


def sample(tensor: Tensor, limit: int = 100_000) -> Tensor:
    """At most about ``limit`` elements, evenly spaced in memory, as a vector."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // limit)]


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float64 where the device has it.

    In float32 the last digit depends on where a tensor lies in memory, so a resumed run would log another one.
    """
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)
