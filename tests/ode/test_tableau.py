from fractions import Fraction

import numpy as np
import pytest

from lightning_opt.ode import BOSH3, DOPRI5, TSIT5, find_tableau
from lightning_opt.ode.tableau import TABLEAUS
from tests.reference.runge_kutta import density, elementary_weight, size, stage_weights, trees

PAIRS = list(TABLEAUS.values())
RATIONAL = [pair for pair in PAIRS if pair is not TSIT5]

# Decimals of Tsit5 are published to 16 to 19 digits, and weights are up to 3.3, stages' weights up to 13: a condition
# of order 5 sums at most 6 products of 5 such factors below 60, each off by 5e-17 relative to its digits.
PUBLISHED = 2e-14


def residuals(pair, weights, order):
    return [elementary_weight(tree, pair.a, weights) - Fraction(1, density(tree)) for tree in trees(order)]


def test_there_are_as_many_trees_as_there_should_be():
    assert [len(trees(n)) for n in range(1, 7)] == [1, 1, 2, 4, 9, 20]


@pytest.mark.parametrize("pair", RATIONAL, ids=lambda pair: pair.name)
def test_order_conditions_hold_exactly(pair):
    embedded = [b - e for b, e in zip(pair.b, pair.error, strict=True)]
    for order in range(1, pair.order + 1):
        assert all(r == 0 for r in residuals(pair, pair.b, order)), order
    for order in range(1, pair.order):
        assert all(r == 0 for r in residuals(pair, embedded, order)), order
    assert any(residuals(pair, pair.b, pair.order + 1))
    assert any(residuals(pair, embedded, pair.order))
    assert all(sum(row, Fraction(0)) == c for row, c in zip(pair.a, pair.c, strict=True))


def test_order_conditions_of_tsit5_hold_to_the_digits_that_were_published():
    embedded = [b - e for b, e in zip(TSIT5.b, TSIT5.error, strict=True)]
    for order in range(1, 6):
        assert max(abs(r) for r in residuals(TSIT5, TSIT5.b, order)) < PUBLISHED
    for order in range(1, 5):
        assert max(abs(r) for r in residuals(TSIT5, embedded, order)) < PUBLISHED
    assert max(abs(r) for r in residuals(TSIT5, TSIT5.b, 6)) > 1e-4
    assert max(abs(r) for r in residuals(TSIT5, embedded, 5)) > 1e-4
    assert max(abs(sum(row, Fraction(0)) - c) for row, c in zip(TSIT5.a, TSIT5.c, strict=True)) < PUBLISHED


@pytest.mark.parametrize(("pair", "principal"), [(TSIT5, 5.822e-4), (DOPRI5, 2.630e-4)], ids=["tsit5", "dopri5"])
def test_the_error_estimate_begins_with_its_order(pair, principal):
    moments = [sum(e * c**q for e, c in zip(pair.error, pair.c, strict=True)) for q in range(5)]
    assert max(abs(m) for m in moments[:4]) < 1e-16
    assert abs(moments[4]) == pytest.approx(principal, rel=2e-4)  # Hairer's weights; torchdiffeq's are 2/3 of them


@pytest.mark.parametrize(("pair", "order"), [(TSIT5, 4), (DOPRI5, 4), (BOSH3, 3)], ids=["tsit5", "dopri5", "bosh3"])
def test_dense_weights_have_their_order_at_every_point_and_end_in_the_step(pair, order):
    bound = 0 if pair is not TSIT5 else 1e-12  # published to fewer digits: 13 behind the point at least
    for theta in (Fraction(1, 7), Fraction(1, 2), Fraction(9, 10)):
        weights = [sum(w * theta ** (i + 1) for i, w in enumerate(row)) for row in pair.dense]
        for n in range(1, order + 1):
            for tree in trees(n):
                value = sum(w * x for w, x in zip(weights, stage_weights(tree, pair.a), strict=True))
                assert abs(value - theta**n / density(tree)) <= bound, (theta, tree)
    assert max(abs(sum(row) - b) for row, b in zip(pair.dense, pair.b, strict=True)) <= bound


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_stability_size_is_where_steps_begin_to_grow(pair):
    a = np.array([[float(x) for x in row] + [0.0] * (pair.stages - len(row)) for row in pair.a])
    b = np.array([float(x) for x in pair.b])

    def growth(z):
        return 1 + z * b @ np.linalg.solve(np.eye(pair.stages) - z * a, np.ones(pair.stages))

    s = pair.stability_size
    assert abs(growth(-s)) == pytest.approx(1, abs=1e-9)
    assert all(abs(growth(-x)) < 1 for x in np.linspace(0.01, 0.99 * s, 200))
    assert abs(growth(-1.01 * s)) > 1


def test_names():
    assert [pair.first_same_as_last for pair in (TSIT5, DOPRI5, BOSH3)] == [True] * 3
    assert not find_tableau("fehlberg45").first_same_as_last
    assert all(size(tree) == 4 for tree in trees(4))
    with pytest.raises(ValueError, match=r"tableau must be one of .* Did you mean 'dopri5'"):
        find_tableau("dopri")
