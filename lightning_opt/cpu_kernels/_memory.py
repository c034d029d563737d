"""Reads and writes of memory at addresses, for compiled kernels.

A slot is a tensor that an update reads or writes, as the address of its first element; slots are tuples of addresses.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._bits import narrow, narrow_stochastically, widen

_STORED = {"float32": types.float32, "float64": types.float64, "bfloat16": types.uint16, "float16": types.uint16}
_INT8, _INT16, _INT32, _INT64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_HALF, _FLOAT = ir.HalfType(), ir.FloatType()


@intrinsic
def item(typingctx, table, i):
    """Number i of a table of int64."""

    def codegen(context, builder, signature, args):
        return builder.load(_pointer(builder, args[0], _INT64, args[1]))

    return types.int64(table, i), codegen


@intrinsic
def put(typingctx, address, i, value):
    """Write a float32 at number i of a row of float32."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], _pointer(builder, args[0], _FLOAT, args[1]))
        return context.get_dummy_value()

    return types.none(address, i, types.float32), codegen


@intrinsic
def put_word(typingctx, address, i, value):
    """Write the low 32 bits of a uint64 at number i of a row of uint32."""

    def codegen(context, builder, signature, args):
        builder.store(builder.trunc(args[2], _INT32), _pointer(builder, args[0], _INT32, args[1]))
        return context.get_dummy_value()

    return types.none(address, i, types.uint64), codegen


@intrinsic
def word(typingctx, address, i):
    """Number i of a row of uint32."""

    def codegen(context, builder, signature, args):
        return builder.load(_pointer(builder, args[0], _INT32, args[1]))

    return types.uint32(address, i), codegen


@intrinsic
def take(typingctx, table, i):
    """Number i of a table of int64, which grows by one; no two threads get the same."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", _pointer(builder, args[0], _INT64, args[1]), _INT64(1), "monotonic")

    return types.int64(table, i), codegen


def row_reader(result):
    """A function ``(table, i)`` that reads row i of a table of numbers as a tuple."""

    @intrinsic
    def row(typingctx, table, i):
        def codegen(context, builder, signature, args):
            kind = context.get_value_type(result.dtype)
            first = builder.mul(args[1], _INT64(result.count))
            columns = [builder.add(first, _INT64(k)) for k in range(result.count)]
            values = [builder.load(_pointer(builder, args[0], kind, k)) for k in columns]
            return context.make_tuple(builder, result, values)

        return result(table, i), codegen

    return row


def loader(dtypes, result, read=None):
    """A function ``(slots, i)`` that reads element i of every slot, or of those in ``read``, in the compute dtype."""
    read = range(len(dtypes)) if read is None else read

    @intrinsic
    def load(typingctx, slots, i):
        def codegen(context, builder, signature, args):
            # The widest registers, where LLVM by itself is careful; llvmlite knows no attributes with values.
            set.add(builder.function.attributes, '"prefer-vector-width"="512"')
            values = []
            for k in read:
                stored = _STORED[dtypes[k]]
                value = builder.load(_place(context, builder, args[0], k, stored, args[1]))
                _annotate(value, builder.module, k, len(dtypes))
                if dtypes[k] == "bfloat16":
                    value = context.compile_internal(builder, widen, types.float32(stored), [value])
                    stored = types.float32
                elif dtypes[k] == "float16":
                    value = builder.fpext(builder.bitcast(value, _HALF), _FLOAT)
                    stored = types.float32
                values.append(context.cast(builder, value, stored, result.dtype))
            return context.make_tuple(builder, result, values)

        return result(slots, i), codegen

    return load


def storer(dtypes, work, written=None):
    """A function ``(slots, i, values, key)`` that writes element i of the slots in ``written``.

    By default these are all but the gradient, in second place.
    """
    written = [0, *range(2, len(dtypes))] if written is None else written

    @intrinsic
    def store(typingctx, slots, i, values, key):
        if tuple(values) != (work,) * len(written):
            raise TypeError(f"an update must return all {len(written)} results as {work}, got {values}")

        def codegen(context, builder, signature, args):
            for n, k in enumerate(written):
                stored = _STORED[dtypes[k]]
                value = builder.extract_value(args[2], n)
                if dtypes[k] == "float16":
                    value = builder.bitcast(builder.fptrunc(value, _HALF), _INT16)
                elif dtypes[k] != "bfloat16":
                    value = context.cast(builder, value, work, stored)
                elif key == types.none or work == types.float64:
                    value = context.compile_internal(builder, narrow, stored(work), [value])
                else:
                    arguments = [value, builder.extract_value(args[3], k), args[1]]
                    signature = stored(work, types.uint32, types.int64)
                    value = context.compile_internal(builder, narrow_stochastically, signature, arguments)
                access = builder.store(value, _place(context, builder, args[0], k, stored, args[1]))
                _annotate(access, builder.module, k, len(dtypes))
            return context.get_dummy_value()

        return types.none(slots, i, values, key), codegen

    return store


def prefetcher(dtypes):
    """A function ``(slots, i)`` that asks for element i of every slot."""

    @intrinsic
    def prefetch(typingctx, slots, i):
        def codegen(context, builder, signature, args):
            address = _INT8.as_pointer()
            function = builder.module.declare_intrinsic(
                "llvm.prefetch", [address], ir.FunctionType(ir.VoidType(), [address, _INT32, _INT32, _INT32])
            )
            for_reading, in_all_caches, data = _INT32(0), _INT32(3), _INT32(1)
            for k, dtype in enumerate(dtypes):
                place = _place(context, builder, args[0], k, _STORED[dtype], args[1])
                builder.call(function, [builder.bitcast(place, address), for_reading, in_all_caches, data])
            return context.get_dummy_value()

        return types.none(slots, i), codegen

    return prefetch


def _place(context, builder, slots, k, stored, i):
    return _pointer(builder, builder.extract_value(slots, k), context.get_value_type(stored), i)


def _pointer(builder, address, kind, i):
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [i])


def _annotate(access, module, slot, slots):
    """Tell LLVM that this access reaches no other slot, so that it vectorizes however many there are."""
    domain = module.add_metadata(["lightning_opt"])
    scopes = [module.add_metadata([f"slot {k}", domain]) for k in range(slots)]
    access.set_metadata("alias.scope", module.add_metadata([scopes[slot]]))
    access.set_metadata("noalias", module.add_metadata(scopes[:slot] + scopes[slot + 1 :]))
