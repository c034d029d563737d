import numpy as np
import pytest
import torch
from torch.nn import functional

from lightning_opt.curvature import HessianOperator, LanczosResult, MatrixOperator, NonFiniteCurvatureError, lanczos
from tests.reference.curvature import tridiagonal

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def symmetric(n, seed=0):
    a = torch.randn(n, n, generator=generator(seed), dtype=F64)
    return a + a.T


def rotated(eigenvalues, seed=0):
    q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator(seed), dtype=F64))
    return q @ torch.diag(torch.as_tensor(eigenvalues, dtype=F64)) @ q.T


def test_top_ten_eigenvalues_of_a_network(thousand, matrix):
    """To 1e-8 of numpy's, of the Hessian that torch.func forms."""
    net, x, y = thousand
    exact = np.linalg.eigh(matrix.numpy())
    operator = HessianOperator(lambda b: functional.cross_entropy(net(b[0]), b[1]), net.parameters(), [(x, y)])
    result = lanczos(operator, 60, generator=generator())
    top = exact.eigenvalues[::-1][:10]
    assert operator.size == 945
    assert operator.products == result.products == result.steps == 60
    assert abs(result.ritz_values.flip(0)[:10].numpy() / top - 1).max() < 1e-8
    vectors = result.ritz_vectors(5).numpy()
    overlap = abs((vectors * exact.eigenvectors[:, ::-1][:, :5]).sum(axis=0))
    assert overlap.min() > 1 - 1e-8


def test_float32_is_as_exact_as_its_products(thousand, matrix):
    net, x, y = thousand
    operator = MatrixOperator(matrix.float())
    exact = torch.linalg.eigvalsh(operator.matrix.double())
    for options in ({}, {"reorthogonalize": False}):
        result = lanczos(operator, 40, generator=generator(), **options)
        # rounding of 6e-8 in each of some forty operations
        assert abs(float(result.ritz_values[-1] / exact[-1]) - 1) < 2e-6
    assert result.ritz_values.dtype == F64


@pytest.mark.parametrize("options", [{}, {"reorthogonalize": False}])
def test_tridiagonal_matrix_of_the_krylov_space(options):
    a = symmetric(30)
    start = torch.randn(30, generator=generator(1), dtype=F64)
    result = lanczos(MatrixOperator(a), 6, generator=generator(), start=3 * start, **options)
    alphas, betas = tridiagonal(a.numpy(), start.numpy(), 6)
    # the Krylov matrix of the reference has a condition number near 1e3
    np.testing.assert_allclose(result.alphas, alphas, atol=1e-10)
    np.testing.assert_allclose(result.betas[:-1], betas, atol=1e-10)
    assert result.betas.shape == (6,)


def test_weights_are_a_quadrature_rule():
    """v^T A^k v of the start vector, exact up to order 2m - 1 and not beyond."""
    a = symmetric(30) / 10
    v = torch.randn(30, generator=generator(1), dtype=F64)
    v /= v.norm()
    result = lanczos(MatrixOperator(a), 4, generator=generator(), start=v)
    for k in range(9):
        exact = float(v @ torch.linalg.matrix_power(a, k) @ v)
        rule = float((result.weights * result.ritz_values**k).sum())
        assert (abs(rule - exact) < 1e-12) == (k <= 7)


def test_residuals_are_those_of_the_ritz_pairs():
    a = symmetric(40)
    result = lanczos(MatrixOperator(a), 12, generator=generator())
    vectors = result.ritz_vectors(12).flip(1)
    residuals = torch.linalg.vector_norm(a @ vectors - vectors * result.ritz_values, dim=0)
    torch.testing.assert_close(result.residuals, residuals, rtol=1e-10, atol=1e-10)
    eigenvalues = torch.linalg.eigvalsh(a)
    distance = (result.ritz_values[:, None] - eigenvalues).abs().min(dim=1).values
    assert (distance <= result.residuals + 1e-12).all()
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(12, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("options", [{}, {"reorthogonalize": False}])
def test_breakdown_on_few_distinct_eigenvalues(dtype, options):
    eigenvalues = [5.0] * 20 + [1.0] * 19 + [-2.0]
    operator = MatrixOperator(rotated(eigenvalues).to(dtype))
    result = lanczos(operator, 30, generator=generator(), **options)
    assert result.breakdown
    assert operator.products == result.steps == 3
    np.testing.assert_allclose(result.ritz_values, [-2, 1, 5], atol=1e-5 if dtype == torch.float32 else 1e-12)
    assert result.residuals.max() < (1e-5 if dtype == torch.float32 else 1e-12)


def test_zero_and_one_dimensional_operators():
    zero = lanczos(MatrixOperator(torch.zeros(5, 5)), 3, generator=generator())
    assert (zero.steps, zero.ritz_values.tolist(), zero.weights.tolist()) == (1, [0.0], [1.0])
    one = lanczos(MatrixOperator(torch.full((1, 1), 7.0)), 10, generator=generator())
    assert (one.steps, one.ritz_values.tolist()) == (1, [7.0])


def test_as_many_steps_as_dimensions():
    a = symmetric(12)
    result = lanczos(MatrixOperator(a), 50, generator=generator())
    assert result.steps == 12
    torch.testing.assert_close(result.ritz_values, torch.linalg.eigvalsh(a), rtol=1e-10, atol=1e-10)


def test_reorthogonalization_keeps_copies_out():
    """One large eigenvalue converges early; without reorthogonalization it comes back as a copy."""
    a = MatrixOperator(rotated([1e3, 200.0, *np.linspace(0, 1, 198)]).float())
    full = lanczos(a, 40, generator=generator())
    lean = lanczos(a, 40, generator=generator(), reorthogonalize=False)
    assert int((full.ritz_values > 100).sum()) == 2
    assert int((lean.ritz_values > 100).sum()) > 2
    # the extreme value and the quadrature stay
    assert float(lean.ritz_values[-1]) == pytest.approx(float(full.ritz_values[-1]), rel=1e-5)
    assert float((lean.weights * lean.ritz_values).sum()) == pytest.approx(
        float((full.weights * full.ritz_values).sum()), rel=1e-4
    )


def test_basis_in_bfloat16(matrix):
    """Half the memory for orthogonality to 8 bits: the large Ritz values keep three digits."""
    operator = MatrixOperator(matrix.float())
    exact = torch.linalg.eigvalsh(matrix)
    result = lanczos(operator, 20, generator=generator(), basis_dtype=torch.bfloat16)
    assert result._basis.dtype == torch.bfloat16
    assert abs(float(result.ritz_values[-1] / exact[-1]) - 1) < 1e-3
    assert result.ritz_vectors(1).dtype == torch.float32


def test_generator_decides_all():
    a = MatrixOperator(symmetric(20))
    state = torch.get_rng_state()
    first, same, other = (lanczos(a, 5, generator=generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.ritz_values, same.ritz_values)
    assert torch.equal(first.weights, same.weights)
    assert not torch.equal(first.ritz_values, other.ritz_values)
    assert torch.equal(torch.get_rng_state(), state)
    # float32 draws the numbers that it would draw on any device
    drawn = torch.randn(20, generator=generator(), dtype=torch.float32)
    given = lanczos(MatrixOperator(a.matrix.float()), 5, generator=generator(), start=drawn)
    assert torch.equal(given.alphas, lanczos(MatrixOperator(a.matrix.float()), 5, generator=generator()).alphas)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_products_that_are_not_finite(value):
    a = symmetric(20)
    a[3, 3] = value
    with pytest.raises(NonFiniteCurvatureError, match="product 1 "):
        lanczos(MatrixOperator(a), 5, generator=generator())


def test_wrong_arguments():
    a = MatrixOperator(symmetric(20))
    with pytest.raises(ValueError, match="num_steps must be >= 1 and finite, got 0"):
        lanczos(a, 0, generator=generator())
    with pytest.raises(ValueError, match=r"start must be a vector \[20\], got shape \[19\]"):
        lanczos(a, 2, generator=generator(), start=torch.ones(19))
    with pytest.raises(ValueError, match="start must have a positive, finite norm, got 0"):
        lanczos(a, 2, generator=generator(), start=torch.zeros(20))
    result = lanczos(a, 5, generator=generator())
    assert isinstance(result, LanczosResult)
    with pytest.raises(ValueError, match=r"k must be in \[1, 5\], got 6"):
        result.ritz_vectors(6)
    with pytest.raises(ValueError, match="no basis was kept"):
        lanczos(a, 5, generator=generator(), reorthogonalize=False).ritz_vectors()
