"""How long a scheduler of ours or of torch's goes on."""

from typing import Any

from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
)

from ._base import StepSchedule

_ARGUMENT: dict[type[LRScheduler], str] = {
    ConstantLR: "total_iters",
    CosineAnnealingLR: "T_max",
    LinearLR: "total_iters",
    OneCycleLR: "total_steps",
    PolynomialLR: "total_iters",
}


def horizon(scheduler: Any) -> tuple[str, int] | None:
    """The number of calls of ``step`` behind which a schedule is over, and the argument that says it.

    Args:
        scheduler: Any scheduler. Of torch's, those that end in their final rate are known, and ``SequentialLR``.

    Returns:
        For example ``("total_steps", 1000)``, or None where there is no end or none is known.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> horizon(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20))
        ('T_max', 20)
    """
    if isinstance(scheduler, StepSchedule):
        return ("total_steps", scheduler.total_steps) if scheduler.ends and scheduler.total_steps else None
    if isinstance(scheduler, SequentialLR):
        own = vars(scheduler)  # torch has no public name for its parts
        last = horizon(own["_schedulers"][-1])
        return None if last is None else (last[0], own["_milestones"][-1] + last[1])
    name = next((name for cls, name in _ARGUMENT.items() if type(scheduler) is cls), None)
    return None if name is None else (name, int(getattr(scheduler, name)))
