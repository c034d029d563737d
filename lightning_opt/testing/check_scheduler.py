"""The contract of learning-rate schedulers: one named check a promise."""

from collections.abc import Callable, Iterator
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from ._scheduler_checks import CHECKS, Subject
from .contract import Report, bind, evaluate


def check_scheduler(cls: type[LRScheduler], /, **kwargs: Any) -> Report:
    """Put a learning-rate scheduler through every check of the contract.

    The contract is what ``torch.optim.lr_scheduler`` does, what a user of the Trainer needs, and exactness: typed
    arguments that a config can give, and strict values; the class attribute ``interval``; a positive rate in every step
    of the run; groups, tensor rates and ``get_last_lr``; no use of gradients or random state; steps beyond the end;
    sequences; state of tensors and builtins that survives saving, loading, ``last_epoch``, copying and pickling; one
    step of the schedule for each optimizer step of a fit, accumulated and resumed too.

    Args:
        cls: A subclass of ``torch.optim.lr_scheduler.LRScheduler``, of any package.
        **kwargs: The arguments that it is built with, beside the optimizer. It is tested in runs of 12 steps: give that
            as ``total_steps`` where it takes it. The optimizer is SGD with rate 0.1, momentum 0.9 and weight decay 0.1.

    Returns:
        The report; ``print`` it.

    Raises:
        ContractError: If a check fails, after all have run, with the report as its message.

    Cost:
        Six fits of 12 steps, half a second; no files outside the temporary folder.

    Example:
        >>> from torch.optim.lr_scheduler import StepLR
        >>> from lightning_opt.testing import ContractError, check_scheduler
        >>> try:
        ...     check_scheduler(StepLR, step_size=4)
        ... except ContractError as error:
        ...     print("says_its_interval" in error.report.failed)
        True
    """
    return evaluate(str(Subject(cls, kwargs)), scheduler_checks(cls, **kwargs))


def scheduler_checks(cls: type[LRScheduler], /, **kwargs: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    """The checks of :func:`check_scheduler` one by one, for ``pytest.mark.parametrize``.

    Args:
        cls: A subclass of ``torch.optim.lr_scheduler.LRScheduler``.
        **kwargs: The arguments that it is built with, beside the optimizer.

    Yields:
        The name of a check, and a function that raises ContractError, raises NotApplicable (which pytest reports as
        skipped), or returns.

    Example:
        >>> from lightning_opt.schedules import LinearDecayLR
        >>> checks = dict(scheduler_checks(LinearDecayLR, total_steps=12))
        >>> checks["no_step_is_wasted"]()
    """
    return bind(CHECKS, Subject(cls, kwargs))
