"""The one kernel: it walks many tensors and calls a method's elementwise update on every block of them."""

# mypy: ignore-errors
# (tuples grow in loops that the compiler unrolls)

import triton
import triton.language as tl

from ._math import mix, round_stochastically


@triton.jit(do_not_specialize=["n"])
def multi_tensor(
    table,  # int64, n columns; rows: size, number, and the addresses of parameter, gradient and states of each tensor
    chunks,  # int32; for each program its tensor and its block in that tensor
    scalars,  # tuple of float32: the coefficients that all tensors share
    vectors,  # float32, n columns; a row for each coefficient that tensors do not share; None without any
    n,  # number of tensors
    UPDATE: tl.constexpr,  # (p, g, states, coefficients, FLAGS) -> p, states
    FLAGS: tl.constexpr,
    ROWS: tl.constexpr,  # for "step" and each coefficient its row in vectors, or -1
    DTYPES: tl.constexpr,  # of parameters, gradients and states
    MAXIMIZE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks + 2 * program)
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * BLOCK
    size = tl.load(table + tensor)
    number = tl.load(table + n + tensor)
    addresses = ()
    every = start * 0
    for i in tl.static_range(len(DTYPES)):
        address = tl.load(table + (2 + i) * n + tensor)
        addresses = addresses + (address,)
        every = every | address
    coefficients = ()
    for k in tl.static_range(len(ROWS)):
        if ROWS[k] < 0:
            coefficients = coefficients + (scalars[k],)
        else:
            coefficients = coefficients + (tl.load(vectors + ROWS[k] * n + tensor),)
    # Only a whole block of tensors that all begin at a multiple of 16 bytes can be moved 16 bytes at a time.
    if ((every & 15) == 0) & (start + BLOCK <= size):
        _block(addresses, start, size, number, coefficients, UPDATE, FLAGS, DTYPES, MAXIMIZE, STOCHASTIC, BLOCK, True)
    else:
        _block(addresses, start, size, number, coefficients, UPDATE, FLAGS, DTYPES, MAXIMIZE, STOCHASTIC, BLOCK, False)


@triton.jit
def _block(
    addresses,
    start,
    size,
    number,
    coefficients,
    UPDATE: tl.constexpr,
    FLAGS: tl.constexpr,
    DTYPES: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    offsets = tl.arange(0, BLOCK)
    inside = offsets < size - start
    pointers = ()
    values = ()
    for i in tl.static_range(len(DTYPES)):
        pointer = addresses[i].to(tl.pointer_type(DTYPES[i]))
        if FULL:
            pointer = tl.multiple_of(pointer, 16) + start + offsets
            value = tl.load(pointer)
        else:
            pointer = pointer + start + offsets
            value = tl.load(pointer, mask=inside)
        pointers = pointers + (pointer,)
        values = values + (value.to(tl.float32),)
    g = values[1]
    if MAXIMIZE:
        g = -g
    p, states = UPDATE(values[0], g, values[2:], coefficients[1:], FLAGS)
    results = (p, g) + states
    for i in tl.static_range(len(DTYPES)):
        if i != 1:
            result = results[i]
            if STOCHASTIC and DTYPES[i] == tl.bfloat16:
                slot = i - (i > 1)  # the reference numbers the slots of a tensor without the gradient
                step = coefficients[0]
                key = mix(step.to(tl.int32).to(tl.uint32) + mix((number * 8 + slot).to(tl.uint32)))
                result = round_stochastically(result, key, (start + offsets).to(tl.uint32))
            else:
                result = result.to(DTYPES[i])
            if FULL:
                tl.store(pointers[i], result)
            else:
                tl.store(pointers[i], result, mask=inside)
