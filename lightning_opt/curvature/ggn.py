"""Products with the generalized Gauss-Newton matrix (Schraudolph, 2002)."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_opt.registry import register

from ._micro_batches import scalar_loss
from ._output_operator import OutputMap, OutputOperator


@register("tool", summary="Products with the generalized Gauss-Newton matrix, matrix-free")
class GGNOperator(OutputOperator):
    r"""The generalized Gauss-Newton matrix :math:`\sum_b w_b J_b^T (\nabla_z^2 L_b) J_b` of a mean loss of outputs z.

    It is the Hessian without the curvature of the network: positive semidefinite where the loss is convex in the
    outputs, equal to the Hessian where the network is linear in its parameters or every sample is fitted exactly, and
    for cross-entropy and squared error equal to the Fisher information matrix. All else is as for
    :class:`HessianOperator`.

    Args:
        forward: Maps a micro-batch to ``(outputs, targets)``.
        loss: Maps ``(outputs, targets)`` to the mean loss of the samples, a scalar.
        params: The parameters; frozen ones are left out, shared ones count once.
        batches: Micro-batches, a sequence.
        weights: Numbers of samples of the micro-batches, where they differ.
        retain_graph: Keep the graph of a single micro-batch from product to product.
        method: ``"autograd"``, or ``"finite_difference"``: Jv from two forward passes; the loss alone is then
            differentiated twice.
        reduce: Averages a flat tensor over ranks, for example :func:`mean_over_ranks`.
        dtype: Of the vectors; default: the widest of the parameters, at least float32.
        seed: Seeds the random layers.

    Raises:
        ValueError: If a value is out of range, or ``forward`` or ``loss`` returns something else.
        NotTwiceDifferentiableError: In a product, if autograd cannot differentiate the gradient.

    Cost:
        A product: two backward passes with a retained graph, after the forward and backward pass that builds it. By
        finite differences: three forward passes and one backward pass.

    Example:
        >>> import torch
        >>> from lightning_opt.curvature import GGNOperator
        >>> w = torch.ones(2, requires_grad=True)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2)
        >>> ggn = GGNOperator(lambda b: (b[0] @ w, b[1]), lambda z, y: ((z - y) ** 2).mean() / 2, [w], [(x, y)])
        >>> ggn.to_dense()
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])
    """

    @override
    def output_map(self, outputs: Tensor, targets: Any) -> OutputMap:
        loss = scalar_loss(self.loss(outputs, targets))
        factor = torch.ones_like(loss, requires_grad=True)  # as in HessianOperator
        (gradient,) = torch.autograd.grad(loss, outputs, factor, create_graph=True)

        def apply(tangent: Tensor) -> Tensor:
            (image,) = torch.autograd.grad(gradient, outputs, tangent, retain_graph=True, allow_unused=True)
            return torch.zeros_like(tangent) if image is None else image  # None where the loss is linear

        return apply
