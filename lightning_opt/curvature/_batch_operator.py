"""What the operators of a loss share: data in micro-batches, and graphs that are kept from product to product."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from lightning_opt._checks import check_choice

from ._context import product_context
from ._errors import check_twice_differentiable, differentiating_twice
from ._micro_batches import MicroBatches
from ._retained import Retained
from .operator import CurvatureOperator

Method = Literal["autograd", "finite_difference"]


class Linearized(Protocol):
    """A micro-batch at the present parameters, with the graph that its products go through."""

    def product(self, vector: Tensor, keep: bool) -> Tensor:
        """Its matrix times a vector ``[n]``; ``keep`` the graph for another one."""


class BatchOperator(CurvatureOperator):
    """The weighted sum over micro-batches of a matrix; a subclass says what the matrix of one is."""

    def __init__(
        self,
        params: Iterable[Tensor],
        batches: Sequence[Any],
        *,
        weights: Sequence[float] | None,
        retain_graph: bool,
        method: Method,
        reduce: Callable[[Tensor], Tensor] | None,
        dtype: torch.dtype | None,
        seed: int,
    ) -> None:
        super().__init__(params, dtype=dtype, reduce=reduce)
        check_choice("method", method, ["autograd", "finite_difference"])
        self.method = method
        self.seed = seed
        self.micro_batches = MicroBatches(batches, weights, reduce, self.device)
        self._checked = False
        self._retained: Retained[Linearized] = Retained(self.params, retain_graph and len(self.micro_batches) == 1)

    @abstractmethod
    def linearize(self, index: int, batch: Any) -> Linearized:
        """A micro-batch, its random layers seeded by ``self.seed + index``."""

    @override
    def multiply(self, vectors: Tensor) -> Tensor:
        with product_context(self.device, twice=self.method == "autograd"), differentiating_twice():
            return self.micro_batches.weighted_sum(partial(self._batch_product, vectors))

    def check_graph(self, gradients: Iterable[Tensor | None]) -> None:
        """Raise, once for all graphs, if autograd cannot differentiate these gradients."""
        if not self._checked:
            check_twice_differentiable(gradients)
            self._checked = True

    def _batch_product(self, vectors: Tensor, index: int, batch: Any) -> Tensor:
        linearized = self._retained.get(partial(self.linearize, index, batch))
        products = []
        for number, vector in enumerate(vectors):
            keep = self._retained.keep or number < len(vectors) - 1
            products.append(linearized.product(vector, keep))
        return products[0].unsqueeze(0) if len(products) == 1 else torch.stack(products)
