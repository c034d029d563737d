"""Compiles a method's elementwise update into a kernel that walks many tensors, with numba.

The tensors come as a table of addresses: a row a tensor, a column a slot (parameter, gradient, states in order). Reads
and writes are annotated as not aliasing between slots, so that LLVM vectorizes however many slots there are.
"""

from collections import namedtuple
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._bits import narrow, narrow_stochastically, widen

_TYPES = {"float32": types.float32, "float64": types.float64, "bfloat16": types.uint16}
_OPTIONS = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}  # Python's checks of divisors would prevent vectorization


def compiled(
    name: str,
    flags: tuple[tuple[str, Any], ...],
    states: tuple[str, ...],
    coefficients: tuple[str, ...],
    dtypes: tuple[str, ...],
    maximize: bool,
    stochastic_rounding: bool,
) -> Callable[..., None]:
    method = getattr(import_module(f".{name}", __package__), name)
    work = types.float64 if dtypes[0] == "float64" else types.float32
    Slots = namedtuple("Slots", ("p", "g", *states))  # type: ignore[misc]
    Coefficients = namedtuple("Coefficients", coefficients)  # type: ignore[misc]
    update = numba.njit(method(**dict(flags)), **_OPTIONS, no_cpython_wrapper=True)
    row_of_addresses = _row(types.UniTuple(types.int64, len(dtypes)))
    row_of_coefficients = _row(types.NamedUniTuple(work, len(coefficients), Coefficients))
    row_of_keys = _row(types.UniTuple(types.uint32, len(dtypes)))
    load, store = _load(dtypes, types.NamedUniTuple(work, len(dtypes), Slots)), _store(dtypes, work)

    def kernel(addresses, starts, coefficients, per_tensor, keys, tensor, begin, end):
        while begin < end:
            start, stop = item(starts, tensor), item(starts, tensor + 1)
            slots = row_of_addresses(addresses, tensor)
            c = row_of_coefficients(coefficients, tensor * per_tensor)
            key = row_of_keys(keys, tensor) if stochastic_rounding else None
            for i in range(begin - start, min(end, stop) - start):
                old = load(slots, i)
                g = -old.g if maximize else old.g
                store(slots, i, update(old.p, g, old, c), key)
            begin = stop
            tensor += 1

    return numba.njit(types.void(*[types.int64] * 8), **_OPTIONS)(kernel)


@intrinsic
def item(typingctx, address, i):
    def codegen(context, builder, signature, args):
        return builder.load(_pointer(builder, args[0], ir.IntType(64), args[1]))

    return types.int64(address, i), codegen


def _row(result):
    """A function ``(table, i)`` that reads row i of a table of equal numbers as a tuple."""

    @intrinsic
    def row(typingctx, table, i):
        def codegen(context, builder, signature, args):
            kind = context.get_value_type(result.dtype)
            first = builder.mul(args[1], ir.IntType(64)(result.count))
            columns = [builder.add(first, ir.IntType(64)(k)) for k in range(result.count)]
            values = [builder.load(_pointer(builder, args[0], kind, k)) for k in columns]
            return context.make_tuple(builder, result, values)

        return result(table, i), codegen

    return row


def _load(dtypes, result):
    """A function ``(slots, i)`` that reads element i of every slot in the compute dtype."""

    @intrinsic
    def load(typingctx, slots, i):
        def codegen(context, builder, signature, args):
            values = []
            for k, dtype in enumerate(dtypes):
                stored = _TYPES[dtype]
                pointer = _pointer(builder, builder.extract_value(args[0], k), context.get_value_type(stored), args[1])
                value = _annotate(builder.load(pointer), builder.module, k, len(dtypes))
                if dtype == "bfloat16":
                    value = context.compile_internal(builder, widen, types.float32(stored), [value])
                    stored = types.float32
                values.append(context.cast(builder, value, stored, result.dtype))
            return context.make_tuple(builder, result, values)

        return result(slots, i), codegen

    return load


def _store(dtypes, work):
    """A function ``(slots, i, (p, *states), key)`` that writes element i of every slot but the gradient."""

    @intrinsic
    def store(typingctx, slots, i, new, key):
        if tuple(new) != (work,) * (len(dtypes) - 1):
            raise TypeError(f"an update must return the parameter and all states as {work}, got {new}")

        def codegen(context, builder, signature, args):
            for n, k in enumerate([0, *range(2, len(dtypes))]):
                stored = _TYPES[dtypes[k]]
                value = builder.extract_value(args[2], n)
                if dtypes[k] != "bfloat16":
                    value = context.cast(builder, value, work, stored)
                elif key == types.none or work == types.float64:
                    value = context.compile_internal(builder, narrow, stored(work), [value])
                else:
                    bits = builder.extract_value(args[3], k)
                    signature = stored(work, types.uint32, types.int64)
                    value = context.compile_internal(builder, narrow_stochastically, signature, [value, bits, args[1]])
                pointer = _pointer(builder, builder.extract_value(args[0], k), context.get_value_type(stored), args[1])
                _annotate(builder.store(value, pointer), builder.module, k, len(dtypes))
            return context.get_dummy_value()

        return types.none(slots, i, new, key), codegen

    return store


def _pointer(builder, address, kind, i):
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [i])


def _annotate(access, module, slot, slots):
    """Tell LLVM that no other slot is reached through this access."""
    domain = module.add_metadata(["lightning_opt"])
    scopes = [module.add_metadata([f"slot {k}", domain]) for k in range(slots)]
    access.set_metadata("alias.scope", module.add_metadata([scopes[slot]]))
    access.set_metadata("noalias", module.add_metadata(scopes[:slot] + scopes[slot + 1 :]))
    return access
