"""A few extreme eigenvalues and their eigenvectors, by thick-restart Lanczos."""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

from ._errors import NonFiniteCurvatureError
from ._krylov import breakdown_threshold, check_generator, combine, gaussian, orthogonalize, rotate_, unit
from .operator import CurvatureOperator

Which = Literal["LA", "SA", "LM"]


@dataclasses.dataclass(frozen=True)
class Eigenpairs:
    """Approximate eigenpairs; all but the vectors in float64 on the CPU.

    Attributes:
        eigenvalues: ``[k]``: descending for ``"LA"``, ascending for ``"SA"``, by descending magnitude for ``"LM"``.
        eigenvectors: Columns ``[n, k]`` of norm one, on the operator's device.
        residuals: Norms of ``A v - theta v``, ``[k]``: an eigenvalue lies within each.
        errors: Estimated errors of the eigenvalues, ``[k]``.
        converged: Whether each error is within the tolerance, ``[k]``.
        products: Products made.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    errors: Tensor
    converged: Tensor
    products: int


@register("tool", summary="Extreme eigenvalues and eigenvectors of a curvature operator")
def top_eigenpairs(
    operator: CurvatureOperator,
    k: int = 1,
    *,
    generator: torch.Generator,
    tol: float = 1e-3,
    max_products: int = 500,
    which: Which = "LA",
    basis_size: int | None = None,
) -> Eigenpairs:
    r"""The k largest or smallest eigenvalues with their eigenvectors.

    Stops when each eigenvalue's error is estimated to be at most ``tol`` times its magnitude. The estimate for a Ritz
    value :math:`\theta_i` with residual norm :math:`r_i` is :math:`\min(r_i, r_i^2 / g_i)`, where the gap :math:`g_i`
    is its distance to the nearest interval :math:`\theta_j \pm r_j` of another Ritz value (Temple and Kato; a bound
    where no eigenvalue hides from the Krylov space). Eigenvectors are accurate to about the root of ``tol`` only:
    where you need them, ask for less.

    Args:
        operator: Symmetric.
        k: Number of eigenpairs.
        generator: On the CPU: draws the start vector.
        tol: Relative accuracy of the eigenvalues.
        max_products: Stop here in any case; ``converged`` then says which eigenvalues are.
        which: ``"LA"`` largest, ``"SA"`` smallest, ``"LM"`` largest in magnitude.
        basis_size: Vectors to keep, default ``max(30, 2 k + 10)``: when they are full, the best half and the last
            residual start the next round.

    Returns:
        Eigenpairs, residuals and errors.

    Raises:
        ValueError: If an argument is out of range.
        NonFiniteCurvatureError: If a product holds NaN or infinity.

    Cost:
        A product, four passes over the basis and one transfer to the host a step; ``basis_size * n`` numbers.

    Example:
        >>> import torch
        >>> from lightning_opt.curvature import MatrixOperator, top_eigenpairs
        >>> a = MatrixOperator(torch.diag(torch.arange(200.0)))
        >>> pairs = top_eigenpairs(a, 2, tol=1e-6, generator=torch.Generator().manual_seed(0))
        >>> [round(float(x), 3) for x in pairs.eigenvalues]
        [199.0, 198.0]
    """
    check_interval("k", k, 1, operator.size)
    check_interval("tol", tol, 0, closed="()")
    check_interval("max_products", max_products, k)
    check_choice("which", which, ["LA", "SA", "LM"])
    check_generator(generator)
    if basis_size is not None:
        check_interval("basis_size", basis_size, k + 2)
    rows = min(basis_size or max(30, 2 * k + 10), max_products, operator.size)
    basis = torch.empty(rows, operator.size, dtype=operator.dtype, device=operator.device)
    basis[0] = unit(gaussian(operator, generator))
    projected = torch.zeros(rows, rows, dtype=torch.float64)
    filled, products, scale = 0, 0, 0.0
    invariant = torch.empty(0)  # the wanted values of the last invariant subspace
    while True:
        w = operator @ basis[filled]
        products += 1
        filled += 1
        components = orthogonalize(w, basis[:filled])
        components += orthogonalize(w, basis[:filled])
        # one transfer a step
        column = torch.cat([components, torch.linalg.vector_norm(w).unsqueeze(0)]).to("cpu", torch.float64)
        if not bool(column.isfinite().all()):
            raise NonFiniteCurvatureError(f"product {products} of the Lanczos process holds NaN or infinity")
        projected[filled - 1, :filled] = projected[:filled, filled - 1] = column[:-1]
        beta = float(column[-1])
        scale = max(scale, float(column.abs().max()))
        if beta <= breakdown_threshold(operator.dtype) * scale:
            beta = 0.0
        values, vectors = torch.linalg.eigh(projected[:filled, :filled])
        residuals = beta * vectors[-1].abs()
        errors = _errors(values, residuals)
        order = _order(values, which)
        wanted = order[:k]
        converged = errors[wanted] <= tol * values[wanted].abs()
        enough = filled >= k and bool(converged.all())
        if beta == 0.0 and k > 1:  # a Krylov space sees one copy of a multiple eigenvalue: wait for one without news
            enough = (
                enough and len(invariant) == k and bool(torch.allclose(invariant, values[wanted], atol=tol * scale))
            )
            invariant = values[wanted]
        if enough or filled == operator.size or products >= max_products:
            break
        if filled == rows:
            filled = k + (rows - k) // 2
            kept = order[:filled]
            rotate_(basis, vectors[:, kept])
            projected.zero_()
            projected[range(filled), range(filled)] = values[kept]
        if beta == 0.0:  # an invariant subspace: look outside of it
            w = gaussian(operator, generator)
            orthogonalize(w, basis[:filled])
            orthogonalize(w, basis[:filled])
            beta = float(torch.linalg.vector_norm(w))
        basis[filled] = w.div_(beta)
    return Eigenpairs(
        eigenvalues=values[wanted],
        eigenvectors=combine(basis[: len(values)], vectors[:, wanted]),
        residuals=residuals[wanted],
        errors=errors[wanted],
        converged=converged,
        products=products,
    )


def _errors(values: Tensor, residuals: Tensor) -> Tensor:
    # nothing is known of eigenvalues beyond a single Ritz value
    gaps = (values[:, None] - values).abs() - residuals
    gaps.fill_diagonal_(math.inf if len(values) > 1 else 0.0)
    gap = gaps.min(dim=1).values
    return torch.where(gap > residuals, residuals**2 / gap.clamp_min(torch.finfo(gap.dtype).tiny), residuals)


def _order(values: Tensor, which: Which) -> Tensor:
    if which == "LM":
        return values.abs().argsort(descending=True)
    return values.argsort(descending=which == "LA")
