"""The contract of strategies: one named check a promise."""

from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch.strategies import Strategy

from ._ranks import TwoRanks
from ._strategy_checks import CHECKS, Subject
from .contract import Report, bind, evaluate


def check_strategy(cls: type[Strategy], /, **kwargs: Any) -> Report:
    """Put a Lightning strategy through every check of the contract, on two ranks of the CPU.

    The contract is what a user of the Trainer needs: typed arguments that a config can give, and a name for
    ``--trainer.strategy``; the same parameters on every rank, bit for bit; checkpoints of tensors and builtins from
    which every rank resumes exactly, within an epoch too; no use of global random state; one ``global_step`` a step;
    accumulation, clipping, mixed precision, several groups, frozen and unused parameters, sparse gradients, a compiled
    network, manual optimization, data without length, sanity checks, ``fast_dev_run``, evaluation alone,
    ``logger=False``; order after an error, and several fits. A setting of the Trainer may be refused by a
    MisconfigurationException before the first step, on every rank; its check is then reported as not applicable.

    Args:
        cls: A subclass of ``lightning.pytorch.strategies.Strategy`` for several processes, of any package, importable
            by name.
        **kwargs: The arguments that it is built with.

    Returns:
        The report; ``print`` it.

    Raises:
        ContractError: If a check fails, after all have run, with the report as its message.

    Cost:
        Two processes that import torch and Lightning, about 8 s, then some 30 fits of 12 steps, 6 s. A script that
        calls this needs ``if __name__ == "__main__":``.

    Example:
        >>> from lightning.pytorch.strategies import DDPStrategy
        >>> if __name__ == "__main__":
        ...     print(check_strategy(DDPStrategy, process_group_backend="gloo"))
    """
    with TwoRanks() as ranks:
        return evaluate(str(Subject(cls, kwargs, ranks)), strategy_checks(cls, ranks, **kwargs))


def strategy_checks(cls: type[Strategy], ranks: TwoRanks, /, **kwargs: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    """The checks of :func:`check_strategy` one by one, for ``pytest.mark.parametrize``.

    Args:
        cls: A subclass of ``lightning.pytorch.strategies.Strategy``.
        ranks: The processes to run on; they may serve the checks of many strategies.
        **kwargs: The arguments that it is built with.

    Yields:
        The name of a check, and a function that raises ContractError, raises NotApplicable (which pytest reports as
        skipped), or returns.

    Example:
        >>> from lightning.pytorch.strategies import DDPStrategy
        >>> checks = dict(strategy_checks(DDPStrategy, TwoRanks()))
        >>> checks["has_a_name"]()
    """
    return bind(CHECKS, Subject(cls, kwargs, ranks))
