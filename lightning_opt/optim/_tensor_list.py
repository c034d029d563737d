"""A list of tensors that computes like one tensor, through ``torch._foreach_*``.

The reference updates are written for a tensor; handed a :class:`TensorList` they run unchanged as a multi-tensor
update.
"""

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_TAKES_TENSOR = {"add", "add_", "mul", "mul_", "div", "div_"}  # foreach functions with an overload for one 0-dim tensor


class TensorList:
    """Tensors on one device, one dtype, any shapes; arithmetic and methods apply to each of them.

    What ``torch._foreach_*`` offers runs as one multi-tensor call, the rest tensor by tensor.

    Example:
        >>> x = TensorList([torch.ones(2), torch.ones(3)])
        >>> ((2 * x + x) / 6).sqrt_().tensors[1]
        tensor([0.7071, 0.7071, 0.7071])
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)

    def __getattr__(self, name: str) -> Callable[..., "TensorList"]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self._apply(name, args, kwargs)

    def _apply(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "TensorList":
        foreach = getattr(torch, f"_foreach_{name}", None)
        if foreach is None or any(isinstance(a, Tensor) and name not in _TAKES_TENSOR for a in args):
            out = [
                getattr(tensor, name)(*(a.tensors[i] if isinstance(a, TensorList) else a for a in args), **kwargs)
                for i, tensor in enumerate(self.tensors)
            ]
        else:
            out = foreach(self.tensors, *(a.tensors if isinstance(a, TensorList) else a for a in args), **kwargs)
        return self if name.endswith("_") else TensorList(out)

    def _map(self, function: Callable[[Any, Any], Tensor], other: Any) -> "TensorList":
        others = other.tensors if isinstance(other, TensorList) else [other] * len(self.tensors)
        return TensorList(function(a, b) for a, b in zip(self.tensors, others, strict=True))

    def __neg__(self) -> "TensorList":
        return self.neg()

    def __add__(self, other: Any) -> "TensorList":
        return self.add(other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> "TensorList":
        return self.sub(other)

    def __rsub__(self, other: Any) -> "TensorList":
        return self.neg().add_(other)

    def __mul__(self, other: Any) -> "TensorList":
        return self.mul(other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> "TensorList":
        return self.div(other)

    def __rtruediv__(self, other: Any) -> "TensorList":
        return self.reciprocal().mul_(other)

    def __pow__(self, other: Any) -> "TensorList":
        return self.pow(other)

    def __rpow__(self, other: Any) -> "TensorList":
        return self._map(lambda a, b: b**a, other)

    def __gt__(self, other: Any) -> "TensorList":
        return self._map(operator.gt, other)

    def __ge__(self, other: Any) -> "TensorList":
        return self._map(operator.ge, other)

    def __lt__(self, other: Any) -> "TensorList":
        return self._map(operator.lt, other)


def each(function: Callable[..., Tensor], *operands: Any) -> Any:
    """``function`` of tensors, or of the tensors of lists one by one, for what no ``torch._foreach_*`` offers."""
    if isinstance(operands[0], TensorList):
        return TensorList(map(function, *(x.tensors for x in operands)))
    return function(*operands)


def select(condition: Any, a: Any, b: Any) -> Any:
    """``a if condition else b`` for a bool, element by element for a tensor or a :class:`TensorList`."""
    if isinstance(condition, TensorList):
        pick = [x.tensors if isinstance(x, TensorList) else [x] * len(condition.tensors) for x in (a, b)]
        return TensorList(select(c, x, y) for c, x, y in zip(condition.tensors, *pick, strict=True))
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)
    return a if condition else b
