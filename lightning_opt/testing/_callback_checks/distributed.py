"""Two ranks of distributed data-parallel training."""

import datetime
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from .._ranks import on_two_ranks
from ..contract import ContractError, NotApplicable, Report, evaluate, require, same_random_state
from .subject import Outcome, Subject, require_equal, run


def check_callbacks_ddp(callbacks: Iterable[tuple[type[pl.Callback], dict[str, Any]]]) -> Report:
    """Fit with two ranks of DDP: both must end with the same parameters, and rank zero must log what one process logs.

    An observer (see :func:`check_callback`) must not change what comes out. One pair of processes serves all callbacks,
    so check many at once.

    Args:
        callbacks: Classes and the arguments that they are built with; both must be picklable.

    Returns:
        The report, with the callbacks in the place of checks.

    Raises:
        ContractError: If one of them fails, after all have run, with the report as its message.

    Cost:
        Two processes that import torch and Lightning, then some 0.2 s a callback. A script that calls this needs
        ``if __name__ == "__main__":``.
    """
    subjects = [Subject(cls, kwargs) for cls, kwargs in callbacks]
    first, second = on_two_ranks(_fit_all, subjects)
    rows = zip(subjects, first, second, strict=True)
    checks = [(str(subject), functools.partial(_compare, subject, *ranks)) for subject, *ranks in rows]
    return evaluate("2 ranks of DDP", checks)


def _compare(subject: Subject, first: dict[str, Any], second: dict[str, Any]) -> None:
    errors = [f"rank {rank}: {r['error']}" for rank, r in enumerate((first, second)) if "error" in r]
    require(not errors, "; ".join(errors))
    if "refused" in first:
        raise NotApplicable(f"refused in setup: {first['refused']}")
    for name in ("steps", "parameters", "optimizers"):
        require_equal(second["with"][name], first["with"][name], f"{name} of rank 1 against rank 0")
        if subject.is_observer:
            require_equal(first["with"][name], first["without"][name], f"{name} with the callback against without")
    with same_random_state():
        alone = subject.outcome
    missing = sorted({name for name, _ in alone.rows} - set(first["with"]["logged"]))
    require(not missing, f"not logged by rank zero: {', '.join(missing)}")


def _fit_all(subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    """What one rank has after a fit with each callback, and without."""
    done: list[dict[str, Any]] = []
    without = functools.cache(lambda: _values(run(**_options())))
    for subject in subjects:
        try:
            if done and "error" in done[-1]:
                raise ContractError("the ranks lost each other in an earlier run")
            done.append({"with": _values(subject.run(**_options())), "without": without()})
        except MisconfigurationException as error:
            done.append({"refused": str(error)})
        except Exception as error:
            done.append({"error": f"{type(error).__name__}: {error}"})
    return done


def _options() -> dict[str, Any]:
    # a rank that waits in vain for the other must not wait for long
    strategy = DDPStrategy(process_group_backend="gloo", timeout=datetime.timedelta(seconds=60))
    return {"devices": 2, "strategy": strategy, "batch_size": 4}


def _values(outcome: Outcome) -> dict[str, Any]:
    return {
        "steps": outcome.trainer.global_step,
        # not buffers: DDP sends those of rank zero out before the next batch only
        "parameters": {name: p.detach() for name, p in outcome.module.named_parameters()},
        "optimizers": outcome.optimizers,
        "logged": sorted({name for name, _ in outcome.rows}),
    }
