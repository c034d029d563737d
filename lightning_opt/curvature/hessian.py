"""Products with the Hessian of a loss, by double backward (Pearlmutter, 1994) or by differences of gradients."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_opt.registry import register

from ._batch_operator import BatchOperator, Method
from ._context import forward_context, product_context
from ._finite_difference import central_difference
from ._micro_batches import scalar_loss


@register("tool", summary="Products with the Hessian of a loss, matrix-free")
class HessianOperator(BatchOperator):
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
        self.loss = loss

    @override
    def multiply(self, vectors: Tensor) -> Tensor:
        if self.method == "autograd":
            return super().multiply(vectors)
        with product_context(self.device, twice=False):
            return torch.stack([central_difference(self, self._gradient, v) for v in vectors])

    @override
    def linearize(self, index: int, batch: Any) -> "_Gradients":
        gradients = self._gradients(index, batch, create_graph=True)
        self.check_graph(gradients)
        return _Gradients(self, gradients)

    def _gradient(self) -> Tensor:
        return self.micro_batches.weighted_sum(lambda index, batch: self.flatten(self._gradients(index, batch)))

    def _gradients(self, index: int, batch: Any, create_graph: bool = False) -> tuple[Tensor | None, ...]:
        with forward_context(self.device, self.seed + index):
            loss = scalar_loss(self.loss(batch))
            # a factor that requires a gradient: only then do functions marked once_differentiable put their error there
            factor = torch.ones_like(loss, requires_grad=create_graph)
            return torch.autograd.grad(loss, self.params, factor, create_graph=create_graph, allow_unused=True)


class _Gradients:
    """A micro-batch's gradients with their graph: those that depend on the parameters."""

    def __init__(self, operator: HessianOperator, gradients: Sequence[Tensor | None]) -> None:
        self.operator = operator
        curved = {i: g for i, g in enumerate(gradients) if g is not None and g.requires_grad}
        self.rows, self.gradients = list(curved), list(curved.values())

    def product(self, vector: Tensor, keep: bool) -> Tensor:
        operator = self.operator
        if not self.gradients:  # the loss depends on other parameters only
            return torch.zeros_like(vector)
        parts = operator.unflatten(vector)
        along = [parts[i].to(g.dtype) for i, g in zip(self.rows, self.gradients, strict=True)]
        second = torch.autograd.grad(self.gradients, operator.params, along, retain_graph=keep, allow_unused=True)
        return operator.flatten(second)
