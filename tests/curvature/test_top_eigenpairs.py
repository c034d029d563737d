import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from lightning_opt.curvature import HessianOperator, MatrixOperator, NonFiniteCurvatureError, top_eigenpairs

from .test_lanczos import generator, rotated, symmetric

F64 = torch.float64


def select(eigenvalues, which, k):
    key = {"LA": lambda x: -x, "SA": lambda x: x, "LM": lambda x: -abs(x)}[which]
    return np.array(sorted(eigenvalues.tolist(), key=key)[:k])


@pytest.mark.parametrize("basis_size", [None, 8])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_extreme_eigenpairs(which, k, basis_size):
    """Also with so small a basis that it must restart."""
    a = symmetric(200)
    operator = MatrixOperator(a)
    pairs = top_eigenpairs(operator, k, which=which, tol=1e-10, basis_size=basis_size, generator=generator())
    exact = select(torch.linalg.eigvalsh(a), which, k)
    assert pairs.converged.all()
    assert operator.products == pairs.products > (basis_size or 30)
    np.testing.assert_allclose(pairs.eigenvalues, exact, rtol=1e-10)
    residuals = torch.linalg.vector_norm(a @ pairs.eigenvectors - pairs.eigenvectors * pairs.eigenvalues, dim=0)
    torch.testing.assert_close(pairs.residuals, residuals, rtol=1e-5, atol=1e-10)
    assert pairs.eigenvectors.shape == (200, k)


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-6])
def test_tolerance_holds_for_the_eigenvalue_at_few_products(thousand, matrix, tol):
    net, x, y = thousand
    loss = lambda b: functional.cross_entropy(net(b[0]), b[1])  # noqa: E731
    exact = float(torch.linalg.eigvalsh(matrix)[-1])
    products = []
    for seed in range(10):
        operator = HessianOperator(loss, net.parameters(), [(x, y)])
        pairs = top_eigenpairs(operator, tol=tol, generator=generator(seed))
        assert abs(float(pairs.eigenvalues[0]) / exact - 1) < tol
        assert float(pairs.errors[0]) <= tol * exact
        assert abs(float(pairs.eigenvalues[0]) - exact) <= float(pairs.residuals[0])
        products.append(pairs.products)
    # the spectrum is known: a Krylov space needs about log(4 n / tol) / (4 sqrt(gap)) products
    eigenvalues = torch.linalg.eigvalsh(matrix)
    gap = float((eigenvalues[-1] - eigenvalues[-2]) / (eigenvalues[-2] - eigenvalues[0]))
    assert max(products) <= math.log(4 * 945 / tol) / (4 * math.sqrt(gap)) + 3


def test_multiple_eigenvalues_are_found_by_fresh_vectors():
    """Three copies of one, whose Krylov spaces have two dimensions."""
    a = MatrixOperator(rotated([4.0] * 3 + [1.0] * 37))
    pairs = top_eigenpairs(a, 4, generator=generator())
    np.testing.assert_allclose(pairs.eigenvalues, [4, 4, 4, 1], atol=1e-12)
    gram = pairs.eigenvectors.T @ pairs.eigenvectors
    torch.testing.assert_close(gram, torch.eye(4, dtype=F64), rtol=0, atol=1e-12)


def test_all_eigenpairs_of_a_small_operator():
    a = symmetric(6)
    pairs = top_eigenpairs(MatrixOperator(a), 6, generator=generator())
    np.testing.assert_allclose(pairs.eigenvalues.flip(0), torch.linalg.eigvalsh(a), atol=1e-12)
    assert pairs.products == 6


def test_stops_at_the_limit_and_says_so():
    pairs = top_eigenpairs(MatrixOperator(symmetric(200)), 2, tol=1e-12, max_products=7, generator=generator())
    assert pairs.products == 7
    assert pairs.converged.tolist() == [False, False]
    assert (pairs.errors > 1e-12 * pairs.eigenvalues).all()


def test_zero_operator():
    pairs = top_eigenpairs(MatrixOperator(torch.zeros(9, 9)), generator=generator())
    assert pairs.eigenvalues.tolist() == [0.0]
    assert pairs.converged.all()


def test_wrong_arguments_and_products():
    a = MatrixOperator(symmetric(20))
    for arguments, message in [
        ({"k": 0}, r"k must be in \[1, 20\], got 0"),
        ({"k": 21}, r"k must be in \[1, 20\], got 21"),
        ({"tol": 0.0}, "tol must be > 0"),
        ({"which": "LR"}, "which must be one of 'LA', 'SA', 'LM'"),
        ({"k": 3, "max_products": 2}, "max_products must be >= 3"),
        ({"k": 3, "basis_size": 4}, "basis_size must be >= 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            top_eigenpairs(a, **arguments, generator=generator())
    a.matrix[0, 0] = math.nan
    with pytest.raises(NonFiniteCurvatureError, match="product 1 "):
        top_eigenpairs(a, generator=generator())
