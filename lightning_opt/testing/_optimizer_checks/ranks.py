"""Two ranks of distributed data-parallel training."""

import datetime
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_opt.data import ResumableLoader

from .._ranks import on_two_ranks
from ..contract import ContractError, Report, evaluate, require, same_random_state
from .subject import Subject, require_equal, require_near, values
from .training import Regression, data, fit

_NOT_RUN = "not run, since one before it failed and the ranks may have lost each other"


def check_optimizers_ddp(subjects: Iterable[tuple[type[Optimizer], dict[str, Any]]]) -> Report:
    """Train with two ranks of DDP: both must end with the same parameters, those of one process with the whole batch.

    One pair of processes serves all optimizers, so check many at once.

    Args:
        subjects: Classes and the arguments that they are built with; both must be picklable.

    Returns:
        The report, with the optimizers in the place of checks.

    Raises:
        ContractError: If one of them fails, with the report as its message.

    Cost:
        Two processes that import torch and Lightning, then some 20 ms an optimizer. A script that calls this needs
        ``if __name__ == "__main__":``.
    """
    chosen = [Subject(cls, kwargs) for cls, kwargs in subjects]
    results = zip(*on_two_ranks(_train_all, chosen), strict=True)
    checks = [(str(subject), partial(_agree, subject, ranks)) for subject, ranks in zip(chosen, results, strict=True)]
    return evaluate("two ranks of DDP", checks)


def _agree(subject: Subject, ranks: tuple[Any, Any]) -> None:
    for number, result in enumerate(ranks):
        require(not isinstance(result, str), f"rank {number}: {result}")
    require_equal(ranks[0], ranks[1], "rank 0 against rank 1")
    alone = Regression(subject, torch.float64)
    with same_random_state():
        fit(alone, 8)
    require_near(ranks[0], alone.parameters(), "two ranks against one process with the whole batch")


def _train_all(subjects: list[Subject]) -> list[list[Tensor] | str]:
    """The parameters after training with each, or what went wrong."""
    results: list[list[Tensor] | str] = []
    for subject in subjects:
        # ranks need not compile the kernels that each of them would use alike
        module = Regression(subject.with_backend("foreach"), torch.float64)
        try:
            if results and isinstance(results[-1], str):
                raise ContractError(_NOT_RUN)
            strategy = DDPStrategy(process_group_backend="gloo", timeout=datetime.timedelta(seconds=60))
            # a loader that hands every second sample to each rank; Lightning's own sampler would shuffle them first
            fit(module, train_dataloaders=ResumableLoader(data(torch.float64), 4), devices=2, strategy=strategy)
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
        else:
            results.append(values(module.parameters()))
    return results
