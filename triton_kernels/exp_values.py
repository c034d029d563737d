"""The float32 exponentials of a range of bit patterns, as compiled for the device, for their verification."""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fast_exp import fast_exp, fast_exp2


def exp_values(
    function: str, first: int, count: int, *, stride: int = 1, poly: bool = True, device: str = "cuda"
) -> Tensor:
    """The results of a device function for every number of a range.

    Args:
        function: ``"exp2"`` or ``"exp"``.
        first: Bit pattern of the first input, from 0 to 2**32 - 1.
        count: Number of inputs.
        stride: From one bit pattern to the next.
        poly: Whether the function is ours, or that of the hardware.
        device: A CUDA device; with ``TRITON_INTERPRET=1`` the CPU.

    Returns:
        float32, on the device.
    """
    out = torch.empty(count, dtype=torch.float32, device=device)
    block = 1024
    with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
        exponentials[(triton.cdiv(count, block),)](
            out, first, count, stride, EXP2=function == "exp2", POLY=poly, BLOCK=block
        )
    return out


@triton.jit
def exponentials(out, first, count, stride, EXP2: tl.constexpr, POLY: tl.constexpr, BLOCK: tl.constexpr):
    """One block of results."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = (first + i * stride).to(tl.uint32).to(tl.float32, bitcast=True)
    if EXP2 and POLY:
        y = fast_exp2(x)
    elif EXP2:
        y = tl.exp2(x)
    elif POLY:
        y = fast_exp(x)
    else:
        y = tl.exp(x)
    tl.store(out + i, y, mask=i < count)
