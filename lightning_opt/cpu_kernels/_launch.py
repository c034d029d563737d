"""The one launcher of the fused CPU kernels."""

from collections.abc import Callable, Sequence
from functools import cache
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_opt._layout import stage

from . import _threads

_DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
_ELEMENTS_A_THREAD = 1 << 16  # fewer, about 50 us of work, are not worth waking a thread


def unsupported(dtype: torch.dtype) -> str | None:
    """Why parameters of this dtype have no fused CPU kernel, or None if they have.

    Example:
        >>> unsupported(torch.float32), unsupported(torch.float16)
        (None, 'the CPU kernels support float32, float64 and bfloat16, not float16')
    """
    if dtype in _DTYPES:
        return None
    return f"the CPU kernels support float32, float64 and bfloat16, not {str(dtype).removeprefix('torch.')}"


def launch(
    name: str,
    params: list[Tensor],
    grads: list[Tensor],
    states: dict[str, list[Tensor]],
    coefficients: dict[str, Any],
    *,
    flags: dict[str, Any],
    maximize: bool = False,
    stochastic_rounding: bool = False,
    numbers: Sequence[int] = (),
) -> None:
    """Update all tensors in place, in one pass over memory, on up to ``torch.get_num_threads()`` threads.

    Args:
        name: Method: a module of this package with a function of that name.
        params: Parameters, of one dtype.
        grads: Their gradients, of one dtype and the same shapes; not changed.
        states: For each state its tensors, of one dtype.
        coefficients: Numbers of this step, each a float or a float64 vector with one value a tensor. ``"step"`` is one.
        flags: Options of the method that are compiled in.
        maximize: Negate the gradients.
        stochastic_rounding: Round bfloat16 results stochastically.
        numbers: Numbers of the parameters in the optimizer, the keys of the random bits; needed with
            ``stochastic_rounding``.

    Raises:
        TypeError: If a dtype is not supported.
        ValueError: If the tensors that belong together differ in dtype, device or size.
        RuntimeError: If a tensor to be written overlaps itself.

    Cost:
        The first call for a method, its flags and dtypes compiles for about a second.
    """
    if not params:
        return
    staged, written, [grads], back = stage(params, list(states.values()), [grads])
    columns = [staged, grads, *written]
    dtypes = tuple(map(_dtype, columns))
    kernel = _kernel(
        name, tuple(flags.items()), tuple(states), tuple(coefficients), dtypes, maximize, stochastic_rounding
    )
    starts = np.cumsum([0, *_sizes(columns)], dtype=np.int64)
    addresses = np.array([list(map(Tensor.data_ptr, column)) for column in columns], np.int64).T.copy()
    rows, per_tensor = _rows(coefficients, len(params), np.float64 if dtypes[0] == "float64" else np.float32)
    keys = _keys(coefficients["step"], numbers, len(columns)) if stochastic_rounding else None
    threads, bounds = _pieces(int(starts[-1]))
    tensors = np.searchsorted(starts, bounds, side="right") - 1
    tables = (addresses, starts, rows, per_tensor, keys, bounds, tensors, len(bounds) - 1, 0)
    job = np.array([x.ctypes.data if isinstance(x, np.ndarray) else int(x or 0) for x in tables], np.int64)
    _threads.run(kernel, job.ctypes.data, threads)
    for tensor, copy in back:
        tensor.detach().copy_(copy)
    torch.autograd.graph.increment_version(params)  # a graph that still needs the old values must notice


@cache
def _kernel(*key: Any) -> Callable[[int], None]:
    from ._compile import compiled  # imports numba: half a second, only where a kernel runs

    return compiled(*key).ctypes


def _dtype(column: list[Tensor]) -> str:
    dtypes = set(map(attrgetter("dtype"), column))
    if len(dtypes) > 1 or not all(map(attrgetter("is_cpu"), column)):
        raise ValueError(f"tensors of one call must share their dtype and lie on the CPU, got {dtypes}")
    (dtype,) = dtypes
    if dtype not in _DTYPES:
        raise TypeError(unsupported(dtype))
    return _DTYPES[dtype]


def _sizes(columns: list[list[Tensor]]) -> list[int]:
    sizes = list(map(Tensor.numel, columns[0]))
    for column in columns[1:]:
        if list(map(Tensor.numel, column)) != sizes:
            raise ValueError("gradients and states must have the shapes of their parameters")
    return sizes


def _rows(coefficients: dict[str, Any], count: int, dtype: Any) -> tuple[np.ndarray, bool]:
    """The coefficients as one row for all tensors, or a row for each."""
    per_tensor = any(isinstance(value, Tensor) and value.ndim for value in coefficients.values())
    rows = np.empty((count if per_tensor else 1, len(coefficients)), dtype)
    for k, value in enumerate(coefficients.values()):
        rows[:, k] = value
    return rows, per_tensor


def _keys(step: Any, numbers: Sequence[int], slots: int) -> np.ndarray:
    """The keys of the random bits: a row a tensor, a column a slot (0 the parameter, 2, 3, ... the states)."""
    from ._bits import mix

    # the reference numbers the slots of a tensor without the gradient
    slot = np.array([0, 0, *range(1, slots - 1)], np.uint32)
    tensor = np.array(numbers, np.uint32)[:, None]
    return mix(np.uint32(np.array(step)).reshape(-1, 1) + mix(tensor * np.uint32(8) + slot))


def _pieces(size: int) -> tuple[int, np.ndarray]:
    """How many threads are worth their while, and where the pieces start that they share; the end comes last."""
    threads = max(1, min(torch.get_num_threads(), size // _ELEMENTS_A_THREAD))
    count = 1 if threads == 1 else 4 * threads  # a thread that is held up leaves pieces to the others
    bounds = np.arange(count + 1) * size // count // 64 * 64
    bounds[-1] = size
    return threads, bounds
