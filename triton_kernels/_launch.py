"""The one launcher of the Triton kernels."""

import contextlib
import functools
import importlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_opt._layout import stage

from ._multi_tensor import multi_tensor
from ._support import unsupported

# A thread updates 4 elements: 16 bytes of float32, the widest access. Compiled for sm_90 an Adam-like update then takes
# 40 to 56 registers (8 elements: 64 to 156, by version of Triton), so that at least 9 programs of 128 threads run on a
# multiprocessor, with 72 KiB of reads in flight; memory of 4.8 TB/s and 1 us needs 21 KiB on each of 132.
_BLOCK, _WARPS = 512, 4
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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
    """Update all tensors in place with one kernel launch, computed in float32, without waiting for the device.

    May be captured in a CUDA graph after a first call outside of it for the same parameters, if the coefficients are
    computed on the device or never change; the graph reads and writes the tensors of the call that was captured.

    Args:
        name: Method: a module of this package with a function of that name.
        params: Parameters, of one dtype, on one CUDA device (on the CPU with ``TRITON_INTERPRET=1``).
        grads: Their gradients, of one dtype and the same shapes; not changed.
        states: For each state its tensors, of one dtype.
        coefficients: Numbers of this step, ``"step"`` among them: each a float, or a float64 vector with one value a
            tensor.
        flags: Options of the method that are compiled in.
        maximize: Negate the gradients.
        stochastic_rounding: Round bfloat16 results stochastically.
        numbers: Numbers of the parameters in the optimizer, the keys of the random bits; needed with
            ``stochastic_rounding``.

    Raises:
        TypeError: If a dtype is not supported.
        ValueError: If the tensors that belong together differ in dtype, device or size.
        RuntimeError: If a tensor to be written overlaps itself, or tensors lie on the CPU without the interpreter.

    Cost:
        One pass over memory. The first call for a method, its flags and dtypes compiles for about a second. The device
        keeps 8 bytes a tensor and slot, and 8 bytes a 512 elements; copies of tensors that are not dense, or not laid
        out as their parameter, come on top.
    """
    if not params:
        return
    method = _method(name)
    states = {state: states[state] for state in method.STATES if state in states}
    staged, written, [grads], back = stage(params, list(states.values()), [grads])
    columns = [staged, grads, *written]
    device = staged[0].device
    dtypes = tuple(_dtype(column, staged[0].get_device()) for column in columns)
    sizes = _sizes(columns)
    rows = [sizes, list(numbers) or [0] * len(sizes), *(list(map(Tensor.data_ptr, column)) for column in columns)]
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        tables = _tables(device, len(rows), list(map(Tensor.data_ptr, params)), sizes)
        if tables.programs:
            scalars, places, vectors = _coefficients(("step", *method.COEFFICIENTS), coefficients, len(sizes), device)
            multi_tensor[(tables.programs,)](
                tables.table(rows),
                tables.chunks,
                scalars,
                vectors,
                len(sizes),
                UPDATE=getattr(method, name),
                FLAGS=tuple(flags[flag] for flag in method.FLAGS),
                ROWS=places,
                DTYPES=dtypes,
                MAXIMIZE=maximize,
                STOCHASTIC=stochastic_rounding,
                BLOCK=_BLOCK,
                num_warps=_WARPS,
            )
    for tensor, copy in back:
        tensor.detach().copy_(copy)
    torch.autograd.graph.increment_version(params)


@functools.cache
def _method(name: str) -> Any:
    return importlib.import_module(f".{name}", __package__)


def _dtype(column: list[Tensor], device: int) -> Any:
    dtypes = {t.dtype for t in column}
    if len(dtypes) > 1 or set(map(Tensor.get_device, column)) != {device}:
        raise ValueError(f"tensors of one call must share their dtype and lie on one device, got {dtypes}")
    (dtype,) = dtypes
    reason = unsupported(dtype)
    if reason is not None:
        raise TypeError(reason)
    if (device >= 0) != isinstance(multi_tensor, triton.JITFunction):
        raise RuntimeError(
            "Triton kernels run on CUDA tensors; with TRITON_INTERPRET=1, set before the first import, on CPU tensors"
        )
    return _DTYPES[dtype]


def _sizes(columns: list[list[Tensor]]) -> list[int]:
    sizes = list(map(Tensor.numel, columns[0]))
    for column in columns[1:]:
        if list(map(Tensor.numel, column)) != sizes:
            raise ValueError("gradients and states must have the shapes of their parameters")
    return sizes


def _coefficients(
    names: tuple[str, ...], coefficients: dict[str, Any], n: int, device: torch.device
) -> tuple[tuple[float, ...], tuple[int, ...], Tensor | None]:
    """Floats are arguments of the kernel; what differs between tensors, or is only on the device, goes through memory.

    Returns:
        The floats (0 in the place of others), for each coefficient its row in the matrix or -1, and the matrix or None.
    """
    scalars: list[float] = []
    places: list[int] = []
    vectors: list[Tensor] = []
    for name in names:
        value = coefficients[name]
        if isinstance(value, Tensor) and (value.ndim or value.is_cuda):
            scalars.append(0.0)
            places.append(len(vectors))
            vectors.append(value.expand(n))
        else:
            scalars.append(float(value))
            places.append(-1)
    matrix = _to_device(torch.stack(vectors).float(), device) if vectors else None
    return tuple(scalars), tuple(places), matrix


class _Tables:
    """What the kernel must know of a list of tensors, on their device, kept from step to step."""

    def __init__(self, sizes: list[int], device: torch.device) -> None:
        blocks = (torch.tensor(sizes) + _BLOCK - 1) // _BLOCK
        tensor = torch.arange(len(sizes)).repeat_interleave(blocks)
        block = torch.arange(len(tensor)) - (blocks.cumsum(0) - blocks)[tensor]
        self.programs = len(tensor)
        self.chunks = _to_device(torch.stack([tensor, block], 1).to(torch.int32), device)
        self._rows: list[list[int]] = []
        self._table = self.chunks
        self._reserve: Tensor | None = None

    def table(self, rows: list[list[int]]) -> Tensor:
        """The rows as a matrix on the device, copied there only if they have changed since the last call."""
        device = self.chunks.device
        if _capturing(device):
            reserve, self._reserve = self._reserve, None
            _captured.append(self.chunks)
            return _to_device(torch.tensor(rows), device, reserve)
        if rows != self._rows:
            self._rows, self._table = rows, _to_device(torch.tensor(rows), device)
        if device.type == "cuda":
            if self._reserve is None:
                self._reserve = torch.empty_like(self._table, device="cpu", pin_memory=True)
            for tensor in (self.chunks, self._table):  # may have been allocated on another stream
                tensor.record_stream(torch.cuda.current_stream())
        return self._table


_kept: OrderedDict[tuple[Any, ...], _Tables] = OrderedDict()
_captured: list[Tensor] = []  # what graphs read when they are replayed: nobody says when a graph has gone


def _tables(device: torch.device, rows: int, addresses: list[int], sizes: list[int]) -> _Tables:
    """The tables of these parameters; steps on the same parameters come one after the other, on whatever streams."""
    key = (device, rows, tuple(addresses), tuple(sizes))
    if key not in _kept:
        _kept[key] = _Tables(sizes, device)
        if len(_kept) > 256:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return _kept[key]


def _to_device(values: Tensor, device: torch.device, reserve: Tensor | None = None) -> Tensor:
    """A copy on the device, without waiting for it.

    A captured graph copies again from the pinned memory whenever it is replayed. Before torch 2.10 pinned memory cannot
    be allocated during a capture: ``reserve`` is memory that was set aside.
    """
    if device.type != "cuda" or values.is_cuda:
        return values
    pinned = torch.empty_like(values, pin_memory=True) if reserve is None else reserve
    pinned.copy_(values)
    if _capturing(device):
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
