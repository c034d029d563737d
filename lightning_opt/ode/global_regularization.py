"""Global regularization: how hard all steps of a solve are, differentiated through the solve."""

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_opt._checks import check_choice
from lightning_opt.registry import register

from .local_error import local_error, stiffness
from .local_regularization import Estimate, check_estimate, frozen_statistics, recorded


@register("tool", summary="ERNODE and SRNODE, regularizers that sum over all steps of a solve", paper="2105.03918")
def global_regularization(
    block: Any,
    *,
    estimate: Estimate = "error",
    reduction: Literal["mean", "sum", "max"] | None = None,
) -> Tensor:
    """The regularizer of ERNODE or SRNODE (arXiv:2105.03918), to add to the training loss.

    The gradient goes through the steps of the solver, so the block must not use an adjoint. Step sizes are constants,
    but that torchdiffeq differentiates the first one it chooses.

    Args:
        block: A :class:`NeuralODE` with ``keep_graph`` set before it was called, in training mode, without adjoint.
        estimate: ``"error"``: local errors times step sizes; ``"stiffness"``: the stiffness at each step.
        reduction: Over the steps; None is as in the authors' code: the mean of errors, the largest stiffness.

    Returns:
        A 0-dim tensor.

    Raises:
        ValueError: If a value is not accepted, or the block has no solve with a graph.

    Cost: with our own solver its steps are there already, and the graph reaches their error estimates; with
        torchdiffeq's every accepted step is made once more.

    Example:
        >>> from torch import nn
        >>> from lightning_opt.ode import NeuralODE
        >>> class Net(nn.Linear):
        ...     def forward(self, t, y):
        ...         return super().forward(y).tanh()
        >>> block = NeuralODE(Net(3, 3))
        >>> block.keep_graph = True
        >>> end = block(torch.ones(2, 3))
        >>> global_regularization(block).backward()
        >>> block.func.weight.grad.shape
        torch.Size([3, 3])
    """
    check_choice("reduction", reduction, (None, "mean", "sum", "max"))
    check_estimate(block, estimate)
    record = recorded(block)
    check_graph(block)
    terms = []
    for i, (t, y, dt) in enumerate(zip(record.t, record.states, record.dt, strict=True)):
        if record.steps:
            step = record.steps[i]
        else:
            with frozen_statistics(block):
                step = block.step(t, y, dt, None, None)
        if estimate == "error":
            terms.append(local_error(step.error, y, step.y1, block.rtol, block.atol) * abs(dt))
        else:
            terms.append(stiffness(step, block.tableau))
    values = torch.stack(terms)
    reduction = reduction or ("mean" if estimate == "error" else "max")
    if reduction == "max":
        return values.max()
    return values.mean() if reduction == "mean" else values.sum()


def check_differentiable(block: Any) -> None:
    """Raise ``ValueError`` for a block whose solve cannot be differentiated step by step."""
    if not hasattr(block, "keep_graph"):
        raise ValueError(f"{type(block).__name__} keeps no graph of its steps")
    if getattr(block, "adjoint", False):
        raise ValueError(
            "the term is differentiated through the steps of the solver: build the block with adjoint=False"
        )


def check_graph(block: Any) -> None:
    """Raise ``ValueError`` unless the states of the last solve can be differentiated."""
    check_differentiable(block)
    if not block.keep_graph:
        raise ValueError("set keep_graph of the block to True before its forward pass")
