"""The launcher of elementwise Triton kernels that may draw normal noise as they go."""

# mypy: ignore-errors
# (tuples grow in loops that the compiler unrolls)

import contextlib
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._philox import normals
from ._support import unsupported

_BLOCK, _WARPS = 512, 4  # a thread has 4 elements: a counter's worth of noise, and 16 bytes of float32


def launch_map(
    name: str,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[Tensor],
    coefficients: Mapping[str, float | Tensor],
    *,
    flags: Mapping[str, Any],
    key: tuple[int, int] | None = None,
) -> None:
    """Compute outputs from inputs, element by element, in float32, in one pass over memory.

    Args:
        name: A module of this package with a function of that name, of the inputs, the coefficients (tuples of blocks)
            and the flags (a tuple of constants), which returns a tuple of outputs.
        inputs: Contiguous tensors of the same shape, on a CUDA device (on the CPU with ``TRITON_INTERPRET=1``). An
            input that is also an output is overwritten.
        outputs: Contiguous tensors of that shape.
        coefficients: Numbers, each a float or a vector with one for each row, where the rows are equal parts of the
            elements in order; all vectors are of one length.
        flags: Options that are compiled in.
        key: Seed and offset, 64 bits each, of the further input ``noise``: the numbers of
            :func:`lightning_opt.diffusion.philox_normal`.

    Raises:
        TypeError: If a dtype is not supported.
        ValueError: If the tensors are not on one device.
        RuntimeError: If they are on the CPU without the interpreter.

    Cost:
        Does not wait for the device if vectors are on it. 16 bytes are moved at a time where the number of elements is
        a multiple of 16. The first call for a function, its flags and dtypes compiles for about a second.
    """
    tensors = [*inputs.values(), *outputs]
    device = outputs[0].device
    for tensor in tensors:
        reason = unsupported(tensor.dtype)
        if reason is not None:
            raise TypeError(reason)
        if tensor.device != device:
            raise ValueError(f"tensors of one call must lie on one device, got {tensor.device} and {device}")
    if (device.type == "cuda") != isinstance(noise_map, triton.JITFunction):
        raise RuntimeError(
            "Triton kernels run on CUDA tensors; with TRITON_INTERPRET=1, set before the first import, on CPU tensors"
        )
    size = outputs[0].numel()
    if size == 0:
        return
    vectors = {n: v for n, v in coefficients.items() if isinstance(v, Tensor) and (v.numel() > 1 or v.is_cuda)}
    rows = max([1, *(v.numel() for v in vectors.values())])
    columns = [v.detach().reshape(-1).float().expand(rows) for v in vectors.values()]
    matrix = torch.stack(columns).to(device) if vectors else None
    places = {n: k for k, n in enumerate(vectors)}
    seed, offset = key or (0, 0)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        noise_map[(triton.cdiv(size, _BLOCK),)](
            tuple(tensors),
            tuple(0.0 if n in vectors else float(value) for n, value in coefficients.items()),
            matrix,
            size,
            rows,
            size // rows,
            *map(_int32, (seed, seed >> 32, offset, offset >> 32)),
            UPDATE=getattr(import_module(f".{name}", __package__), name),
            FLAGS=tuple(flags.values()),
            INPUTS=len(inputs),
            VECTORS=tuple(places.get(n, -1) for n in coefficients),
            LONG=size // rows >= _BLOCK,
            NOISE=key is not None,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )


def _int32(word: int) -> int:
    """The low 32 bits with a sign, so that all seeds are of one type and no kernel is compiled for some of them."""
    return (word + 2**31) % 2**32 - 2**31


@triton.jit(do_not_specialize=["rows", "length", "seed_low", "seed_high", "offset_low", "offset_high"])
def noise_map(
    tensors,  # inputs and outputs
    scalars,  # the coefficients that all samples share
    vectors,  # float32; for each other coefficient one number a row; None without any
    size,  # elements of a tensor
    rows,
    length,  # elements of a row
    seed_low,
    seed_high,
    offset_low,
    offset_high,
    UPDATE: tl.constexpr,  # (inputs, coefficients, FLAGS) -> outputs
    FLAGS: tl.constexpr,
    INPUTS: tl.constexpr,
    VECTORS: tl.constexpr,  # for each coefficient its number in vectors, or -1
    LONG: tl.constexpr,  # whether a block meets two rows at most
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    places = program * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    values = ()
    for i in tl.static_range(INPUTS):
        value = tl.load(tensors[i] + places, mask=inside)
        values = values + (value.to(tl.float32),)
    if NOISE:
        offset = (offset_high.to(tl.uint32).to(tl.uint64) << 32) | offset_low.to(tl.uint32).to(tl.uint64)
        counter = offset + (program * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint64)
        z0, z1, z2, z3 = normals(counter, seed_low.to(tl.uint32), seed_high.to(tl.uint32))
        values = values + (tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3)),)
    row = program * BLOCK // length
    behind = (program * BLOCK - row * length).to(tl.int32) + tl.arange(0, BLOCK)  # the row's first element
    coefficients = ()
    for k in tl.static_range(len(VECTORS)):
        if VECTORS[k] < 0:
            coefficients = coefficients + (scalars[k],)
        else:
            place = vectors + VECTORS[k] * rows + row
            if LONG:
                here = tl.load(place)
                there = tl.load(place + 1, mask=row + 1 < rows, other=0.0)
                coefficient = tl.where(behind < length, here, there)
            else:
                coefficient = tl.load(place + behind // length, mask=inside)
            coefficients = coefficients + (coefficient,)
    outputs = UPDATE(values, coefficients, FLAGS)
    for i in tl.static_range(len(tensors) - INPUTS):
        pointer = tensors[INPUTS + i]
        tl.store(pointer + places, outputs[i].to(pointer.dtype.element_ty), mask=inside)
