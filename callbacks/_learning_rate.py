"""Reading and setting the learning rate of an optimizer whose groups may have different ones."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer


def only_optimizer(trainer: pl.Trainer, callback: pl.Callback) -> Optimizer:
    """The Trainer's optimizer; to be called in ``on_fit_start``.

    Raises:
        MisconfigurationException: If there are none or several.
    """
    optimizers = [optimizer for optimizer in trainer.optimizers if optimizer.param_groups]  # Lightning's mock has none
    if len(optimizers) != 1:
        raise MisconfigurationException(
            f"{type(callback).__name__} needs a run with one optimizer, this one has {len(optimizers)}."
        )
    return optimizers[0]


def largest_lr(optimizer: Optimizer) -> float:
    """The largest learning rate of the groups."""
    return max(float(group["lr"]) for group in optimizer.param_groups)


def scale_lr(trainer: pl.Trainer, optimizer: Optimizer, factor: float) -> None:
    """Multiply the rate of every group, and what schedulers start from, so that schedules keep their shape."""
    for group in optimizer.param_groups:
        set_lr(group, float(group["lr"]) * factor)
        for name in ("initial_lr", "max_lr", "min_lr"):  # the latter two are OneCycleLR's
            if name in group:
                group[name] = float(group[name]) * factor
    for scheduler in schedulers(trainer):
        for name in ("base_lrs", "max_lrs", "_last_lr"):  # max_lrs is CyclicLR's
            if hasattr(scheduler, name):
                setattr(scheduler, name, [float(lr) * factor for lr in getattr(scheduler, name)])


def schedulers(trainer: pl.Trainer) -> list[Any]:
    """The Trainer's schedulers, and those that they are made of (``SequentialLR``, ``ChainedScheduler``)."""
    found = [config.scheduler for config in trainer.lr_scheduler_configs]
    for scheduler in found:
        found += vars(scheduler).get("_schedulers", [])  # torch has no public name for them
    return found


def multiply_lr(optimizer: Optimizer, factor: float) -> None:
    """Multiply the rate of every group, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].mul_(factor)
        else:
            group["lr"] *= factor


def set_lr(group: dict[str, Any], lr: float) -> None:
    """Set the rate of a group, in place where it is a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
