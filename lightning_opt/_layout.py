"""Memory layout of tensors, for the launchers of the fused kernels."""

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps or overlaps, in any order of dimensions.

    Example:
        >>> is_dense(torch.zeros(4, 3).t()), is_dense(torch.zeros(4, 3)[:, :2])
        (True, False)
    """
    return torch.ops.aten.is_non_overlapping_and_dense(tensor) if not tensor.is_contiguous() else True


def same_layout(tensor: Tensor, like: Tensor) -> bool:
    """Whether element i in memory of one tensor is element i in memory of the other (both dense)."""
    return tensor.stride() == like.stride() or (tensor.is_contiguous() and like.is_contiguous())
