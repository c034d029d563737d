"""The contract of optimizers: one named check a promise."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch.optim import Optimizer

from ._optimizer_checks import CHECKS, Subject
from .contract import ContractError, NotApplicable, Report, evaluate, same_random_state


def check_optimizer(cls: type[Optimizer], /, **kwargs: Any) -> Report:
    """Put an optimizer through every check of the contract.

    Args:
        cls: A subclass of ``torch.optim.Optimizer``, of any package.
        **kwargs: What it is built with. The learning rate must be one with which 500 steps halve a quadratic of
            curvature 1 to 5 from 10% off its solution at weights of size 1; tensors have at most 64 entries.

    Returns:
        The report; print it.

    Raises:
        ContractError: If a check fails, with the report as its message.

    Example:
        >>> from lightning_opt.testing import check_optimizer
        >>> report = check_optimizer(AdaBelief, lr=1e-2)
    """
    return evaluate(str(Subject(cls, kwargs)), optimizer_checks(cls, **kwargs))


def optimizer_checks(cls: type[Optimizer], /, **kwargs: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    """One by one."""
    subject = Subject(cls, kwargs)
    for name, check in CHECKS.items():
        yield name, functools.partial(_run, name, check, subject)


def _run(name: str, check: Callable[[Subject], None], subject: Subject) -> None:
    promise = (check.__doc__ or "").partition("\n")[0]
    try:
        with same_random_state():
            check(subject)
    except NotApplicable:
        raise
    except Exception as error:
        what = str(error) if isinstance(error, ContractError) else f"raised {type(error).__name__}: {error}"
        raise ContractError(f"{name}: {promise} But: {what}") from error
