"""Measuring: what an error is, and poles between the points."""

import math

import mpmath
import numpy as np
import pytest

from lightning_opt.solvers.autonumerics import Problem, Program
from lightning_opt.solvers.autonumerics.functions import target
from lightning_opt.solvers.autonumerics.graph import Node, coefficient


@pytest.mark.parametrize(
    ("error", "expected"), [("absolute", 0.25), ("relative", 0.25), ("ulp32", 0.25 * 2**23)]
)  # at x = 0, where the function is 1 and the spacing of float32 2^-23
def test_the_three_measures(error, expected):
    program, values = Program.from_graph(Node("x") * 1.0 + 1.25)
    problem = Problem("exp2", (0.0, 1.0), error)
    assert abs(problem.errors(program, values, np.array([0.0]))[0]) == pytest.approx(expected, rel=1e-12)


def test_ulps_are_of_the_float32_arithmetic():
    """A third in float32 is off by 1/3 ULP; x + 1e-9 is x there."""
    third, _ = Program.from_graph(Node("x") * 1.0)
    problem = Problem(lambda x: x / 3, (1.0, 2.0), "ulp32")
    found = problem.errors(third, np.array([1 / 3]), np.array([1.0]))[0]
    assert abs(found) == pytest.approx(1 / 3, abs=1e-6)
    shifted, _ = Program.from_graph(Node("x") + 1.0)
    assert Problem("x", (1.0, 2.0), "ulp32").max_error(shifted, np.array([1e-9])) == 0


@pytest.mark.parametrize("power", [1, 2])
def test_poles_between_the_points_are_found(power):
    """A line plus a pole too weak to be seen 1e-4 away from it."""
    x = Node("x")
    d = x - 0.30031415926
    pole = 1e-12 / (d if power == 1 else d * d + 0.0)
    program, values = Program.from_graph(x * 1.0 + 2.0 + pole)
    problem = Problem("x + 2", (0.0, 1.0), "absolute")
    assert problem.quick_error(program, values) < 1e-4
    assert problem.max_error(program, values) > 1.0


def test_a_division_by_zero_that_the_output_does_not_see_is_no_pole():
    x = Node("x")
    program, values = Program.from_graph(1.0 / (2.0 / x + 3.0))  # x / (2 + 3 x)
    problem = Problem("x / (2 + 3 * x)", (-0.5, 0.5), "absolute")
    assert problem.max_error(program, values) < 1e-15


def test_the_maximum_between_the_points_is_found():
    program, values = Program.from_graph(Node("x") * 1.0 + 0.0)
    problem = Problem("x + cos(200 * x + 1)", (0.0, 1.0), "absolute", points=8)
    assert problem.max_error(program, values) == pytest.approx(1.0, abs=1e-8)
    assert problem.quick_error(program, values) < 1 - 1e-6


def test_small_errors_are_measured_in_real_arithmetic():
    """1 + 1e-17 is 1 in float64."""
    program, values = Program.from_graph(Node("x") + 1e-17)
    assert Problem("x", (1.0, 2.0)).max_error(program, values) == pytest.approx(1e-17, rel=1e-9)


@pytest.mark.parametrize("name", ["exp2", "log2", "exp", "log", "sin", "cos", "tanh", "sqrt", "x * exp(-x) + pi / 4"])
def test_functions_are_the_same_in_both_arithmetics(name):
    function = target(name)
    x = np.linspace(*function.domain, 9)
    exact = function.exact_values(x)
    np.testing.assert_allclose(function.values(x), exact.astype(np.float64), rtol=4e-16, atol=1e-16)
    with mpmath.workdps(40):
        assert function.exact_value(mpmath.mpf("1.25")).context is mpmath.mp


def test_constants_of_expressions_have_40_digits():
    with mpmath.workdps(40):
        assert abs(target("x * pi").exact_value(mpmath.mpf(1)) - mpmath.pi) < mpmath.mpf(10) ** -38


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"domain": (1.0, 1.0)}, "domain must be two finite numbers"),
        ({"domain": (2.0, 1.0)}, "domain must be two finite numbers"),
        ({"domain": (0.0, math.inf)}, "domain must be two finite numbers"),
        ({"domain": (0.0, math.nan)}, "domain must be two finite numbers"),
        ({"function": "log2", "domain": (0.0, 1.0), "error": "absolute"}, "must be finite on the domain .* at x = 0"),
        ({"function": "log2", "domain": (-1.0, 1.0)}, "must be finite on the domain"),
        ({"function": lambda x: x * np.nan}, "must be finite on the domain"),
        ({"function": "sin", "domain": (-1.0, 1.0), "error": "relative"}, "has a zero"),
        ({"error": "relativ"}, "Did you mean 'relative'"),
        ({"function": "expp2"}, "Did you mean 'exp2'"),
        ({"function": "x +"}, "is no expression"),
        ({"function": "2 + 2"}, "does not depend on x"),
        ({"function": "__import__('os')"}, "no expression of x"),
        ({"function": "[y for y in x]"}, "no expression of x"),
        ({"function": "no_such_module:f"}, "there is no 'f' in a module 'no_such_module'"),
        ({"function": "math:pi"}, "not callable"),
        ({"function": 3}, "function must be a name"),
    ],
)
def test_wrong_problems_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Problem(**{"function": "exp2", **arguments})


def test_a_constant_program_is_allowed():
    program, values = Program.from_graph(coefficient(1.5))
    assert program(np.array([0.3]), values).tolist() == [1.5]
