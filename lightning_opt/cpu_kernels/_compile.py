"""Compiles a method's elementwise update into a kernel that walks many tensors, with numba."""

from collections import namedtuple
from importlib import import_module
from typing import Any

import numba
from numba import types

from ._memory import item, loader, prefetcher, row_reader, storer, take

# Python's checks of divisors would prevent vectorization.
_OPTIONS = {"error_model": "numpy", "no_cfunc_wrapper": True}
# Memory is asked for 512 elements before it is needed, 128 elements at a time: the processor's own guesses end at every
# page of 4 KiB, and the more instructions an update has the less far ahead they reach.
_AHEAD, _BLOCK = 512, 128


def compiled(
    name: str,
    flags: tuple[tuple[str, Any], ...],
    states: tuple[str, ...],
    coefficients: tuple[str, ...],
    dtypes: tuple[str, ...],
    maximize: bool,
    stochastic_rounding: bool,
) -> Any:
    """The kernel of a method for tensors of certain dtypes.

    Args:
        name: Module of this package, and the function in it that makes the update from the flags. The update takes the
            parameter, the gradient, the states and the coefficients (named tuples) of one element, and returns the new
            parameter and the new states in order, all in the compute dtype.
        flags: Arguments of that function.
        states: Names of the states.
        coefficients: Names of the coefficients.
        dtypes: Of the parameters, of the gradients, and of each state. The compute dtype is float64 for float64
            parameters, else float32.
        maximize: Negate the gradients.
        stochastic_rounding: Round results that are stored as bfloat16 stochastically.

    Returns:
        A C function (a ``CFunc`` of numba) of the address of a job. It takes pieces of the job until none is left, so
        that several threads may share one. A job is a row of int64, tables and numbers that ``work`` below names.
    """
    method = getattr(import_module(f".{name}", __package__), name)
    update = numba.njit(method(**dict(flags)), **_OPTIONS, no_cpython_wrapper=True)
    number = types.float64 if dtypes[0] == "float64" else types.float32
    element = types.NamedUniTuple(number, len(dtypes), namedtuple("Element", ("p", "g", *states)))
    row = types.NamedUniTuple(number, len(coefficients), namedtuple("Coefficients", coefficients))
    load, store, prefetch = loader(dtypes, element), storer(dtypes, number), prefetcher(dtypes)
    slots_of = row_reader(types.UniTuple(types.int64, len(dtypes)))
    coefficients_of = row_reader(row)
    key_of = row_reader(types.UniTuple(types.uint32, len(dtypes)))
    line = 512 // number.bitwidth  # elements of the 64 bytes that memory moves at once

    def kernel(addresses, starts, coefficients, per_tensor, keys, tensor, begin, end):
        # Updates the elements from begin to end of the row of all tensors' elements; the first is in that tensor.
        while begin < end:
            start, stop = item(starts, tensor), item(starts, tensor + 1)
            slots = slots_of(addresses, tensor)
            c = coefficients_of(coefficients, tensor * per_tensor)
            key = key_of(keys, tensor) if stochastic_rounding else None
            last = min(end, stop) - start
            for block in range(begin - start, last, _BLOCK):
                for i in range(block + _AHEAD, min(block + _AHEAD + _BLOCK, last), line):
                    prefetch(slots, i)
                for i in range(block, min(block + _BLOCK, last)):
                    old = load(slots, i)
                    g = -old.g if maximize else old.g
                    store(slots, i, update(old.p, g, old, c), key)
            begin = stop
            tensor += 1

    kernel = numba.njit(types.void(*[types.int64] * 8), **_OPTIONS, no_cpython_wrapper=True)(kernel)

    def work(job):
        # Tables: of each tensor's slots (parameter, gradient, states), where each tensor starts in the row of all
        # elements, one row of coefficients for all tensors or a row for each, keys of random bits, where each piece
        # starts, and the tensor it starts in.
        addresses, starts, coefficients = item(job, 0), item(job, 1), item(job, 2)
        per_tensor, keys, bounds, tensors = item(job, 3), item(job, 4), item(job, 5), item(job, 6)
        piece = take(job, 8)
        while piece < item(job, 7):
            begin, end = item(bounds, piece), item(bounds, piece + 1)
            kernel(addresses, starts, coefficients, per_tensor, keys, item(tensors, piece), begin, end)
            piece = take(job, 8)

    return numba.cfunc(types.void(types.int64), error_model="numpy")(work)
