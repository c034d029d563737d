"""What the Gauss-Newton matrix and the empirical Fisher share: J^T M J with M acting on the network's outputs."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ._batch_operator import BatchOperator, Method
from ._context import forward_context
from ._finite_difference import central_difference

OutputMap = Callable[[Tensor], Tensor]


class OutputOperator(BatchOperator):
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
        method: Method = "autograd",
        reduce: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            batches,
            weights=weights,
            retain_graph=retain_graph,
            method=method,
            reduce=reduce,
            dtype=dtype,
            seed=seed,
        )
        self.forward = forward
        self.loss = loss

    @abstractmethod
    def output_map(self, outputs: Tensor, targets: Any) -> OutputMap:
        """M at these outputs, which require gradients and have no history."""

    @override
    def linearize(self, index: int, batch: Any) -> "_Outputs":
        return _Outputs(self, index, batch)

    def evaluate(self, index: int, batch: Any) -> tuple[Tensor, Any]:
        """Outputs and targets of a micro-batch, its random layers seeded."""
        with forward_context(self.device, self.seed + index):
            result = self.forward(batch)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Tensor):
            raise ValueError("forward must return (outputs, targets) with a tensor of outputs")
        return result


class _Outputs:
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
            operator.check_graph(pulled)
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
