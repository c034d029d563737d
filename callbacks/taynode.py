from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_opt.ode.coefficient import Decay
from lightning_opt.ode.global_regularization import check_differentiable
from lightning_opt.ode.taynode import taynode_regularization
from lightning_opt.registry import register

from ._ode_regularizer import ODERegularizer


@register(
    "callback",
    summary="TayNODE: the second time derivative of a neural ODE's trajectory, in the loss",
    paper="2007.04504",
    card="local-ode-regularization",
    log_prefix="taynode",
    capabilities=("ode",),
)
class TayNODE(ODERegularizer):
    """Adds to the training loss the integral of the squared second time derivative of the trajectory.

    A baseline of :class:`LocalODERegularization`, of order 2, with the same logs under ``taynode/``. It needs blocks
    without adjoint whose dynamics can be differentiated twice.

    Args:
        block: As for :class:`LocalODERegularization`.
        coeff: Of the term, at the beginning of training.
        coeff_end: At its end.
        decay: ``"exponential"`` or ``"constant"``.
        every_n_steps: Add the term in every so many steps, unscaled.
        decay_steps: Optimizer steps over which the coefficient decays; None takes the length of training.

    Raises:
        ValueError: If a value is out of its range.
        MisconfigurationException: As :class:`LocalODERegularization`, and for a block with adjoint or a stochastic one.

    Cost: see :func:`lightning_opt.ode.taynode_regularization`.

    Example:
        >>> TayNODE(coeff=0.01).decay
        'constant'
    """

    prefix = "taynode"
    needs_graph = True

    def __init__(
        self,
        block: str | nn.Module | None = None,
        *,
        coeff: float = 0.01,
        coeff_end: float = 0.01,
        decay: Decay = "constant",
        every_n_steps: int = 1,
        decay_steps: int | None = None,
    ) -> None:
        super().__init__(block, coeff, coeff_end, decay, decay_steps, every_n_steps, seed=0)

    @override
    def check_block(self, block: Any) -> None:
        if "stiffness" not in block.estimates:
            raise ValueError(f"a trajectory of {type(block).__name__} has no second derivative")
        check_differentiable(block)

    @override
    def value_of(self, block: Any, draw: float, generator: torch.Generator) -> Tensor:
        return taynode_regularization(block)
