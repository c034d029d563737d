"""The contract of callbacks: one named check a promise."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl

from ._callback_checks import CHECKS, Subject
from .contract import Report, bind, evaluate


def check_callback(cls: type[pl.Callback], /, **kwargs: Any) -> Report:
    """Put a Lightning callback through every check of the contract.

    The contract is what a user of the Trainer needs: typed arguments that a config can give; state of tensors and
    builtins; exact resume; copies and pickles; no use of global random state; accumulation, clipping, mixed precision,
    several groups, frozen parameters, a compiled network, manual optimization, data without length, sanity checks,
    ``fast_dev_run``, evaluation alone, any number of loggers; order after an error. A setting of the Trainer may be
    refused by a MisconfigurationException before the first step; its check is then reported as not applicable.

    The registry tells what a callback promises beyond that: the capability ``"observer"`` that training is bit for bit
    the same with it and without, and that it waits for no device on steps that are not logged; ``log_prefix`` where its
    logs go; ``"ode"`` that it acts on layers that solve a differential equation, so that the problem has one.

    A callback that sets the learning rate, the batch size or the closure says so in its attribute ``owns``; Lightning's
    own are known. It must refuse another owner of the same, may refuse a schedule beside it (it is then tested without
    one, and by SGD where it refuses Adam), and must leave to each step the mean gradient over its examples. A callback
    without ``owns`` must leave learning rates and batches as they are.

    Data-parallel training needs processes of its own: :func:`check_callbacks_ddp`.

    Args:
        cls: A subclass of ``lightning.pytorch.Callback``, of any package.
        **kwargs: The arguments that it is built with.

    Returns:
        The report; ``print`` it.

    Raises:
        ContractError: If a check fails, after all have run, with the report as its message.

    Cost:
        About 30 fits of 12 steps, on one thread of the CPU, 3 s in all; no files outside the temporary folder.

    Example:
        >>> from lightning.pytorch.callbacks import LambdaCallback
        >>> from lightning_opt.testing import ContractError, check_callback
        >>> try:
        ...     check_callback(LambdaCallback)
        ... except ContractError as error:
        ...     print("repr_names_the_arguments" in error.report.failed)
        True
    """
    return evaluate(str(Subject(cls, kwargs)), callback_checks(cls, **kwargs))


def callback_checks(cls: type[pl.Callback], /, **kwargs: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    """The checks of :func:`check_callback` one by one, for ``pytest.mark.parametrize``.

    Args:
        cls: A subclass of ``lightning.pytorch.Callback``.
        **kwargs: The arguments that it is built with.

    Yields:
        The name of a check, and a function that raises ContractError, raises NotApplicable (which pytest reports as
        skipped), or returns.

    Example:
        >>> from lightning_opt.callbacks import RunReport
        >>> checks = dict(callback_checks(RunReport))
        >>> checks["arguments_are_typed"]()
    """
    return bind(CHECKS, Subject(cls, kwargs))
