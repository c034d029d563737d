"""The scheduler under test, the optimizers that it schedules, and the rates that come out."""

import dataclasses
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from ..contract import ContractError, require

STEPS = 12
"""Steps of the runs in which a scheduler is tested: two epochs of six."""
LR = 0.1


@dataclasses.dataclass(frozen=True)
class Subject:
    """A scheduler class and the arguments it is built with, beside the optimizer."""

    cls: type[LRScheduler]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.cls.__name__}({', '.join(f'{name}={value!r}' for name, value in self.kwargs.items())})"

    def build(self, optimizer: torch.optim.Optimizer | None = None, **changes: Any) -> LRScheduler:
        """A new scheduler, of a new optimizer unless one is given."""
        return self.cls(make_optimizer() if optimizer is None else optimizer, **{**self.kwargs, **changes})

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Of the constructor, less the optimizer."""
        return dict(list(inspect.signature(self.cls).parameters.items())[1:])


CHECKS: dict[str, Callable[[Subject], None]] = {}


def check(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
    """Enter a check into the kit under the function's name; the first line of its docstring is the promise."""
    CHECKS[function.__name__] = function
    return function


def make_optimizer(*rates: float | Tensor, gradient: float = 1.0) -> torch.optim.Optimizer:
    """SGD with momentum and weight decay, with one group a rate (by default one of 0.1) and a constant gradient."""
    groups = []
    for rate in rates or (LR,):
        weight = nn.Parameter(torch.ones(3))
        weight.grad = torch.full((3,), gradient)
        groups.append({"params": [weight], "lr": rate})
    return torch.optim.SGD(groups, lr=LR, momentum=0.9, weight_decay=0.1)


def rates(scheduler: LRScheduler, steps: int = STEPS) -> list[list[float]]:
    """The rates of each group in the next steps, each followed by a step of optimizer and scheduler."""
    seen = []
    for _ in range(steps):
        seen.append(current(scheduler))
        scheduler.optimizer.step()
        advance(scheduler)
    return seen


def advance(scheduler: LRScheduler) -> None:
    """One step, without torch's advice on the order of calls: copied optimizers have lost its marks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler.step()


def current(scheduler: LRScheduler) -> list[float]:
    """The rates that the groups have."""
    return [float(group["lr"]) for group in scheduler.optimizer.param_groups]


def require_rates(actual: list[list[float]], expected: list[list[float]], what: str, tolerance: float = 0.0) -> None:
    """Require the same rates, to a relative tolerance."""
    require(len(actual) == len(expected), f"{what}: {len(actual)} steps, not {len(expected)}")
    for step, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if len(a) != len(b) or any(not abs(x - y) <= tolerance * abs(y) for x, y in zip(a, b, strict=True)):
            raise ContractError(f"{what}: the rates of step {step} are {a}, not {b}")
