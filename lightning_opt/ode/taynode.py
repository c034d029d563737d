"""TayNODE: the second time derivative of the trajectory."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.functional import jvp

from lightning_opt.registry import register

from .embedded_step import Dynamics, time_in
from .global_regularization import check_graph
from .local_regularization import frozen_statistics, recorded


@register("tool", summary="TayNODE's regularizer of second order", paper="2007.04504")
def taynode_regularization(block: Any) -> Tensor:
    r"""The mean over the batch of :math:`\int |d^2 y / dt^2|^2 dt`, per entry of the state (arXiv:2007.04504, K = 2).

    The integral is a sum over the solver's own steps, each with the value at its start, where the paper carries it as
    one more state of the solve; the gradient goes through the steps of the solver.

    Args:
        block: As for :func:`global_regularization`.

    Returns:
        A 0-dim tensor.

    Raises:
        ValueError: If the block has no solve with a graph.

    Cost: two evaluations and two backward passes at every step, all with their graph.

    Example:
        >>> from torch import nn
        >>> from lightning_opt.ode import NeuralODE
        >>> class Growth(nn.Module):
        ...     def forward(self, t, y):
        ...         return 2.0 * t * torch.ones_like(y)
        >>> block = NeuralODE(Growth())
        >>> block.keep_graph = True
        >>> end = block(torch.ones(2, 1))
        >>> round(taynode_regularization(block).item(), 4)
        4.0
    """
    record = recorded(block)
    check_graph(block)
    total = record.states[0].new_zeros(())
    for t, y, dt in zip(record.t, record.states, record.dt, strict=True):
        width = min(abs(dt), abs(record.t1 - t))  # a solver may step beyond the end
        with torch.autocast(y.device.type, enabled=False), frozen_statistics(block):
            total = total + width * second_derivative(block.func, t, y).square().mean()
    return total


def second_derivative(func: Dynamics, t: float, y: Tensor) -> Tensor:
    r""":math:`d^2 y / dt^2 = \partial f / \partial t + (\partial f / \partial y) f` along ``dy/dt = f(t, y)``.

    Example:
        >>> second_derivative(lambda t, y: -3.0 * y, 0.0, torch.ones(1))
        tensor([9.])
    """
    now = time_in(t, y)
    _, derivative = jvp(func, (now, y), (torch.ones_like(now), func(now, y)), create_graph=True)
    return derivative
