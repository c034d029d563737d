"""Products with the empirical Fisher matrix, the uncentered second moment of the gradients of single samples."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_opt.registry import register

from ._micro_batches import scalar_loss
from ._output_operator import OutputMap, OutputOperator


@register("tool", summary="Products with the empirical Fisher matrix, matrix-free")
class EmpiricalFisherOperator(OutputOperator):
    r"""The empirical Fisher matrix :math:`\frac 1 N \sum_i g_i g_i^T` of the gradients :math:`g_i` of single samples.

    No gradient of a single sample is formed: with :math:`a_i` the gradient of sample i's loss in its outputs,
    :math:`g_i = J_i^T a_i`, and a product is :math:`\frac 1 N \sum_i J_i^T a_i (a_i \cdot J_i v)`, exactly. Its trace
    is the mean squared norm of the gradients, and subtracting the outer product of their mean leaves their covariance.

    Samples are the first dimension of the outputs (flatten sequences where every token is a sample), ``loss`` is their
    mean, and each sample's outputs depend on that sample alone: BatchNorm must use its running statistics, see
    :func:`probe_mode`.

    Args:
        forward: Maps a micro-batch to ``(outputs, targets)``; the outputs ``[B, ...]``.
        loss: Maps ``(outputs, targets)`` to the mean loss of the samples, a scalar.
        params: The parameters; frozen ones are left out, shared ones count once.
        batches: Micro-batches, a sequence.
        weights: Numbers of samples of the micro-batches, where they differ.
        retain_graph: Keep the graph of a single micro-batch from product to product.
        method: ``"autograd"``, or ``"finite_difference"``: Jv from two forward passes.
        reduce: Averages a flat tensor over ranks, for example :func:`mean_over_ranks`.
        dtype: Of the vectors; default: the widest of the parameters, at least float32.
        seed: Seeds the random layers.

    Raises:
        ValueError: If a value is out of range, or ``forward`` or ``loss`` returns something else.
        NotTwiceDifferentiableError: In a product, if autograd cannot differentiate the gradient.

    Cost:
        That of :class:`GGNOperator`.

    Example:
        >>> import torch
        >>> from lightning_opt.curvature import EmpiricalFisherOperator
        >>> w = torch.ones(2, requires_grad=True)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2)
        >>> loss = lambda z, y: ((z - y) ** 2).mean() / 2
        >>> EmpiricalFisherOperator(lambda b: (b[0] @ w, b[1]), loss, [w], [(x, y)]).to_dense()  # g: (1, 0), (0, 4)
        tensor([[0.5000, 0.0000],
                [0.0000, 8.0000]])
    """

    @override
    def output_map(self, outputs: Tensor, targets: Any) -> OutputMap:
        if not outputs.ndim:
            raise ValueError("outputs must have a first dimension, that of the samples, got a scalar")
        count = len(outputs)
        (mean_gradient,) = torch.autograd.grad(scalar_loss(self.loss(outputs, targets)), outputs)
        gradients = (count * mean_gradient).view(count, -1)

        def apply(tangent: Tensor) -> Tensor:
            along = (gradients * tangent.reshape(count, -1)).sum(dim=1, keepdim=True)
            return (gradients * along / count).view_as(outputs)

        return apply
