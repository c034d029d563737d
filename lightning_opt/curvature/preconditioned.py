from torch import Tensor
from typing_extensions import override

from .operator import CurvatureOperator


class PreconditionedOperator(CurvatureOperator):
    r"""The curvature that a preconditioned optimizer moves in: :math:`D^{-1/2} A D^{-1/2}`.

    Its eigenvalues are those of :math:`D^{-1} A`, which decide what learning rates are stable for
    :math:`\theta \leftarrow \theta - \eta D^{-1} g` (arXiv:2207.14484).

    Args:
        operator: :math:`A`.
        diagonal: :math:`D`, positive, ``[n]``, the same on every rank.

    Raises:
        ValueError: If the shape does not fit.

    Example:
        >>> import torch
        >>> from lightning_opt.curvature import MatrixOperator, PreconditionedOperator
        >>> a = MatrixOperator(torch.tensor([[4.0, 2.0], [2.0, 9.0]]))
        >>> PreconditionedOperator(a, torch.tensor([4.0, 9.0])).to_dense().round(decimals=4)
        tensor([[1.0000, 0.3333],
                [0.3333, 1.0000]])
    """

    def __init__(self, operator: CurvatureOperator, diagonal: Tensor) -> None:
        super().__init__(operator.params, dtype=operator.dtype, reduce=operator.reduce)
        if diagonal.shape != (operator.size,):
            raise ValueError(f"diagonal must be a vector [{operator.size}], got shape {list(diagonal.shape)}")
        self.operator = operator
        self.scale = diagonal.detach().to(operator.device, operator.dtype).rsqrt()

    @override
    def multiply(self, vectors: Tensor) -> Tensor:
        return self.operator.multiply(vectors * self.scale) * self.scale
