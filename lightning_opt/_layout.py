"""Memory layout of tensors, for the launchers of the fused kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps or overlaps, in any order of dimensions.

    Example:
        >>> is_dense(torch.zeros(4, 3).t()), is_dense(torch.zeros(4, 3)[:, :2])
        (True, False)
    """
    return tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)


def same_layout(tensor: Tensor, like: Tensor) -> bool:
    """Whether element i in memory of one tensor is element i in memory of the other (both dense)."""
    return tensor.stride() == like.stride() or (tensor.is_contiguous() and like.is_contiguous())


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether some element of memory may be reached through more than one index, as in expanded tensors.

    Example:
        >>> overlaps_itself(torch.zeros(1, 3).expand(4, 3)), overlaps_itself(torch.zeros(4, 3)[:, :2])
        (True, False)
    """
    reach = 0  # distance from the first to the last element of the dimensions seen so far
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def stage(
    params: Sequence[Tensor], written: Sequence[Sequence[Tensor]], read: Sequence[Sequence[Tensor]]
) -> tuple[list[Tensor], list[list[Tensor]], list[list[Tensor]], list[tuple[Tensor, Tensor]]]:
    """Tensors that a kernel may walk together from the first element in memory to the last.

    A tensor that is not dense, not laid out in memory as its parameter is, or only read and marked as negated lazily,
    is replaced by a dense copy; all others are passed through.

    Args:
        params: Parameters, which are written.
        written: Further columns of tensors that are written, each as long as ``params`` and of the same shapes.
        read: Columns of tensors that are only read.

    Returns:
        The parameters, the columns written and the columns read, and the pairs ``(tensor, copy)`` to be copied back
        with ``tensor.copy_(copy)`` after the kernel.

    Raises:
        ValueError: If the tensors that belong together differ in shape.
        RuntimeError: If a tensor to be written overlaps itself.
    """
    columns = [list(params), *map(list, written), *(list(map(Tensor.resolve_neg, column)) for column in read)]
    n_written = 1 + len(written)
    back: list[tuple[Tensor, Tensor]] = []
    if not all(all(map(Tensor.is_contiguous, column)) for column in columns):
        for i, p in enumerate(params):
            for column in columns:
                if column[i].shape != p.shape:
                    raise ValueError(f"shapes differ: {tuple(column[i].shape)} for a parameter of {tuple(p.shape)}")
            like = p if is_dense(p) else torch.empty_like(p)  # empty_like keeps the order of the dimensions
            for number, column in enumerate(columns):
                tensor = column[i]
                if same_layout(tensor, like):
                    continue
                column[i] = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device)
                column[i].copy_(tensor)
                if number < n_written:
                    if overlaps_itself(tensor):
                        raise RuntimeError(
                            f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} overlaps itself in "
                            "memory and cannot be updated in place: clone it first"
                        )
                    back.append((tensor, column[i]))
    return columns[0], columns[1:n_written], columns[n_written:], back
