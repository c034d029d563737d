from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_opt._checks import check_choice
from lightning_opt.ode.coefficient import Decay
from lightning_opt.ode.global_regularization import check_differentiable, global_regularization
from lightning_opt.ode.local_regularization import Estimate, check_adaptive, check_estimate
from lightning_opt.registry import register

from ._ode_regularizer import ODERegularizer


@register(
    "callback",
    summary="ERNODE and SRNODE: local errors or stiffness of all steps of a solve, in the loss",
    paper="2105.03918",
    card="local-ode-regularization",
    log_prefix="global_reg",
    capabilities=("ode",),
)
class GlobalODERegularization(ODERegularizer):
    """Adds to the training loss how hard all steps of the solve are, differentiated through the solver.

    The baseline of :class:`LocalODERegularization`, with the same logs under ``global_reg/``. It needs blocks without
    adjoint, and keeps the whole solve in memory.

    Args:
        block: As for :class:`LocalODERegularization`.
        coeff: Of the term, at the beginning of training; the authors take 100 to 10 for errors, and a constant 0.1 for
            stiffness.
        coeff_end: At its end.
        decay: ``"exponential"`` or ``"constant"``.
        estimate: ``"error"`` (ERNODE) or ``"stiffness"`` (SRNODE).
        reduction: Over the steps: None takes the mean of errors and the largest stiffness.
        every_n_steps: Add the term in every so many steps, unscaled.
        decay_steps: Optimizer steps over which the coefficient decays; None takes the length of training.

    Raises:
        ValueError: If a value is out of its range.
        MisconfigurationException: As :class:`LocalODERegularization`, and for a block with adjoint.

    Cost: with our own solver the backward pass through the error estimates; with torchdiffeq's all accepted steps once
        more.

    Example:
        >>> GlobalODERegularization(estimate="stiffness", coeff=0.1, decay="constant").reduction is None
        True
    """

    prefix = "global_reg"
    needs_graph = True

    def __init__(
        self,
        block: str | nn.Module | None = None,
        *,
        coeff: float = 100.0,
        coeff_end: float = 10.0,
        decay: Decay = "exponential",
        estimate: Estimate = "error",
        reduction: Literal["mean", "sum", "max"] | None = None,
        every_n_steps: int = 1,
        decay_steps: int | None = None,
    ) -> None:
        super().__init__(block, coeff, coeff_end, decay, decay_steps, every_n_steps, seed=0)
        check_choice("estimate", estimate, ("error", "stiffness"))
        check_choice("reduction", reduction, (None, "mean", "sum", "max"))
        self.estimate, self.reduction = estimate, reduction

    @override
    def check_block(self, block: Any) -> None:
        check_estimate(block, self.estimate)
        check_adaptive(block)
        check_differentiable(block)

    @override
    def value_of(self, block: Any, draw: float, generator: torch.Generator) -> Tensor:
        return global_regularization(block, estimate=self.estimate, reduction=self.reduction)
