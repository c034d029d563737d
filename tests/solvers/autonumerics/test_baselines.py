"""Remez' exchange: equioscillation, known errors, and what the forms cost."""

import math

import mpmath
import numpy as np
import pytest

from lightning_opt.solvers.autonumerics import Problem
from lightning_opt.solvers.autonumerics.baselines import baselines, minimax_polynomial, minimax_rational, taylor


def relative_errors(baseline, x: np.ndarray) -> np.ndarray:
    quotient = np.polynomial.Polynomial(baseline.numerator)(x) / np.polynomial.Polynomial(baseline.denominator)(x)
    return quotient / np.exp2(x) - 1


@pytest.mark.parametrize(("degree", "known"), [(3, 1.0e-4), (4, 2.8e-6), (5, 9.1e-8), (6, 2.0e-9), (7, 4.7e-11)])
def test_known_errors_of_exp2_with_the_constant_kept(degree, known):
    """On [-1/2, 1/2], p(0) = 1; known to two digits."""
    found = minimax_polynomial(Problem("exp2", (-0.5, 0.5)), degree, constant=1.0)
    assert found.max_error == pytest.approx(known, rel=0.06)
    assert found.numerator[0] == 1.0
    assert found.ops == 2 * degree
    errors = relative_errors(found, np.array(found.extrema))
    assert len(errors) == degree + 1
    np.testing.assert_allclose(np.abs(errors), found.max_error, rtol=1e-4)
    turned = errors * np.sign(found.extrema)
    assert (turned[1:] * turned[:-1] < 0).all()  # the sign does not turn across 0, where the error vanishes


@pytest.mark.parametrize("degree", [1, 3, 6])
def test_the_error_of_a_minimax_polynomial_equioscillates(degree):
    found = minimax_polynomial(Problem("exp2", (0.0, 1.0)), degree)
    errors = relative_errors(found, np.array(found.extrema))
    assert len(errors) == degree + 2
    np.testing.assert_allclose(np.abs(errors), found.max_error, rtol=1e-4)
    assert (errors[1:] * errors[:-1] < 0).all()
    grid = relative_errors(found, np.linspace(0, 1, 3001))
    assert abs(grid).max() <= found.max_error * (1 + 1e-6)


def test_the_best_line_in_closed_form():
    """For exp on [0, 1], absolute: slope e - 1, error half the gap between chord and parallel tangent."""
    found = minimax_polynomial(Problem("exp", (0.0, 1.0), "absolute"), 1)
    slope = math.e - 1
    assert found.numerator[1] == pytest.approx(slope, rel=1e-6)
    assert found.max_error == pytest.approx((1 - slope + slope * math.log(slope)) / 2, rel=1e-6)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 2), (3, 2)])
def test_the_error_of_a_minimax_rational_equioscillates(m, n):
    found = minimax_rational(Problem("exp2", (0.0, 1.0)), m, n)
    errors = relative_errors(found, np.array(found.extrema))
    assert len(errors) == m + n + 2
    np.testing.assert_allclose(np.abs(errors), found.max_error, rtol=1e-4)
    assert (errors[1:] * errors[:-1] < 0).all()


def test_a_rational_function_is_found_to_be_one():
    found = minimax_rational(Problem("(1 + x) / (3 + 2 * x)", (0.0, 1.0)), 1, 1)
    assert found.max_error < 1e-15


def test_the_taylor_polynomial():
    found = taylor(Problem("exp", (-1.0, 1.0)), 4)
    np.testing.assert_allclose(found.numerator, [1, 1, 1 / 2, 1 / 6, 1 / 24], rtol=1e-12)
    low = sum((-1.0) ** k / math.factorial(k) for k in range(5))
    assert found.max_error == pytest.approx(low / math.exp(-1) - 1, rel=1e-9)
    about_a_half = taylor(Problem("exp", (0.0, 1.0)), 1)  # sqrt(e) (x + 1/2)
    np.testing.assert_allclose(about_a_half.numerator, [math.exp(0.5) / 2, math.exp(0.5)], rtol=1e-12)


def test_a_function_known_in_float64_has_no_taylor_polynomial_but_a_minimax_one():
    problem = Problem(np.exp2, (0.0, 1.0))
    with pytest.raises(ValueError, match="too coarse for its derivatives"):
        taylor(problem, 2)
    expected = minimax_polynomial(Problem("exp2", (0.0, 1.0)), 3).max_error
    assert minimax_polynomial(problem, 3).max_error == pytest.approx(expected, rel=1e-6)
    assert {b.kind for b in baselines(problem, 4)} == {"minimax polynomial", "minimax rational"}


def test_costs_of_the_forms():
    """Counted on the forms written out: Horner's, and a0 + b1 / (x + a1 + b2 / (x + a2))."""
    problem = Problem("exp2", (0.0, 1.0))
    two_over_two = minimax_rational(problem, 2, 2)
    assert two_over_two.ops == 2 + 2 + 3 + 1  # (a x + b) x + c, (x + d) x + e, /
    assert two_over_two.ops_as_fraction == 6  # + / + + / +
    three_over_two = minimax_rational(problem, 3, 2)
    assert three_over_two.ops == 10
    assert three_over_two.ops_as_fraction == 8  # a1 * x more
    assert max(b.ops_as_fraction for b in baselines(problem, 6)) <= 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: minimax_polynomial(p, -1), "degree must be >= 0"),
        (lambda p: minimax_polynomial(p, 0, constant=1.0), "degree must be >= 1"),
        (lambda p: minimax_rational(p, 1, 0), "denominator_degree must be >= 1"),
        (lambda p: taylor(p, -1), "degree must be >= 0"),
    ],
)
def test_wrong_degrees_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(Problem("exp2", (0.0, 1.0)))


def test_baselines_leave_the_working_precision_as_it_was():
    before = mpmath.mp.dps
    baselines(Problem("exp2", (0.0, 1.0)), 4)
    assert mpmath.mp.dps == before
