"""What the Triton kernels need, asked without importing triton."""

import functools
import importlib.util

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def unsupported(dtype: torch.dtype) -> str | None:
    """Why tensors of a dtype cannot be updated by the Triton kernels.

    Args:
        dtype: dtype of the parameters.

    Returns:
        A reason to show to the user, or None where the kernels can be used. Costs nothing after the first call.

    Example:
        >>> unsupported(torch.int64)
        'the Triton kernels have no torch.int64'
    """
    if dtype not in DTYPES:
        return f"the Triton kernels have no {dtype}"
    return None if _has_triton() else "triton is not installed: pip install 'lightning-opt[triton]'"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
