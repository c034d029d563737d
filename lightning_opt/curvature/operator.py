"""What all curvature operators are: symmetric linear maps on the flat vector of all parameters."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

DENSE_LIMIT = 20_000


class CurvatureOperator(ABC):
    """A symmetric matrix over the parameters that is known by its products with vectors.

    ``operator @ v`` multiplies a flat vector ``[n]``, or the columns of ``[n, k]``. The coordinates are those of the
    parameters one after the other, in the order given.

    Args:
        params: The parameters that span the matrix. Those that do not require gradients are left out, and one that is
            listed twice counts once.
        dtype: Of the vectors; the default is the widest dtype of the parameters, and at least float32.
        reduce: Averages a flat tensor over the ranks of a data-parallel run, as :func:`mean_over_ranks` does; every
            rank must then make the same products. ``None`` leaves each rank with the curvature of its own data.

    Attributes:
        params: The parameters, without duplicates and without frozen ones.
        size: Their number of elements, n.
        dtype: The dtype of the vectors.
        device: The device of the vectors and of the parameters.
        products: How many matrix-vector products were made.

    Raises:
        ValueError: If no parameter requires a gradient, one is not real floating point, or they are on several devices.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        dtype: torch.dtype | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.params = _trainable(params)
        self._sizes = [p.numel() for p in self.params]
        self.size = sum(self._sizes)
        self.device = self.params[0].device
        widest = torch.float32
        for p in self.params:
            widest = torch.promote_types(widest, p.dtype)
        self.dtype = dtype or widest
        self.reduce = reduce
        self.products = 0

    @abstractmethod
    def multiply(self, vectors: Tensor) -> Tensor:
        """This rank's products with the rows of ``vectors [k, n]``, before they are averaged over ranks."""

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """The product with a vector ``[n]`` or with each column of ``[n, k]``; on the operator's device and dtype.

        Raises:
            ValueError: If the shape does not fit.
        """
        if vectors.ndim not in (1, 2) or vectors.shape[0] != self.size:
            raise ValueError(f"expected a vector [{self.size}] or columns [{self.size}, k], got {list(vectors.shape)}")
        with torch.no_grad():
            rows = vectors.detach().to(self.device, self.dtype)
            rows = (rows.unsqueeze(0) if vectors.ndim == 1 else rows.T).contiguous()
            product = self.multiply(rows)
            if self.reduce is not None:
                product = self.reduce(product)
        self.products += len(rows)
        return product[0] if vectors.ndim == 1 else product.T

    def to_dense(self) -> Tensor:
        """The matrix ``[n, n]``, from n products; symmetric up to rounding.

        Raises:
            ValueError: If n is above 20,000.
        """
        if self.size > DENSE_LIMIT:
            raise ValueError(f"a dense matrix of {self.size} x {self.size} is too large: the limit is {DENSE_LIMIT}")
        identity = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return torch.cat([self @ columns for columns in identity.split(256, dim=1)], dim=1)

    def unflatten(self, vector: Tensor) -> tuple[Tensor, ...]:
        """The parts of a flat vector ``[n]`` that belong to the parameters, in their shapes; views of it.

        Raises:
            ValueError: If the shape does not fit.
        """
        if vector.shape != (self.size,):
            raise ValueError(f"expected a vector [{self.size}], got {list(vector.shape)}")
        return tuple([part.view(p.shape) for part, p in zip(vector.split(self._sizes), self.params, strict=True)])

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One vector ``[n]`` from tensors in the shapes of the parameters; ``None`` stands for zeros."""
        flat = [
            torch.zeros(p.numel(), dtype=self.dtype, device=self.device) if t is None else t.reshape(-1).to(self.dtype)
            for t, p in zip(tensors, self.params, strict=True)
        ]
        return torch.cat(flat).detach()


class MatrixOperator(CurvatureOperator):
    """A symmetric matrix that is at hand, for tests and examples.

    Args:
        matrix: Symmetric, ``[n, n]``.

    Raises:
        ValueError: If it is not square.

    Example:
        >>> import torch
        >>> from lightning_opt.curvature import MatrixOperator
        >>> MatrixOperator(torch.diag(torch.tensor([3.0, 1.0]))) @ torch.tensor([1.0, 1.0])
        tensor([3., 1.])
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must be square, got shape {list(matrix.shape)}")
        super().__init__([matrix.new_zeros(len(matrix)).requires_grad_()])
        self.matrix = matrix.detach().to(self.dtype)

    @override
    def multiply(self, vectors: Tensor) -> Tensor:
        return vectors @ self.matrix


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, the same bits on each; the tensor itself outside of a distributed run."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total.div_(dist.get_world_size())


def _trainable(params: Iterable[Tensor]) -> tuple[Tensor, ...]:
    unique = tuple({id(p): p for p in params if p.requires_grad}.values())
    if not unique:
        raise ValueError("params holds no tensor that requires a gradient")
    for p in unique:
        if not p.is_floating_point():
            raise ValueError(f"params must be real floating point, got {p.dtype}")
        if p.device != unique[0].device:
            raise ValueError(f"params must be on one device, got {unique[0].device} and {p.device}")
    return unique
