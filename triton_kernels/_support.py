"""What the Triton kernels need."""

import functools

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (3, 4)  # the first with tuples of constants


def unsupported(dtype: torch.dtype) -> str | None:
    """Why parameters of this dtype have no Triton kernel, or None if they have. Imports triton.

    Example:
        >>> unsupported(torch.float64)
        'the Triton kernels support float32, bfloat16 and float16, not float64'
    """
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"the Triton kernels support float32, bfloat16 and float16, not {name}"
    return _missing()


unsupported_map = unsupported  # the elementwise kernels support the same dtypes; on the CPU they support others


@functools.cache
def _missing() -> str | None:
    try:
        import triton
    except ImportError:
        return "triton is not installed: pip install 'lightning-opt[triton]'"
    if tuple(map(int, triton.__version__.split(".")[:2])) < _OLDEST:
        return f"triton {triton.__version__} is too old: the kernels need {_OLDEST[0]}.{_OLDEST[1]}, as of torch 2.8"
    return None
