"""Whether an objective depends on the parameters that are to be searched, told from its values."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_opt.solvers.fzoos import Box

from ._candidates import FlatParameters


def changes_of(evaluate: Callable[[Tensor], Tensor], flat: FlatParameters, x: Tensor, box: Box) -> Tensor:
    """By how much the objective changes when all of one parameter tensor is moved far, float64, one number a tensor.

    Differences of the size of rounding are 0; a value that is not finite is a change. There need not be a gradient, so
    metrics can be told from parameters that they do not depend on.

    Args:
        evaluate: Objective of points ``[m, d]``, ``[m]``.
        flat: The parameters.
        x: From where, ``[d]`` in the coordinates of the box.
        box: To stay in.

    Cost: one evaluation a tensor, and one.
    """
    points = x.repeat(1 + len(flat.named), 1)
    for row, part in enumerate(flat.views(torch.arange(len(x))).values(), start=1):
        moved = x[part.flatten()] + _FAR * (1 + torch.arange(part.numel()) % 3)  # not alike: a norm may cancel that
        points[row, part.flatten()] = moved % 1 if box.is_bounded else moved
    values = evaluate(box.from_unit(points)).to("cpu")
    tolerance = 16 * torch.finfo(values.dtype).eps * values[0].abs().nan_to_num(nan=0.0, posinf=0.0)
    changes = (values[1:] - values[0]).abs().nan_to_num(nan=1.0, posinf=1.0)
    return torch.where(changes > tolerance, changes, 0.0).to(torch.float64)


_FAR = 0.37
