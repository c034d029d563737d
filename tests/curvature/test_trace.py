import math

import numpy as np
import pytest
import torch

from lightning_opt.curvature import MatrixOperator, NonFiniteCurvatureError, hutchinson_trace, xtrace
from tests.reference import curvature as reference

from .test_lanczos import generator, rotated, symmetric

F64 = torch.float64


def signs(n, k, seed):
    """The vectors that an estimator draws."""
    g = generator(seed)
    return torch.stack([torch.randint(0, 2, (n,), generator=g, dtype=torch.int8).double() * 2 - 1 for _ in range(k)], 1)


def test_hutchinson_is_the_mean_over_random_signs():
    a = symmetric(30)
    estimate = hutchinson_trace(MatrixOperator(a), 8, generator=generator(3))
    samples = (signs(30, 8, 3) * (a @ signs(30, 8, 3))).sum(dim=0)
    assert estimate.products == 8
    assert estimate.value == pytest.approx(float(samples.mean()), rel=1e-12)
    assert estimate.stderr == pytest.approx(float(samples.std()) / math.sqrt(8), rel=1e-12)
    assert math.isnan(hutchinson_trace(MatrixOperator(a), 1, generator=generator()).stderr)


@pytest.mark.parametrize("products", [4, 20])
def test_xtrace_is_the_naive_one(products):
    """One decomposition and corrections of rank one, for one decomposition a vector."""
    a = rotated(0.8 ** np.arange(40) * (-1.0) ** np.arange(40))
    estimate = xtrace(MatrixOperator(a), products, generator=generator(1))
    expected = reference.xtrace(a.numpy(), signs(40, products // 2, 1).numpy())
    np.testing.assert_allclose(estimate.samples, expected, atol=1e-12)
    assert estimate.stderr == pytest.approx(expected.std(ddof=1) / math.sqrt(products // 2), rel=1e-9)


@pytest.mark.parametrize(("estimator", "products", "accuracy"), [(hutchinson_trace, 100, 0.15), (xtrace, 100, 0.01)])
def test_standard_errors_cover_the_trace(matrix, estimator, products, accuracy):
    """In at least 80% of 50 seeds the trace lies within two of them.

    A normal distribution has 95%, XTrace 89% here, over 300 seeds; the standard deviation of that share over 50 seeds
    is 4%.
    """
    operator = MatrixOperator(matrix)
    exact = float(matrix.trace())
    estimates = [estimator(operator, products, generator=generator(seed)) for seed in range(50)]
    covered = [abs(e.value - exact) <= 2 * e.stderr for e in estimates]
    assert sum(covered) >= 40
    errors = np.array([e.value - exact for e in estimates])
    # honest in size, not only wide
    assert 0.6 < np.sqrt(np.mean([e.stderr**2 for e in estimates])) / np.sqrt((errors**2).mean()) < 1.5
    assert np.sqrt((errors**2).mean()) < accuracy * exact


def test_xtrace_of_a_low_rank_is_exact():
    a = rotated([3.0, 2.0, -1.0] + [0.0] * 37)
    estimate = xtrace(MatrixOperator(a), 20, generator=generator())
    assert estimate.value == pytest.approx(4.0, abs=1e-12)
    assert estimate.stderr == 0.0
    assert xtrace(MatrixOperator(torch.zeros(5, 5)), 4, generator=generator()).value == 0.0


def test_float32(matrix):
    operator = MatrixOperator(matrix.float())
    for estimator in (hutchinson_trace, xtrace):
        wide = estimator(MatrixOperator(matrix), 40, generator=generator())
        assert estimator(operator, 40, generator=generator()).value == pytest.approx(wide.value, rel=1e-4)


def test_wrong_arguments_and_products():
    a = MatrixOperator(symmetric(20))
    with pytest.raises(ValueError, match="num_probes must be >= 1"):
        hutchinson_trace(a, 0, generator=generator())
    with pytest.raises(ValueError, match=r"num_products must be in \[4, 40\], got 42"):
        xtrace(a, 42, generator=generator())
    with pytest.raises(ValueError, match="num_products must be even, got 7"):
        xtrace(a, 7, generator=generator())
    a.matrix[0, 0] = math.nan
    for estimator in (hutchinson_trace, xtrace):
        with pytest.raises(NonFiniteCurvatureError):
            estimator(a, 4, generator=generator())
