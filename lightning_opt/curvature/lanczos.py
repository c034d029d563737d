"""The Lanczos process: extreme eigenvalues and a quadrature rule from few products with a symmetric operator."""

import dataclasses
import math

import torch
from torch import Tensor

from lightning_opt._checks import check_interval
from lightning_opt.registry import register

from ._errors import NonFiniteCurvatureError
from ._krylov import breakdown_threshold, check_generator, combine, gaussian, orthogonalize, unit
from .operator import CurvatureOperator


@dataclasses.dataclass(frozen=True)
class LanczosResult:
    """What m Lanczos steps know of an operator; all but the basis in float64 on the CPU.

    Attributes:
        alphas: Diagonal of the tridiagonal matrix, ``[m]``.
        betas: Its off-diagonal ``[m - 1]``, and as the last entry the norm of the residual that step m left.
        ritz_values: Its eigenvalues, ascending ``[m]``: the approximate eigenvalues.
        weights: Squared first components of its eigenvectors, ``[m]``, sum 1: with the Ritz values a Gauss quadrature
            of the spectrum as the start vector sees it, exact for polynomials of degree 2m - 1.
        residuals: Norms of ``A v - theta v`` of the Ritz pairs, ``[m]``: an eigenvalue lies within each of them.
        steps: m; less than asked for where the process broke down or the operator is smaller.
        products: Products made, equal to m.
        breakdown: Whether the start vector lies in an invariant subspace, so that the Ritz values are eigenvalues.
    """

    alphas: Tensor
    betas: Tensor
    ritz_values: Tensor
    weights: Tensor
    residuals: Tensor
    steps: int
    products: int
    breakdown: bool
    _basis: Tensor | None = dataclasses.field(default=None, repr=False)
    _coordinates: Tensor | None = dataclasses.field(default=None, repr=False)

    def ritz_vectors(self, k: int = 1) -> Tensor:
        """The approximate eigenvectors of the k largest Ritz values, largest first: columns ``[n, k]`` of norm one.

        Raises:
            ValueError: If k is above the number of steps, or no basis was kept.
        """
        if self._basis is None or self._coordinates is None:
            raise ValueError("no basis was kept: run lanczos with reorthogonalize=True")
        check_interval("k", k, 1, self.steps)
        top = self._coordinates[:, -k:].flip(1)
        return combine(self._basis, top)


@register("tool", summary="Ritz values and quadrature weights of a curvature operator")
def lanczos(
    operator: CurvatureOperator,
    num_steps: int,
    *,
    generator: torch.Generator,
    start: Tensor | None = None,
    reorthogonalize: bool = True,
    basis_dtype: torch.dtype | None = None,
) -> LanczosResult:
    """Run the Lanczos process from a random vector.

    Args:
        operator: Symmetric.
        num_steps: Products to make; at most n are.
        generator: On the CPU: the Gaussian start vector is drawn there, the same on every device and rank.
        start: Start vector ``[n]`` to use instead of a random one.
        reorthogonalize: Keep the basis and orthogonalize twice against all of it. Without, three vectors are kept, and
            with rounding the largest eigenvalues come back as spurious copies after some 15 steps in float32: extreme
            values and the quadrature stay accurate, weights split among the copies.
        basis_dtype: Store the basis in a narrower dtype such as ``torch.bfloat16``; arithmetic stays in the operator's.

    Returns:
        Ritz values, weights and residuals.

    Raises:
        ValueError: If ``num_steps`` is below 1, the start vector does not fit or is zero, or the generator is not on
            the CPU.
        NonFiniteCurvatureError: If a product holds NaN or infinity.

    Cost:
        ``num_steps`` products, each followed by four passes over the basis of at most ``num_steps * n`` numbers, and by
        one transfer of two numbers to the host.

    Example:
        >>> import torch
        >>> from lightning_opt.curvature import MatrixOperator, lanczos
        >>> a = MatrixOperator(torch.diag(torch.tensor([5.0, 2.0, 2.0, -1.0], dtype=torch.float64)))
        >>> result = lanczos(a, 4, generator=torch.Generator().manual_seed(0))
        >>> result.steps, result.ritz_values.round(decimals=6).tolist()  # three distinct eigenvalues
        (3, [-1.0, 2.0, 5.0])
    """
    check_interval("num_steps", num_steps, 1)
    check_generator(generator)
    q = unit(gaussian(operator, generator) if start is None else _fitting(operator, start))
    steps = min(num_steps, operator.size)
    basis = None
    if reorthogonalize:
        basis = torch.empty(steps, operator.size, dtype=basis_dtype or operator.dtype, device=operator.device)
    alphas: list[float] = []
    betas: list[float] = []
    scale = 0.0
    breakdown = False
    previous = torch.zeros_like(q)
    for step in range(steps):
        w = operator @ q
        if basis is None:
            w.sub_(previous, alpha=betas[-1] if betas else 0.0)
            alpha = torch.dot(q, w)
            w.sub_(alpha * q)
        else:
            basis[step] = q
            alpha = torch.dot(q, w)
            for _ in range(2):
                orthogonalize(w, basis[: step + 1])
        # one transfer a step
        values = torch.stack([alpha, torch.linalg.vector_norm(w)]).tolist()
        if not all(map(math.isfinite, values)):
            raise NonFiniteCurvatureError(f"product {step + 1} of the Lanczos process holds NaN or infinity")
        alphas.append(values[0])
        betas.append(values[1])
        scale = max(scale, abs(values[0]), values[1])
        if values[1] <= breakdown_threshold(operator.dtype) * scale:
            breakdown = True
            break
        previous, q = q, w.div_(values[1])
    return _result(alphas, betas, breakdown, basis)


def _fitting(operator: CurvatureOperator, start: Tensor) -> Tensor:
    if start.shape != (operator.size,):
        raise ValueError(f"start must be a vector [{operator.size}], got shape {list(start.shape)}")
    return start.detach().to(operator.device, operator.dtype)


def _result(alphas: list[float], betas: list[float], breakdown: bool, basis: Tensor | None) -> LanczosResult:
    m = len(alphas)
    diagonal = torch.tensor(alphas, dtype=torch.float64)
    couplings = torch.tensor(betas, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(
        torch.diag(diagonal) + torch.diag(couplings[:-1], 1) + torch.diag(couplings[:-1], -1)
    )
    return LanczosResult(
        alphas=diagonal,
        betas=couplings,
        ritz_values=values,
        weights=vectors[0] ** 2,
        residuals=couplings[-1] * vectors[-1].abs(),
        steps=m,
        products=m,
        breakdown=breakdown,
        _basis=None if basis is None else basis[:m],
        _coordinates=None if basis is None else vectors,
    )
