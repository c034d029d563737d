from torch import Tensor
from typing_extensions import override

from .operator import CurvatureOperator


class ShiftedOperator(CurvatureOperator):
    r"""The curvature with a quadratic penalty beside the loss: :math:`A + \operatorname{diag}(d)`.

    Weight decay that is part of the gradient adds its coefficient to every eigenvalue.

    Args:
        operator: :math:`A`.
        diagonal: :math:`d`, ``[n]``, the same on every rank.

    Raises:
        ValueError: If the shape does not fit.

    Example:
        >>> import torch
        >>> from lightning_opt.curvature import MatrixOperator, ShiftedOperator
        >>> a = MatrixOperator(torch.tensor([[4.0, 2.0], [2.0, 9.0]]))
        >>> ShiftedOperator(a, torch.tensor([0.5, 0.0])).to_dense()
        tensor([[4.5000, 2.0000],
                [2.0000, 9.0000]])
    """

    def __init__(self, operator: CurvatureOperator, diagonal: Tensor) -> None:
        super().__init__(operator.params, dtype=operator.dtype, reduce=operator.reduce)
        if diagonal.shape != (operator.size,):
            raise ValueError(f"diagonal must be a vector [{operator.size}], got shape {list(diagonal.shape)}")
        self.operator = operator
        self.diagonal = diagonal.detach().to(operator.device, operator.dtype)

    @override
    def multiply(self, vectors: Tensor) -> Tensor:
        return self.operator.multiply(vectors) + vectors * self.diagonal
