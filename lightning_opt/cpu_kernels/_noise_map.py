"""The launcher of elementwise CPU kernels that may draw normal noise as they go."""

import itertools
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _threads

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_BLOCK = 1024  # elements whose noise is drawn at once: 4 KiB, which stay in the nearest cache
_ELEMENTS_A_THREAD = 1 << 14  # fewer, some 20 us of work, are not worth waking a thread


def unsupported_map(dtype: torch.dtype) -> str | None:
    """Why there is no CPU kernel of :func:`launch_map` for tensors of this dtype, or None if there is.

    Example:
        >>> unsupported_map(torch.float16), unsupported_map(torch.float64)
        (None, 'the CPU kernels of this function support float32, bfloat16 and float16, not float64')
    """
    if dtype in _DTYPES:
        return None
    name = str(dtype).removeprefix("torch.")
    return f"the CPU kernels of this function support float32, bfloat16 and float16, not {name}"


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
        name: A module of this package with a function of that name, which makes the function of one element from the
            flags. That takes the inputs and the coefficients (named tuples), and returns a tuple of outputs.
        inputs: Contiguous tensors of the same shape. An input that is also an output is overwritten.
        outputs: Contiguous tensors of that shape.
        coefficients: Numbers, each a float or a vector with one for each row, where the rows are equal parts of the
            elements in order; all vectors are of one length.
        flags: Options that are compiled in.
        key: Seed and offset, 64 bits each, of the further input ``noise``: the numbers of
            :func:`lightning_opt.diffusion.philox_normal`.

    Raises:
        TypeError: If a dtype is not supported.

    Cost:
        Runs on up to ``torch.get_num_threads()`` threads. The first call for a function, its flags and dtypes compiles
        for about a second.
    """
    tensors = [*inputs.values(), *outputs]
    for tensor in tensors:
        if tensor.dtype not in _DTYPES:
            raise TypeError(unsupported_map(tensor.dtype))
    size = outputs[0].numel()
    if size == 0:
        return
    kernel = _kernel(
        name,
        tuple(flags.items()),
        tuple([(n, _DTYPES[t.dtype]) for n, t in inputs.items()]),
        tuple([_DTYPES[t.dtype] for t in outputs]),
        tuple(coefficients),
        key is not None,
    )
    table = _table(coefficients)
    threads = max(1, min(torch.get_num_threads(), size // _ELEMENTS_A_THREAD))
    pieces = 1 if threads == 1 else 4 * threads  # a thread that is held up leaves pieces to the others
    bounds = [piece * size // pieces // _BLOCK * _BLOCK for piece in range(pieces)] + [size]
    # All that the kernel reads lies in one block of memory, since asking for an address takes longer than the rest: the
    # job, the addresses, the bounds, the coefficients, and for each thread its noise and the words that it is made of.
    places = list(itertools.accumulate([11, len(tensors), len(bounds), (table.size + 1) // 2]))
    memory = np.empty(places[-1] + (threads * _BLOCK if key else 0), np.int64)
    base = memory.ctypes.data
    seed, offset = (word - (word >> 63 << 64) for word in key or (0, 0))  # as signed numbers
    rows = len(table)
    memory[: places[2]] = [
        *(base + 8 * place for place in places),
        *(rows > 1, size // rows, seed, offset, pieces, 0, 0),
        *map(Tensor.data_ptr, tensors),
        *bounds,
    ]
    memory[places[2] : places[3]].view(np.float32)[: table.size] = table.reshape(-1)
    _threads.run(kernel, base, threads)


@cache
def _kernel(*key: Any) -> Callable[[int], None]:
    return _compiled(*key).ctypes


def _table(coefficients: Mapping[str, float | Tensor]) -> np.ndarray:
    """The coefficients as one line for all rows, or a line for each."""
    values = [v.detach().reshape(-1).numpy() if isinstance(v, Tensor) else v for v in coefficients.values()]
    lines = max([1, *(v.size for v in values if isinstance(v, np.ndarray))])
    table = np.empty((lines, len(values)), np.float32)
    if lines == 1:
        table[0] = values
    else:
        for k, value in enumerate(values):
            table[:, k] = value
    return table


def _compiled(
    name: str,
    flags: tuple[tuple[str, Any], ...],
    inputs: tuple[tuple[str, str], ...],
    outputs: tuple[str, ...],
    coefficients: tuple[str, ...],
    philox: bool,
) -> Any:
    """A C function of the address of a job, which takes pieces of it until none is left."""
    import numba  # half a second, only where a kernel runs
    from numba import types

    from ._memory import item, loader, row_reader, storer, take
    from ._philox import normals

    options = {"error_model": "numpy", "no_cfunc_wrapper": True, "no_cpython_wrapper": True}
    function = numba.njit(getattr(import_module(f".{name}", __package__), name)(**dict(flags)), **options)
    dtypes = (*(dtype for _, dtype in inputs), *outputs, *(["float32"] if philox else []))
    read = [*range(len(inputs)), *([len(dtypes) - 1] if philox else [])]
    written = range(len(inputs), len(inputs) + len(outputs))
    names = (*(n for n, _ in inputs), *(["noise"] if philox else []))
    element = types.NamedUniTuple(types.float32, len(read), namedtuple("Element", names))
    line = types.NamedUniTuple(types.float32, len(coefficients), namedtuple("Coefficients", coefficients))
    load, store = loader(dtypes, element, read), storer(dtypes, types.float32, written)
    slots_of = row_reader(types.UniTuple(types.int64, len(inputs) + len(outputs)))
    coefficients_of = row_reader(line)
    block_size, draw = _BLOCK, normals()

    def kernel(addresses, table, per_row, length, seed, offset, scratch, begin, end):
        # Elements from begin, a multiple of the block, to end.
        tensors = slots_of(addresses, 0)
        key0, key1 = numba.uint64(seed) & numba.uint64(2**32 - 1), numba.uint64(seed) >> numba.uint64(32)
        words = scratch + 4 * block_size
        for block in range(begin, end, block_size):
            last = min(block + block_size, end)
            if philox:
                first, groups = numba.uint64(offset) + numba.uint64(block // 4), (last - block + 3) // 4
                draw(scratch, words, first, groups, key0, key1)
                slots = tensors + (scratch - 4 * block,)
            else:
                slots = tensors
            start = block
            while start < last:
                row = start // length
                stop = min(last, (row + 1) * length)
                c = coefficients_of(table, row * per_row)
                for i in range(start, stop):
                    store(slots, i, function(load(slots, i), c), None)
                start = stop

    kernel = numba.njit(types.void(*[types.int64] * 9), **options)(kernel)

    def work(job):
        addresses, bounds, table, noise = item(job, 0), item(job, 1), item(job, 2), item(job, 3)
        scratch = noise + 8 * block_size * take(job, 10)  # a row of the noise for each thread
        piece = take(job, 9)
        while piece < item(job, 8):
            begin, end = item(bounds, piece), item(bounds, piece + 1)
            kernel(addresses, table, item(job, 4), item(job, 5), item(job, 6), item(job, 7), scratch, begin, end)
            piece = take(job, 9)

    return numba.cfunc(types.void(types.int64), error_model="numpy")(work)
