"""Programs: what they cost, what counts as the same, and what they compute."""

import mpmath
import numpy as np
import pytest

from lightning_opt.solvers.autonumerics import Problem, Program
from lightning_opt.solvers.autonumerics.graph import Node, coefficient, cost, simplify
from lightning_opt.solvers.autonumerics.mutations import PAPER_WEIGHTS, WEIGHTS, mutate

# The 10 operations of arXiv:2312.08472 with minimax coefficients on [0, 1]
C = ("15141.930666520215641", "-250.5521240174381446", "5783.5249089654274602", "501.10424804351230462",
     "-0.99999999999999972603")  # fmt: skip
SIXTEEN_DIGITS = (1428.2149536997997, 3672.702768578095, 15316.313001914657, -247.49079209759202, 494.9815841952862)


def ten_operations(c1: float, c2: float, c3: float, c4: float, c5: float) -> Node:
    x = Node("x")
    u = c3 / x + x
    f = c4 / (c1 / u + c2 + u) - c5
    for _ in range(3):
        f = f * f
    return f


def horner(degree: int) -> Node:
    x = Node("x")
    p = coefficient(0.5)
    for k in range(degree):
        p = p * x + (k + 1.0)
    return p


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        (Node("x"), 0),
        (Node("x") + 1.0, 1),
        (ten_operations(1.0, 2.0, 3.0, 4.0, 5.0), 10),
        (horner(1), 2),
        (horner(5), 10),
        (coefficient(2.0) * coefficient(3.0) + Node("x"), 1),  # of coefficients alone: free
        (Node("fma", [Node("x"), coefficient(1.0), coefficient(2.0)]), 1),
        (Node("sqrt", [Node("x") * 2.0]), 2),
    ],
)
def test_cost_counts_what_depends_on_x_and_reaches_the_output(graph, expected):
    assert cost(graph) == expected
    program, _ = Program.from_graph(graph)
    assert program.ops == expected
    assert program.cost == max(2, expected)  # the floor of the paper's code


def test_a_result_used_twice_is_paid_once():
    x = Node("x")
    u = x * x + 1.0
    assert cost(u * u) == 3
    assert Program.from_graph((x * x + 1.0) * (x * x + 2.0))[0].ops == 4  # x * x is seen to be one


def test_the_published_ten_operations_have_14_digits():
    """By the formula alone and by the program, to 40 digits; 2.19e-15 is the least maximum."""
    with mpmath.workdps(40):
        c1, c2, c3, c4, c5 = map(mpmath.mpf, C)
        worst = mpmath.mpf(0)
        points = [mpmath.mpf(k) / 500 for k in range(1, 501)]
        for x in points:
            u = c3 / x + x
            worst = max(worst, abs((c4 / (c1 / u + c2 + u) - c5) ** 8 / mpmath.mpf(2) ** x - 1))
        assert 2.1e-15 < worst < 2.3e-15
        program, _ = Program.from_graph(ten_operations(*map(float, C)))
        exact = [c3, c1, c2, c4, -c5]  # in the order of the steps
        errors = Problem("exp2", (0.0, 1.0)).exact_errors(program, exact, np.arange(501) / 500)
        assert abs(errors[0]) < 2.3e-15  # c3 / 0 is infinity, so that f(0) = (-c5)^8
        assert 2.1e-15 < max(abs(errors)) < 2.3e-15


def test_ten_operations_can_have_16_digits():
    """The structure of the best known program of 9 operations, squared; coefficients in float64, all else 40 digits."""
    with mpmath.workdps(40):
        a, b, c, d, e = map(mpmath.mpf, SIXTEEN_DIGITS)
        worst = mpmath.mpf(0)
        for x in (mpmath.mpf(k) / 500 for k in range(1, 501)):
            u = a / x + x
            v = b / u + u
            worst = max(worst, abs((e / (c / v + v + d) + 1) ** 2 / mpmath.mpf(2) ** x - 1))
        assert worst < 1.1e-16


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x + 1.0, lambda x: 1.0 + x),
        (lambda x: x - 1.0, lambda x: x + 1.0),
        (lambda x: x / 2.0, lambda x: 2.0 * x),
        (lambda x: (x + 1.0) + 2.0, lambda x: x + 3.0),
        (lambda x: 2.0 * (x * 3.0), lambda x: x * 6.0),
        (lambda x: 2.0 / (x * 3.0), lambda x: 2.0 / x),
        (lambda x: 2.0 / (3.0 / x), lambda x: x * 2.0),
        (lambda x: 2.0 - (x + 3.0), lambda x: 2.0 - x),
        (lambda x: 2.0 - (3.0 - x), lambda x: x + 2.0),
        (lambda x: x * x - x * 2.0, lambda x: x * 2.0 + x * x),
        (lambda x: (x + 1.0) * (2.0 / x), lambda x: (2.0 / x) * (1.0 + x)),
        (lambda x: x + x, lambda x: x * 2.0),
    ],
)
def test_equal_structures_have_one_key(one, other):
    a, b = Program.from_graph(one(Node("x")))[0], Program.from_graph(other(Node("x")))[0]
    assert a == b
    assert a.key == b.key


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x + 1.0, lambda x: x * 1.0),
        (lambda x: 1.0 - x, lambda x: x - 1.0),
        (lambda x: 1.0 / x, lambda x: x / 2.0),
        (lambda x: x * x * x, lambda x: x * x),
        (lambda x: (x + 1.0) * (x + 2.0), lambda x: (x + 1.0) * x),
    ],
)
def test_different_functions_have_different_keys(one, other):
    assert Program.from_graph(one(Node("x")))[0].key != Program.from_graph(other(Node("x")))[0].key


def value(graph: Node, x: mpmath.mpf) -> mpmath.mpf:
    """By recursion on the graph: an evaluator that shares nothing with the program's."""
    a = [value(operand, x) for operand in graph.operands]
    return {
        "x": lambda: x,
        "c": lambda: mpmath.mpf(graph.value),
        "+": lambda: a[0] + a[1],
        "-": lambda: a[0] - a[1],
        "*": lambda: a[0] * a[1],
        "/": lambda: a[0] / a[1],
        "fma": lambda: a[0] * a[1] + a[2],
        "sqrt": lambda: mpmath.sqrt(a[0]),
    }[graph.op]()


def random_graphs(count: int, ops: tuple[str, ...] = ("+", "-", "*", "/", "fma")):
    rng = np.random.default_rng(0)
    program, coefficients = Program.from_graph(Node("x") + 1.0)
    for _ in range(count):
        program, coefficients = mutate(program, coefficients, rng, ops=ops, max_ops=8)
        if program.ops > 5:
            program, coefficients = mutate(program, coefficients, rng, ops=ops, max_ops=8, weights={"remove": 1.0})
        yield program, coefficients


def test_programs_of_mutated_graphs_compute_what_the_graphs_do():
    """Whatever mutation brings is in canonical order already, and both evaluators agree on it."""
    compared = 0
    with mpmath.workdps(40):
        for program, coefficients in random_graphs(200):
            graph = program.to_graph(coefficients)
            again, values = Program.from_graph(graph)
            assert again == program  # canonical already
            x = mpmath.mpf("0.7312")
            try:
                expected = value(graph, x)
            except ZeroDivisionError:
                continue
            if not mpmath.isfinite(expected):
                continue
            compared += 1
            found = again(np.array([x], dtype=object), [mpmath.mpf(v) for v in values])[0]
            assert abs(found - expected) <= abs(expected) * mpmath.mpf(10) ** -30
    assert compared > 100


def test_simplified_graphs_are_equal_functions():
    x = Node("x")
    graphs = [
        2.0 - ((x + 3.0) - 4.0),
        (5.0 / (x * 2.0)) * 3.0 - (x * 2.0) * 4.0,
        (x / 2.0 - 3.0 / x) + (x - x) + x / x,
        Node("fma", [coefficient(2.0), coefficient(3.0), x]) - 1.0 / (2.0 / (x * 3.0)),
    ]
    with mpmath.workdps(40):
        for graph in graphs:
            simple = simplify(graph)
            assert cost(simple) < cost(graph)
            at = mpmath.mpf("0.37")
            assert abs(value(simple, at) - value(graph, at)) < 1e-14  # coefficients are folded in float64


def test_mutations_keep_the_rules():
    rng = np.random.default_rng(1)
    program, coefficients = Program.from_graph(ten_operations(*map(float, C)))
    sizes = set()
    for weights in (PAPER_WEIGHTS, WEIGHTS):
        for _ in range(100):
            child, values = mutate(program, coefficients, rng, max_ops=11, weights=weights)
            sizes.add(child.ops)
            assert child != program
            assert child.ops <= 11
            assert len(values) == child.num_coefficients
            assert {step.op for step in child.steps} <= {"+", "-", "*", "/"}
    assert min(sizes) < 10 < max(sizes)
    grown, _ = mutate(Program([]), np.zeros(0), rng)  # the identity can only grow
    assert grown.ops >= 1


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([("%", (0, 0))], "op must be one of"),
        ([("+", (0,))], r"step 1: \+ takes 2 operands, got 1"),
        ([("+", (0, 1))], "step 1 must use steps 1 to 0"),
        ([("*", (0, 0)), ("+", (1, -2))], "step 2 must use steps 1 to 1"),
    ],
)
def test_wrong_steps_are_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        Program(steps)


def test_dividing_by_zero_gives_infinity_in_every_arithmetic():
    program, _ = Program.from_graph(1.0 / (2.0 / Node("x") + 3.0))
    assert program(np.zeros(1), [1.0, 2.0, 3.0][: program.num_coefficients]).tolist() == [0.0]
    exact = program(np.array([mpmath.mpf(0)], dtype=object), [mpmath.mpf(1)] * program.num_coefficients)
    assert exact[0] == 0
