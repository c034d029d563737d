"""The strategy under test, and what the two ranks tell of it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy

from .._callback_checks.subject import differences
from .._ranks import TwoRanks
from ..contract import ContractError, NotApplicable, require
from .fit import BATCHES, EPOCHS, fit
from .problem import Problem

Told = dict[str, Any]
"""What one rank tells of a run: see :func:`.fit.fit`."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A strategy class, the arguments it is built with, and the ranks that it is tested on."""

    cls: type[Strategy]
    kwargs: dict[str, Any]
    ranks: TwoRanks

    def __str__(self) -> str:
        return f"{self.cls.__name__}({', '.join(f'{name}={value!r}' for name, value in self.kwargs.items())})"

    def build(self, **changes: Any) -> Strategy:
        """A new strategy."""
        return self.cls(**{**self.kwargs, **changes})

    def both(self, function: Callable[..., Told], **options: Any) -> list[Told]:
        """What both ranks tell of ``function(strategy, options)``, errors and refusals included."""
        return self.ranks.call(function, (self.cls, self.kwargs), options)

    def run(self, function: Callable[..., Told] = fit, **options: Any) -> list[Told]:
        """What both ranks tell of a run that must succeed, with the same parameters on both.

        Raises:
            NotApplicable: If both refuse it before the first step, which they may do with a MisconfigurationException.
        """
        told = self.both(function, **options)
        errors = [f"rank {rank} raised {t['error']}" for rank, t in enumerate(told) if "error" in t]
        require(not errors, "; ".join(errors))
        refusals = [t["refused"] for t in told if "refused" in t]
        if refusals:
            require(len(refusals) == 2, f"refused by one rank only: {refusals[0]}")
            batches = max(t["batches"] for t in told)
            require(batches == 0, f"refused after {batches} batches only: {refusals[0]}")
            raise NotApplicable(f"refused in setup: {refusals[0]}")
        require_equal(told[1]["parameters"], told[0]["parameters"], "parameters of rank 1 against rank 0")
        require(told[0]["steps"] == told[1]["steps"], f"steps of the ranks: {[t['steps'] for t in told]}")
        return told

    @functools.cached_property
    def outcome(self) -> list[Told]:
        """Of the standard run."""
        return self.run()


CHECKS: dict[str, Callable[[Subject], None]] = {}


def check(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
    """Enter a check into the kit under the function's name; the first line of its docstring is the promise."""
    CHECKS[function.__name__] = function
    return function


def require_trained(told: list[Told], fits: int = 1, micro_batches: int = 1, **problem: Any) -> None:
    """Require one counted step a batch, and finite parameters that are not those of the start.

    A rank reads half of the data, or all of them.

    Args:
        told: By both ranks.
        fits: Fits of the Trainer, of which the module saw the last.
        micro_batches: That make a step.
        **problem: Options of the problem.
    """
    steps, batches = told[0]["steps"], told[0]["batches"]
    require(steps * micro_batches == batches * fits, f"global_step is {steps} after {batches * fits} batches")
    expected = EPOCHS * BATCHES * micro_batches
    require(batches in (expected, 2 * expected), f"{batches} batches, not {expected}")
    start = dict(Problem(**problem).named_parameters())
    for name, p in told[0]["parameters"].items():
        require(bool(p.isfinite().all()), f"{name} is not finite")
    changed = [n for n, p in told[0]["parameters"].items() if not torch.equal(p, start[n].to(p.dtype))]
    require(bool(changed), "no parameter has changed")


def require_equal(actual: Any, expected: Any, what: str) -> None:
    """Require the same structure, types and bits."""
    difference = next(differences(actual, expected), None)
    if difference is not None:
        raise ContractError(f"{what}: {difference}")
