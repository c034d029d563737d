"""The contract of optimizers: one named check a promise."""

from collections.abc import Callable, Iterator
from typing import Any

from torch.optim import Optimizer

from ._optimizer_checks import CHECKS, Subject
from .contract import Report, bind, evaluate


def check_optimizer(cls: type[Optimizer], /, **kwargs: Any) -> Report:
    """Put an optimizer through every check of the contract.

    The contract is what ``torch.optim`` does, what a user of the Trainer needs, and exactness: typed arguments and
    strict values; descent; parameter groups; closures; gradients and random state left alone; schedulers and tensor
    rates; ``foreach``, ``fused``, ``capturable``, ``differentiable`` and ``maximize``; sparse, complex, strided, empty,
    many, low-precision and non-finite tensors; state that survives saving, loading, copying and pickling bit for bit;
    resume, accumulation, clipping, mixed precision, compilation and counting under the Trainer. Options that the
    constructor does not take are not held against an optimizer: their checks are reported as not applicable.

    Data-parallel training needs processes of its own: :func:`check_optimizers_ddp`.

    Args:
        cls: A subclass of ``torch.optim.Optimizer``, of any package.
        **kwargs: The arguments that it is built with. The learning rate must be one with which 500 steps halve a
            quadratic of curvature 1 to 5 from 10% off its solution, at weights of size 1. The tensors have at most 64
            elements, of size up to 1.65.

    Returns:
        The report; ``print`` it.

    Raises:
        ContractError: If a check fails, after all have run, with the report as its message.

    Cost:
        About two seconds; no files outside the folder for temporary ones.

    Example:
        >>> import torch
        >>> from lightning_opt.testing import ContractError, check_optimizer
        >>> try:
        ...     check_optimizer(torch.optim.SGD, lr=0.05)
        ... except ContractError as error:
        ...     print("lr=nan is accepted" in str(error))
        True
    """
    return evaluate(str(Subject(cls, kwargs)), optimizer_checks(cls, **kwargs))


def optimizer_checks(cls: type[Optimizer], /, **kwargs: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    """The checks of :func:`check_optimizer` one by one, for ``pytest.mark.parametrize``.

    Args:
        cls: A subclass of ``torch.optim.Optimizer``.
        **kwargs: The arguments that it is built with.

    Yields:
        The name of a check, and a function that raises ContractError, raises NotApplicable (which pytest reports as
        skipped), or returns. The function's docstring is the promise.

    Example:
        In a test file: ``checks = [pytest.param(check, id=name) for name, check in optimizer_checks(Mine, lr=1e-2)]``.

        >>> import torch
        >>> checks = dict(optimizer_checks(torch.optim.SGD, lr=0.05))
        >>> checks["one_step_is_one_global_step"].__doc__
        'Each step counts once in ``trainer.global_step``, with accumulation too.'
        >>> checks["one_step_is_one_global_step"]()
    """
    return bind(CHECKS, Subject(cls, kwargs))
