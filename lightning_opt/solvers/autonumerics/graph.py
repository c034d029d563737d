"""Expression graphs: the form in which programs are written, mutated and simplified.

A graph is its output node. Nodes are shared where a result is used twice; every coefficient is a node of its own, since
sharing one would save no operation and cost a degree of freedom.
"""

from typing import Union

ARITY = {"+": 2, "-": 2, "*": 2, "/": 2, "fma": 3, "sqrt": 1}  # fma(a, b, c) = a * b + c
COMMUTATIVE = ("+", "*")
_CODE = {"x": 1, "c": 2, "+": 3, "-": 4, "*": 5, "/": 6, "fma": 7, "sqrt": 8}

Operand = Union["Node", float]


class Node:
    """A vertex of an expression graph: the input, a coefficient or an operation.

    Args:
        op: ``"x"``, ``"c"`` or a key of ``ARITY``.
        operands: The nodes it is computed from.
        value: The value, of a coefficient.

    Example:
        >>> x = Node("x")
        >>> u = 90.4 / x + x
        >>> cost(62.6 / (236.6 / u + u - 31.3) + 1.0)
        7
    """

    __slots__ = ("op", "operands", "value")

    def __init__(self, op: str, operands: tuple["Node", ...] | list["Node"] = (), value: float = 0.0) -> None:
        self.op = op
        self.operands = list(operands)
        self.value = value

    def __add__(self, other: Operand) -> "Node":
        return Node("+", [self, _node(other)])

    def __radd__(self, other: float) -> "Node":
        return Node("+", [_node(other), self])

    def __sub__(self, other: Operand) -> "Node":
        return Node("-", [self, _node(other)])

    def __rsub__(self, other: float) -> "Node":
        return Node("-", [_node(other), self])

    def __mul__(self, other: Operand) -> "Node":
        return Node("*", [self, _node(other)])

    def __rmul__(self, other: float) -> "Node":
        return Node("*", [_node(other), self])

    def __truediv__(self, other: Operand) -> "Node":
        return Node("/", [self, _node(other)])

    def __rtruediv__(self, other: float) -> "Node":
        return Node("/", [_node(other), self])


def coefficient(value: float) -> Node:
    """A new coefficient."""
    return Node("c", value=float(value))


def walk(output: Node) -> list[Node]:
    """Every node that the output needs, once, operands before their users."""
    seen: set[Node] = set()
    order: list[Node] = []

    def visit(node: Node) -> None:
        for operand in node.operands:
            if operand not in seen:
                visit(operand)
        seen.add(node)
        order.append(node)

    visit(output)
    return order


def cost(output: Node) -> int:
    """The operations that depend on x and reach the output; those on coefficients alone are free (arXiv:2312.08472).

    Example:
        >>> x = Node("x")
        >>> cost((coefficient(2) * coefficient(3)) * x + 1.0)  # the product of the coefficients is a coefficient
        2
    """
    depends: set[Node] = set()
    for node in walk(output):
        if node.op == "x" or any(operand in depends for operand in node.operands):
            depends.add(node)
    return sum(node.op != "x" for node in depends)


def depending_on(nodes: list[Node], other: Node) -> set[Node]:
    """Those of the nodes, in the order of ``walk``, that need ``other``, itself included."""
    depends = {other}
    for node in nodes:
        if not depends.isdisjoint(node.operands):
            depends.add(node)
    return depends


def simplify(output: Node) -> Node:
    """An equal graph without what can be saved: a new one, the given one is left as it is.

    Operations on coefficients are folded, and a second coefficient is merged into the first where that is exact in real
    arithmetic: (v + a) + b, (v * a) * b, a / (v * b) and the like. Equal subgraphs become one. ``v - a`` becomes
    ``v + (-a)``, ``v / a`` becomes ``v * (1 / a)``, and a difference whose second term has a free sign a sum, so that
    fewer graphs stand for one function.
    """
    order = walk(output)
    users: dict[Node, int] = {}
    for node in order:
        for operand in node.operands:
            users[operand] = users.get(operand, 0) + 1
    new: dict[Node, Node] = {}
    known: dict[tuple[object, ...], Node] = {}
    the_x = Node("x")
    for node in order:
        if node.op == "x":
            new[node] = the_x
        elif node.op == "c":
            new[node] = coefficient(node.value)
        else:
            operands = [new[operand] for operand in node.operands]
            made = _simplified(node.op, operands, [users[operand] == 1 for operand in node.operands])
            if made.op not in ("x", "c"):
                numbers = list(map(id, made.operands))
                if made.op in COMMUTATIVE:
                    numbers.sort()
                made = known.setdefault((made.op, *numbers), made)
            new[node] = made
    return new[output]


def _simplified(op: str, operands: list[Node], own: list[bool]) -> Node:
    """The node for an operation; ``own`` says which operands nothing else uses."""
    if all(operand.op == "c" for operand in operands):
        return coefficient(_fold(op, [operand.value for operand in operands]))
    if op == "sqrt":
        return Node(op, operands)
    if op == "fma":
        return _fma(operands)
    a, b = operands
    if op == "+":
        return _sum(a, b)
    if op == "*":
        return _product(a, b)
    if op == "-":
        if a is b:
            return coefficient(0.0)
        if b.op == "c":
            return _sum(a, coefficient(-b.value))
        if own[1] and _has_free_sign(b):
            return _sum(a, _negated(b))
        return _difference(a, b)
    if a is b:
        return coefficient(1.0)
    if b.op == "c":
        return _product(a, coefficient(_fold("/", [1.0, b.value])))
    return _quotient(a, b)


def _sum(a: Node, b: Node) -> Node:
    if a is b:
        return _product(a, coefficient(2.0))
    if a.op == "c":
        a, b = b, a
    if b.op == "c":
        inner = _coefficient_of(a)
        if a.op == "+" and inner is not None:  # (v + a) + b
            return Node("+", [_other(a), coefficient(inner.value + b.value)])
        if a.op == "-" and a.operands[0].op == "c":  # (a - v) + b
            return Node("-", [coefficient(a.operands[0].value + b.value), a.operands[1]])
    return Node("+", [a, b])


def _difference(a: Node, b: Node) -> Node:
    if a.op == "c":
        inner = _coefficient_of(b)
        if b.op == "+" and inner is not None:  # a - (v + b)
            return Node("-", [coefficient(a.value - inner.value), _other(b)])
        if b.op == "-" and b.operands[0].op == "c":  # a - (b - v)
            return _sum(b.operands[1], coefficient(a.value - b.operands[0].value))
    return Node("-", [a, b])


def _product(a: Node, b: Node) -> Node:
    if a.op == "c":
        a, b = b, a
    if b.op == "c":
        inner = _coefficient_of(a)
        if a.op == "*" and inner is not None:  # (v * a) * b
            return Node("*", [_other(a), coefficient(inner.value * b.value)])
        if a.op == "/" and a.operands[0].op == "c":  # (a / v) * b
            return Node("/", [coefficient(a.operands[0].value * b.value), a.operands[1]])
    return Node("*", [a, b])


def _quotient(a: Node, b: Node) -> Node:
    if a.op == "c":
        inner = _coefficient_of(b)
        if b.op == "*" and inner is not None:  # a / (v * b)
            return Node("/", [coefficient(_fold("/", [a.value, inner.value])), _other(b)])
        if b.op == "/" and b.operands[0].op == "c":  # a / (b / v)
            return _product(b.operands[1], coefficient(_fold("/", [a.value, b.operands[0].value])))
    return Node("/", [a, b])


def _fma(operands: list[Node]) -> Node:
    a, b, c = operands
    if a.op == "c" and b.op == "c":
        return _sum(coefficient(a.value * b.value), c)
    return Node("fma", [a, b, c])


def _coefficient_of(node: Node) -> Node | None:
    """The coefficient of a sum or product with one, else None."""
    if node.op not in COMMUTATIVE:
        return None
    return next((operand for operand in node.operands if operand.op == "c"), None)


def _other(node: Node) -> Node:
    return node.operands[1] if node.operands[0].op == "c" else node.operands[0]


def _has_free_sign(node: Node) -> bool:
    return node.op in ("*", "/") and any(operand.op == "c" for operand in node.operands)


def _negated(node: Node) -> Node:
    operands = [coefficient(-operand.value) if operand.op == "c" else operand for operand in node.operands]
    return Node(node.op, operands)


def _fold(op: str, values: list[float]) -> float:
    if op == "+":
        return values[0] + values[1]
    if op == "-":
        return values[0] - values[1]
    if op == "*":
        return values[0] * values[1]
    if op == "/":
        return values[0] / values[1] if values[1] else float("nan")
    if op == "fma":
        return values[0] * values[1] + values[2]
    return values[0] ** 0.5 if values[0] >= 0 else float("nan")


def _node(value: Operand) -> Node:
    return value if isinstance(value, Node) else coefficient(value)


def keys(output: Node) -> dict[Node, int]:
    """For each node a number that depends only on the expression behind it, coefficients' values aside."""
    numbers: dict[Node, int] = {}
    for node in walk(output):
        parts = [numbers[operand] for operand in node.operands]
        if node.op in COMMUTATIVE:
            parts.sort()
        if node.op == "fma":
            parts[:2] = sorted(parts[:2])
        numbers[node] = hash((_CODE[node.op], *parts))  # of integers: the same in every process
    return numbers
