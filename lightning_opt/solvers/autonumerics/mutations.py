"""Random changes of a program: insert a vertex, remove one, reconnect an edge; and two vertices at once."""

from collections.abc import Sequence

import numpy as np

from .graph import ARITY, Node, coefficient, depending_on, walk
from .program import Program

PAPER_WEIGHTS = {"insert": 1.0, "remove": 2.0, "reconnect": 3.0}
"""Of the paper's code (github.com/google-deepmind/autonumerics_zero)."""

WEIGHTS = {**PAPER_WEIGHTS, "insert_pair": 2.0}
"""With ours: ``insert_pair`` replaces v by v + c / v, v * (v + c) and the like, each half of which alone is no gain."""

Slot = tuple[Node, int]


def mutate(
    program: Program,
    coefficients: np.ndarray,
    rng: np.random.Generator,
    *,
    ops: Sequence[str] = ("+", "-", "*", "/"),
    max_ops: int = 100,
    weights: dict[str, float] = WEIGHTS,
) -> tuple[Program, np.ndarray]:
    """A child: changes accumulate until the structure differs from the parent's and fits.

    Args:
        program: The parent.
        coefficients: Its coefficients; the child keeps those that it still has, so that fitting can start from them.
        rng: Where the choices come from.
        ops: The operations that may be inserted.
        max_ops: The most operations that the child may have.
        weights: How often each kind of change is chosen. The identity can only be inserted into.

    Returns:
        The child and its coefficients.
    """
    kinds = list(weights)
    shares = np.cumsum([weights[kind] for kind in kinds]) / sum(weights.values())
    output = Node("?", [program.to_graph(coefficients)])  # so that the output is an edge as others are
    for _ in range(100):
        grown = output.operands[0].op in ARITY
        kind = kinds[min(int(np.searchsorted(shares, rng.random())), len(kinds) - 1)] if grown else "insert"
        _CHANGES[kind](output, rng, ops)
        child, values = Program.from_graph(output.operands[0])
        if child.ops > max_ops + 2:  # too far off: start again
            output = Node("?", [program.to_graph(coefficients)])
        elif child != program and 0 < child.ops <= max_ops:
            return child, values
    return program, coefficients


def random_coefficient(rng: np.random.Generator) -> float:
    """A magnitude from 0.01 to 100, even on a logarithmic scale, and a random sign."""
    return float(10.0 ** rng.uniform(-2, 2) * rng.choice((-1.0, 1.0)))


def _insert(output: Node, rng: np.random.Generator, ops: Sequence[str]) -> None:
    """Put a new vertex on an edge: the former source is one of its operands."""
    slot = _pick(_edges(output), rng)
    source = slot[0].operands[slot[1]]
    _reroute(output, slot, _new_vertex(output, source, rng, ops), rng)


def _insert_pair(output: Node, rng: np.random.Generator, ops: Sequence[str]) -> None:
    """Put op2(op1(v, .), v) on an edge with source v."""
    slot = _pick(_edges(output), rng)
    source = slot[0].operands[slot[1]]
    inner = _new_vertex(output, source, rng, ops)
    binary = [op for op in ops if ARITY[op] == 2]
    operands = [source, inner] if rng.random() < 0.5 else [inner, source]
    _reroute(output, slot, Node(_pick(binary, rng), operands), rng)


def _remove(output: Node, rng: np.random.Generator, ops: Sequence[str]) -> None:
    """Replace a vertex by one of its operands, wherever it is used."""
    vertex = _pick([node for node in walk(output) if node.op in ARITY], rng)
    _replace(output, vertex, _pick(vertex.operands, rng))


def _reconnect(output: Node, rng: np.random.Generator, ops: Sequence[str]) -> None:
    """Move the source of an edge."""
    parent, position = _pick(_edges(output), rng)
    if parent is not output:
        parent.operands[position] = _source(output, parent, rng)
    else:
        parent.operands[position] = _pick([node for node in walk(output) if node.op in ARITY], rng)


_CHANGES = {"insert": _insert, "remove": _remove, "reconnect": _reconnect, "insert_pair": _insert_pair}


def _new_vertex(output: Node, source: Node, rng: np.random.Generator, ops: Sequence[str]) -> Node:
    op = _pick(ops, rng)
    operands = [source]
    while len(operands) < ARITY[op]:
        other = source if rng.random() < 0.2 else _source(output, source, rng)
        if other.op == "c" and len(operands) == 1 and op in ("+", "-", "*", "/"):  # near to no change
            other.value = (1.0 if op in "*/" else 0.0) + 1e-3 * rng.standard_normal()
        operands.append(other)
    order = rng.permutation(len(operands))
    return Node(op, [operands[k] for k in order])


def _source(output: Node, above: Node, rng: np.random.Generator) -> Node:
    """A new coefficient, x, or a vertex that does not depend on ``above``, so that no circle closes."""
    draw = rng.random()
    if draw < 0.45:
        return coefficient(random_coefficient(rng))
    nodes = walk(output)
    if draw < 0.65:
        return next((node for node in nodes if node.op == "x"), Node("x"))
    above_it = depending_on(nodes, above)
    free = [node for node in nodes if node.op in ARITY and node not in above_it]
    return _pick(free, rng) if free else coefficient(random_coefficient(rng))


def _edges(output: Node) -> list[Slot]:
    return [(node, k) for node in walk(output) for k in range(len(node.operands))]


def _reroute(output: Node, slot: Slot, new: Node, rng: np.random.Generator) -> None:
    """Let the edge come from ``new``; or, as often, all edges that have the same source, but those of ``new``."""
    parent, position = slot
    source = parent.operands[position]
    if rng.random() < 0.5:
        parent.operands[position] = new
        return
    inside = set(walk(new))
    for node in walk(output):
        if node not in inside:
            node.operands = [new if operand is source else operand for operand in node.operands]


def _replace(output: Node, old: Node, new: Node) -> None:
    for node in walk(output):
        node.operands = [new if operand is old else operand for operand in node.operands]


def _pick(choices: Sequence, rng: np.random.Generator):  # type: ignore[no-untyped-def, type-arg]
    return choices[int(rng.integers(len(choices)))]
