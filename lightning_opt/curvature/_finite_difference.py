"""Directional derivatives by central differences, for what autograd cannot differentiate."""

from collections.abc import Callable

import torch
from torch import Tensor

from .operator import CurvatureOperator


def central_difference(operator: CurvatureOperator, function: Callable[[], Tensor], vector: Tensor) -> Tensor:
    r"""The derivative of a function of the parameters along a vector, :math:`(f(\theta + h v) - f(\theta - h v)) / 2h`.

    The step :math:`h \lVert v \rVert` is the cube root of the rounding unit of the parameters' dtype, times
    :math:`1 + \lVert \theta \rVert`, which balances rounding and the third derivative.

    Args:
        operator: Whose parameters are moved, and put back bit for bit.
        function: Of nothing: it reads the parameters.
        vector: Direction ``[n]``.
    """
    saved = [p.detach().clone() for p in operator.params]
    unit = max(torch.finfo(p.dtype).eps for p in operator.params)
    length = unit ** (1 / 3) * (1 + torch.linalg.vector_norm(operator.flatten(saved)))
    step = length / torch.linalg.vector_norm(vector).clamp_min(torch.finfo(vector.dtype).tiny)
    try:
        _move(operator, saved, step * vector)
        ahead = function()
        _move(operator, saved, -step * vector)
        behind = function()
    finally:
        _move(operator, saved, None)
    return (ahead - behind) / (2 * step)


def _move(operator: CurvatureOperator, saved: list[Tensor], by: Tensor | None) -> None:
    # through .data: graphs that the caller holds stay valid, since the values are put back
    parts = [None] * len(saved) if by is None else operator.unflatten(by)
    for p, old, part in zip(operator.params, saved, parts, strict=True):
        p.data.copy_(old if part is None else old + part)
