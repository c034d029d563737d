"""What curvature means to an optimizer: as it is for SGD, in the metric of the second moments for Adam's family."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_opt.curvature import CurvatureOperator, PreconditionedOperator, ShiftedOperator

ADAM_FAMILY = (torch.optim.Adam, torch.optim.NAdam)  # AdamW is an Adam


def in_metric(
    operator: CurvatureOperator, optimizer: Optimizer, *, weight_decay: bool = False
) -> CurvatureOperator | None:
    r"""The curvature that decides what rates are stable; None before Adam's first step, whose size is its rate anyway.

    Adam is gradient descent preconditioned by :math:`D = \sqrt{\hat v} + \epsilon` (arXiv:2207.14484).

    Args:
        operator: That of the loss.
        optimizer: Which moves the parameters.
        weight_decay: Count the optimizer's weight decay as part of the loss. Where it is decoupled, as in AdamW, it
            acts beside the metric.
    """
    if weight_decay:
        operator = _decayed(operator, optimizer, decoupled=False)
    if not isinstance(optimizer, ADAM_FAMILY):
        return operator
    diagonals: dict[int, Tensor] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if "exp_avg_sq" in state:
                moment = state.get("max_exp_avg_sq", state["exp_avg_sq"])
                corrected = moment / (1 - float(group["betas"][1]) ** float(state["step"]))
                diagonals[id(p)] = corrected.sqrt().add_(group["eps"])
    if not diagonals:
        return None
    parts = [diagonals.get(id(p), torch.ones_like(p)) for p in operator.params]
    preconditioned = PreconditionedOperator(operator, operator.flatten(parts))
    return _decayed(preconditioned, optimizer, decoupled=True) if weight_decay else preconditioned


def _decayed(operator: CurvatureOperator, optimizer: Optimizer, *, decoupled: bool) -> CurvatureOperator:
    """With the weight decay of the groups where it is of this kind."""
    decay = {
        id(p): float(group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
        if bool(group.get("decoupled_weight_decay")) == decoupled
    }
    if not any(decay.values()):
        return operator
    return ShiftedOperator(
        operator, operator.flatten([torch.full_like(p, decay.get(id(p), 0.0)) for p in operator.params])
    )


def momentum_of(optimizer: Optimizer) -> float:
    """The largest momentum of the groups: that of SGD, or the first beta of Adam's family."""
    return max(
        float(group["momentum"] if "momentum" in group else group.get("betas", (0.0,))[0])
        for group in optimizer.param_groups
    )


def heavy_ball_unit(optimizer: Optimizer) -> float:
    """What a rate must be multiplied by to be that of a heavy ball: a moving average weighs a gradient by 1 - beta."""
    return 1 - momentum_of(optimizer) if isinstance(optimizer, ADAM_FAMILY) else 1.0
