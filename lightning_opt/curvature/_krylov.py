"""What the Krylov methods share: start vectors that all devices and ranks draw alike, and work on a basis of rows."""

import math

import torch
from torch import Tensor

from .operator import CurvatureOperator

_COLUMNS = 1 << 20  # of a basis that are converted or combined at a time


def breakdown_threshold(dtype: torch.dtype) -> float:
    """The norm of a residual, relative to that of the operator, below which it is all rounding.

    Rounding leaves some 20 units; where it leaves more, the process goes on with a random direction that nothing is
    coupled to, which costs products but no accuracy. A larger threshold would cut off a bulk of small eigenvalues.
    """
    return 32 * torch.finfo(dtype).eps


def check_generator(generator: torch.Generator) -> None:
    """Raise ``ValueError`` unless the generator is on the CPU."""
    if generator.device.type != "cpu":
        raise ValueError(f"generator must be on the CPU, so that all devices draw alike, got {generator.device}")


def gaussian(operator: CurvatureOperator, generator: torch.Generator) -> Tensor:
    """A standard normal vector ``[n]``, drawn on the CPU."""
    dtype = torch.float64 if operator.dtype == torch.float64 else torch.float32
    return torch.randn(operator.size, generator=generator, dtype=dtype).to(operator.device, operator.dtype)


def rademacher(operator: CurvatureOperator, generator: torch.Generator) -> Tensor:
    """A vector ``[n]`` of random signs, drawn on the CPU."""
    bits = torch.randint(0, 2, (operator.size,), generator=generator, dtype=torch.int8)
    return bits.to(operator.device, operator.dtype).mul_(2).sub_(1)


def unit(vector: Tensor) -> Tensor:
    """The vector over its norm.

    Raises:
        ValueError: If the norm is zero or not finite.
    """
    norm = float(torch.linalg.vector_norm(vector))
    if not (norm > 0 and math.isfinite(norm)):
        raise ValueError(f"start must have a positive, finite norm, got {norm}")
    return vector / norm


def orthogonalize(w: Tensor, basis: Tensor) -> Tensor:
    """Take the components along the orthonormal rows of the basis out of ``w``, in place, and return them."""
    if basis.dtype == w.dtype:
        components = basis @ w
        w.addmv_(basis.T, components, alpha=-1)
        return components
    components = w.new_zeros(len(basis))
    pieces = list(zip(basis.split(_COLUMNS, dim=1), w.split(_COLUMNS), strict=True))
    for piece, part in pieces:
        components += piece.to(w.dtype) @ part
    for piece, part in pieces:
        part.addmv_(piece.T.to(w.dtype), components, alpha=-1)
    return components


def combine(basis: Tensor, coordinates: Tensor) -> Tensor:
    """Linear combinations of the rows of the basis ``[m, n]`` by the columns ``[m, k]``, normalized: ``[n, k]``."""
    dtype = torch.promote_types(basis.dtype, torch.float32)
    coordinates = coordinates.to(basis.device, dtype)
    vectors = torch.cat([piece.to(dtype).T @ coordinates for piece in basis.split(_COLUMNS, dim=1)])
    return vectors / torch.linalg.vector_norm(vectors, dim=0)


def rotate_(basis: Tensor, coordinates: Tensor) -> None:
    """Put the combinations by the columns ``[m, p]`` in the place of the first p of the m rows."""
    m, p = coordinates.shape
    coordinates = coordinates.to(basis.device, basis.dtype)
    for start in range(0, basis.shape[1], _COLUMNS):
        piece = basis[:, start : start + _COLUMNS]
        piece[:p] = coordinates.T @ piece[:m]
