from collections.abc import Callable

from torch import Tensor


def moves_only(convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Of what ``Module.to`` does to a tensor, only the move to another device.

    A metric is a submodule of the model that it measures. Where Lightning casts that model to bfloat16, neither the
    weights of the features nor the sums in float64 may follow.
    """
    return lambda tensor: tensor.to(convert(tensor).device)
