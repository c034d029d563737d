"""Straight-line programs of one variable: what the search discovers."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lightning_opt._checks import check_choice

from .graph import ARITY, COMMUTATIVE, Node, coefficient, keys, simplify

X = 0
COEFFICIENT = -1


class Step(NamedTuple):
    """One operation.

    Attributes:
        op: A key of ``graph.ARITY``.
        operands: ``X`` for the input, ``COEFFICIENT`` for a coefficient of its own, k for the result of step k, the
            first being 1.
    """

    op: str
    operands: tuple[int, ...]


class Program:
    """Operations in order; the result of the last is the output. The coefficients' values are kept apart from it.

    The coefficients are numbered as they appear, in the order of the steps. No step at all is the identity.

    Args:
        steps: The operations.

    Raises:
        ValueError: If an operation is unknown, has the wrong number of operands, or uses a step that is not behind it.

    Example:
        >>> program = Program([Step("*", (X, COEFFICIENT)), Step("+", (1, COEFFICIENT))])
        >>> program.ops, program.num_coefficients, float(program(0.5, [2.0, 3.0]))
        (2, 2, 4.0)
    """

    def __init__(self, steps: Sequence[tuple[str, Sequence[int]]]) -> None:
        self.steps = tuple(Step(op, tuple(operands)) for op, operands in steps)
        for number, (op, operands) in enumerate(self.steps, 1):
            check_choice("op", op, ARITY)
            if len(operands) != ARITY[op]:
                raise ValueError(f"step {number}: {op} takes {ARITY[op]} operands, got {len(operands)}")
            if not all(COEFFICIENT <= operand < number for operand in operands):
                raise ValueError(f"step {number} must use steps 1 to {number - 1}, x (0) or -1, got {operands}")

    @classmethod
    def from_graph(cls, output: Node) -> tuple["Program", np.ndarray]:
        """The program of a graph, simplified and in canonical order, and the values of its coefficients.

        Example:
            >>> x = Node("x")
            >>> program, values = Program.from_graph((2.0 + x * 3.0) - 5.0)
            >>> program.steps, values.tolist()
            ((Step(op='*', operands=(0, -1)), Step(op='+', operands=(1, -1))), [3.0, -3.0])
        """
        output = simplify(output)
        number = keys(output)
        steps: list[Step] = []
        values: list[float] = []
        placed: dict[Node, int] = {}

        def order(node: Node) -> tuple[int, int]:  # results of steps, then x, then a coefficient
            return {"x": 1, "c": 2}.get(node.op, 0), number[node]

        def place(node: Node) -> int:
            if node.op == "x":
                return X
            if node.op == "c":
                return COEFFICIENT
            if node not in placed:
                operands = list(node.operands)
                if node.op in COMMUTATIVE:
                    operands.sort(key=order)
                if node.op == "fma":
                    operands[:2] = sorted(operands[:2], key=order)
                numbers = tuple([place(operand) for operand in operands])
                values.extend(operand.value for operand in operands if operand.op == "c")
                steps.append(Step(node.op, numbers))
                placed[node] = len(steps)
            return placed[node]

        if place(output) == COEFFICIENT:  # a constant: x * 0 + c
            steps, values = [Step("*", (X, COEFFICIENT)), Step("+", (1, COEFFICIENT))], [0.0, output.value]
        program = cls.__new__(cls)  # right by construction: no need to check again
        program.steps = tuple(steps)
        return program, np.array(values)

    def to_graph(self, coefficients: Sequence[float] | np.ndarray) -> Node:
        """The graph of the program with these coefficients."""
        values = iter(coefficients)
        nodes = [Node("x")]
        for op, operands in self.steps:
            own = [coefficient(next(values)) if k == COEFFICIENT else nodes[k] for k in operands]
            nodes.append(Node(op, own))
        return nodes[-1]

    @property
    def ops(self) -> int:
        """The number of operations."""
        return len(self.steps)

    @property
    def cost(self) -> int:
        """The number of operations that selection goes by: at least 2, as in the paper's code."""
        return max(2, self.ops)

    @property
    def num_coefficients(self) -> int:
        """The number of coefficients."""
        return sum(operand == COEFFICIENT for step in self.steps for operand in step.operands)

    @property
    def key(self) -> int:
        """A 64-bit fingerprint of the structure, the same on every machine."""
        text = ";".join(f"{op}{operands}" for op, operands in self.steps)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.steps == other.steps

    def __hash__(self) -> int:
        return hash(self.steps)

    def __repr__(self) -> str:
        return f"Program({[tuple(step) for step in self.steps]})"

    def __call__(self, x: Any, coefficients: Sequence[Any] | np.ndarray) -> Any:
        """The program's value, in the arithmetic of its arguments.

        Args:
            x: A number or an array: of float64, float32, long double, or of ``mpmath.mpf`` with dtype object.
            coefficients: As many as ``num_coefficients``, of the same type. Division by zero gives infinity, also
                for ``mpf``.
        """
        x = np.asarray(x)
        exact = x.dtype == object
        coefficients = list(coefficients) if exact else list(np.asarray(coefficients, dtype=x.dtype))
        values: list[Any] = [x]
        position = 0
        with np.errstate(all="ignore"):
            for op, operands in self.steps:
                own = []
                for operand in operands:
                    own.append(coefficients[position] if operand == COEFFICIENT else values[operand])
                    position += operand == COEFFICIENT
                values.append((_EXACT if exact else _FLOAT)[op](*own))
        return values[-1]

    def encoded(self) -> np.ndarray:
        """The steps as integers ``[ops, 5]`` for the compiled evaluator: operation, three operands, result.

        Row 0 of its table of values is x, the next rows are the coefficients, then come the steps.
        """
        code = np.zeros((self.ops, 5), dtype=np.int64)
        position, first = 1, 1 + self.num_coefficients
        for k, (op, operands) in enumerate(self.steps):
            code[k, 0], code[k, 4] = OPERATIONS[op], first + k
            for slot, operand in enumerate(operands):
                code[k, 1 + slot] = position if operand == COEFFICIENT else operand and first + operand - 1
                position += operand == COEFFICIENT
        return code


OPERATIONS = {op: k for k, op in enumerate(ARITY)}


def _fma_of_floats(a: Any, b: Any, c: Any) -> Any:
    if np.asarray(a).dtype == np.float32:  # exact product, and one rounding but for rare double roundings
        return np.asarray(np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)
    return a * b + c


def _elementwise(function: Callable[..., Any], arity: int) -> Callable[..., Any]:
    return np.frompyfunc(function, arity, 1)


def _divide_exact(a: Any, b: Any) -> Any:
    if b == 0:
        return a * float("inf") if a else a * float("nan")
    return a / b


def _sqrt_exact(a: Any) -> Any:
    return a**0.5 if a >= 0 else a * float("nan")


_FLOAT: dict[str, Callable[..., Any]] = {
    "+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide, "fma": _fma_of_floats, "sqrt": np.sqrt,
}  # fmt: skip
_EXACT: dict[str, Callable[..., Any]] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": _elementwise(_divide_exact, 2),
    "fma": lambda a, b, c: a * b + c,
    "sqrt": _elementwise(_sqrt_exact, 1),
}
