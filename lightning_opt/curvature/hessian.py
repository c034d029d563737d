"""Products with the Hessian of a loss, by double backward (Pearlmutter, 1994) or by differences of gradients."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_opt._checks import check_choice
from lightning_opt.registry import register

from ._context import forward_context, product_context
from ._errors import check_twice_differentiable, differentiating_twice
from ._finite_difference import central_difference
from ._micro_batches import MicroBatches, scalar_loss
from ._retained import Retained
from .operator import CurvatureOperator

# the gradients that depend on the parameters, and which parameter each belongs to
Graph = tuple[list[Tensor], list[int]]


@register("tool", summary="Products with the Hessian of a loss, matrix-free")
class HessianOperator(CurvatureOperator):
    r"""The Hessian of a mean loss, :math:`\nabla^2 \sum_b w_b L_b(\theta)`, by its products with vectors.

    Parameters are taken as they are at the time of a product: after an optimizer step, products belong to the new
    point. Everything is computed with autocast off, in the dtype of the parameters. Random layers such as dropout draw
    the same numbers in every product, from a seed of their own for each micro-batch; the global random state stays as
    it is. For BatchNorm, put the operator and its products inside :func:`probe_mode`. A parameter without influence on
    the loss has zero rows.

    Args:
        loss: Maps a micro-batch to the mean loss of its samples, a scalar. With ``method="autograd"`` it must be twice
            differentiable: no compiled module, no cuDNN recurrent layer; attention runs in its plain form.
        params: The parameters; frozen ones are left out, shared ones count once.
        batches: Micro-batches, a sequence; memory is that of the double backward pass of one of them.
        weights: Numbers of samples of the micro-batches, where they differ.
        retain_graph: Keep the graph of a single micro-batch from product to product: half the time, and its memory is
            held as long as the operator lives. With several micro-batches each graph is built anew.
        method: ``"autograd"``, or ``"finite_difference"``: the central difference of two gradients, with a relative
            error near 1e-4 in float32, which works wherever a gradient does.
        reduce: Averages a flat tensor over ranks, for example :func:`mean_over_ranks`. Ranks may hold different
            numbers of samples where ``weights`` says so.
        dtype: Of the vectors; default: the widest of the parameters, at least float32.
        seed: Seeds the random layers.

    Raises:
        ValueError: If a value is out of range, the loss is no scalar, or it does not depend on the parameters.
        NotTwiceDifferentiableError: In a product, if autograd cannot differentiate the gradient.

    Cost:
        A product: one double backward pass (twice a backward pass) with a retained graph; otherwise a forward and a
        backward pass before it, once for all columns of ``operator @ [n, k]``. By finite differences: two forward and
        backward passes.

    Example:
        >>> import torch
        >>> from lightning_opt.curvature import HessianOperator
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian = HessianOperator(lambda x: (x * w**2).sum(), [w], [torch.tensor([1.0, 3.0])])
        >>> hessian @ torch.tensor([1.0, 1.0])
        tensor([2., 6.])
    """

    def __init__(
        self,
        loss: Callable[[Any], Tensor],
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
        self.loss = loss
        self.method = method
        self.seed = seed
        self._batches = MicroBatches(batches, weights, reduce, self.device)
        self._checked = False
        self._retained: Retained[Graph] = Retained(self.params, retain_graph and len(self._batches) == 1)

    @override
    def multiply(self, vectors: Tensor) -> Tensor:
        with product_context(self.device, twice=self.method == "autograd"):
            if self.method == "finite_difference":
                return torch.stack([central_difference(self, self._gradient, v) for v in vectors])
            with differentiating_twice():
                return self._batches.weighted_sum(partial(self._batch_product, vectors))

    def _batch_product(self, vectors: Tensor, index: int, batch: Any) -> Tensor:
        graph = self._retained.get(partial(self._graph, index, batch))
        products = []
        for number, vector in enumerate(vectors):
            keep = self._retained.keep or number < len(vectors) - 1
            products.append(self._through(graph, vector, keep))
        return products[0].unsqueeze(0) if len(products) == 1 else torch.stack(products)

    def _graph(self, index: int, batch: Any) -> Graph:
        grads = self._gradients(index, batch, create_graph=True)
        if not self._checked:
            check_twice_differentiable(grads)
            self._checked = True
        curved = {i: g for i, g in enumerate(grads) if g is not None and g.requires_grad}
        return list(curved.values()), list(curved)

    def _through(self, graph: Graph, vector: Tensor, keep: bool) -> Tensor:
        grads, rows = graph
        if not grads:  # the loss depends on other parameters only
            return torch.zeros_like(vector)
        parts = self.unflatten(vector)
        along = [parts[i].to(g.dtype) for i, g in zip(rows, grads, strict=True)]
        return self.flatten(torch.autograd.grad(grads, self.params, along, retain_graph=keep, allow_unused=True))

    def _gradient(self) -> Tensor:
        return self._batches.weighted_sum(lambda index, batch: self.flatten(self._gradients(index, batch)))

    def _gradients(self, index: int, batch: Any, create_graph: bool = False) -> tuple[Tensor | None, ...]:
        with forward_context(self.device, self.seed + index):
            loss = scalar_loss(self.loss(batch))
            # a factor that requires a gradient: only then do functions marked once_differentiable put their error there
            factor = torch.ones_like(loss, requires_grad=create_graph)
            return torch.autograd.grad(loss, self.params, factor, create_graph=create_graph, allow_unused=True)
