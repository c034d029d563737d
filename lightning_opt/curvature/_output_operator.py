"""What the Gauss-Newton matrix and the empirical Fisher share: J^T M J with M acting on the network's outputs."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_opt._checks import check_choice

from ._context import forward_context, product_context
from ._errors import check_twice_differentiable, differentiating_twice
from ._finite_difference import central_difference
from ._micro_batches import MicroBatches
from ._retained import Retained
from .operator import CurvatureOperator

OutputMap = Callable[[Tensor], Tensor]


class OutputOperator(CurvatureOperator):
    """Sum over micro-batches of ``J^T M J``; a subclass says what M does to a tangent of the outputs."""

    def __init__(
        self,
        forward: Callable[[Any], tuple[Tensor, Any]],
        loss: Callable[[Tensor, Any], Tensor],
        params: Iterable[Tensor],
        batches: Sequence[Any],
        *,
        weights: Sequence[float] | None = None,
        retain_graph: bool = True,
        method: Literal["autograd", "finite_difference"] = "autograd",
        reduce: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(params, dtype=dtype, reduce=reduce)
        check_choice("method", method, ["autograd", "finite_difference"])
        self.forward = forward
        self.loss = loss
        self.method = method
        self.seed = seed
        self._batches = MicroBatches(batches, weights, reduce, self.device)
        self.checked = False
        self._retained: Retained[_Linearized] = Retained(self.params, retain_graph and len(self._batches) == 1)

    @abstractmethod
    def output_map(self, outputs: Tensor, targets: Any) -> OutputMap:
        """M at these outputs, which require gradients and have no history."""

    @override
    def multiply(self, vectors: Tensor) -> Tensor:
        twice = self.method == "autograd"
        with product_context(self.device, twice=twice), differentiating_twice():
            return self._batches.weighted_sum(partial(self._batch_product, vectors))

    def _batch_product(self, vectors: Tensor, index: int, batch: Any) -> Tensor:
        linear = self._retained.get(partial(_Linearized, self, index, batch))
        products = []
        for number, vector in enumerate(vectors):
            keep = self._retained.keep or number < len(vectors) - 1
            products.append(linear.product(vector, keep))
        return torch.stack(products)

    def evaluate(self, index: int, batch: Any) -> tuple[Tensor, Any]:
        """Outputs and targets of a micro-batch, its random layers seeded."""
        with forward_context(self.device, self.seed + index):
            result = self.forward(batch)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Tensor):
            raise ValueError("forward must return (outputs, targets) with a tensor of outputs")
        return result


class _Linearized:
    """A micro-batch's outputs with the maps ``v -> J v`` and ``u -> J^T u``."""

    def __init__(self, operator: OutputOperator, index: int, batch: Any) -> None:
        self.operator = operator
        self.index, self.batch = index, batch
        self.outputs, targets = operator.evaluate(index, batch)
        if not self.outputs.requires_grad:
            raise ValueError("the outputs must depend on params, got a tensor without a gradient: was it detached?")
        self.map = operator.output_map(self.outputs.detach().requires_grad_(), targets)
        if operator.method == "autograd":
            # J^T u is linear in u, and its derivative along v is J v
            self.u = torch.zeros_like(self.outputs, requires_grad=True)
            pulled = torch.autograd.grad(self.outputs, operator.params, self.u, create_graph=True, allow_unused=True)
            if not operator.checked:
                check_twice_differentiable(pulled)
                operator.checked = True
            self.rows = [i for i, g in enumerate(pulled) if g is not None and g.requires_grad]
            self.pulled = [pulled[i] for i in self.rows]

    def product(self, vector: Tensor, keep: bool) -> Tensor:
        operator = self.operator
        tangent = self.map(self.push(vector))
        return operator.flatten(
            torch.autograd.grad(self.outputs, operator.params, tangent, retain_graph=keep, allow_unused=True)
        )

    def push(self, vector: Tensor) -> Tensor:
        operator = self.operator
        if operator.method == "finite_difference":
            with torch.no_grad():
                outputs = central_difference(operator, lambda: operator.evaluate(self.index, self.batch)[0], vector)
            return outputs.to(self.outputs.dtype)
        if not self.pulled:  # the outputs depend on other parameters only
            return torch.zeros_like(self.outputs)
        parts = operator.unflatten(vector)
        along = [parts[i].to(g.dtype) for i, g in zip(self.rows, self.pulled, strict=True)]
        (tangent,) = torch.autograd.grad(self.pulled, self.u, along, retain_graph=True)
        return tangent
