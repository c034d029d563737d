"""What the contract kits share: named checks, their errors and their report."""

import dataclasses
import functools
import random
import unittest
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")


class ContractError(AssertionError):
    """A plugin breaks a promise of the contract; the message names the check, the promise and what came out.

    Attributes:
        report: What became of every check, where several were run.
    """

    def __init__(self, message: str, report: "Report | None" = None) -> None:
        super().__init__(message)
        self.report = report


class NotApplicable(unittest.SkipTest):
    """A check asks for an option that the plugin does not offer. pytest reports it as skipped, with the reason."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every check of one plugin.

    Attributes:
        subject: The plugin and its settings.
        passed: Names of the checks that hold.
        not_applicable: Name to reason, for the options that the plugin does not offer.
        failed: Name to what came out.
    """

    subject: str
    passed: tuple[str, ...]
    not_applicable: dict[str, str]
    failed: dict[str, str]

    def __str__(self) -> str:
        counts = f"{len(self.passed)} passed, {len(self.not_applicable)} not applicable, {len(self.failed)} failed"
        lines = [f"{self.subject}: {counts}"]
        lines += [f"  failed          {name}: {message}" for name, message in self.failed.items()]
        lines += [f"  not applicable  {name}: {reason}" for name, reason in self.not_applicable.items()]
        lines += [f"  passed          {name}" for name in self.passed]
        return "\n".join(lines)


def evaluate(subject: str, checks: Iterable[tuple[str, Callable[[], None]]]) -> Report:
    """Run named checks one after the other.

    Args:
        subject: The plugin and its settings, for the report.
        checks: Names and functions; each raises ContractError or NotApplicable, or returns.

    Raises:
        ContractError: After all have run, listing those that failed.
    """
    passed: list[str] = []
    not_applicable: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name, check in checks:
        try:
            check()
        except NotApplicable as reason:
            not_applicable[name] = str(reason)
        except ContractError as error:
            failed[name] = str(error)
        else:
            passed.append(name)
    report = Report(subject, tuple(passed), not_applicable, failed)
    if failed:
        raise ContractError(str(report), report)
    return report


def bind(checks: Mapping[str, Callable[[T], None]], subject: T) -> Iterator[tuple[str, Callable[[], None]]]:
    """The checks of one subject: names, and functions without arguments.

    Each function leaves the global random state as it was, and every error becomes a ContractError that begins with
    the check's name and its promise (the first line of its docstring).
    """
    for name, check in checks.items():
        yield name, functools.update_wrapper(functools.partial(_run, name, check, subject), check)


def _run(name: str, check: Callable[[T], None], subject: T) -> None:
    promise = (check.__doc__ or "").partition("\n")[0]
    try:
        with same_random_state():
            check(subject)
    except NotApplicable:
        raise
    except Exception as error:
        what = str(error) if isinstance(error, ContractError) else f"raised {type(error).__name__}: {error}"
        raise ContractError(f"{name}: {promise} But: {what}") from error


def require(condition: bool | torch.Tensor, message: str) -> None:
    """Raise ContractError with the message unless the condition holds."""
    if not condition:
        raise ContractError(message)


@contextmanager
def same_random_state() -> Iterator[None]:
    """Put the global random states of python, numpy and torch back as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
