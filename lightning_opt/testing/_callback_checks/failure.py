"""After an error in training everything is in order."""

import contextlib
from typing import Any

import torch

from ..contract import require
from .problem import Problem
from .subject import Subject, check, require_equal, run, without_volatile

FAIL_AT = 7
FAIL_EARLY_AT = 1  # where batches may grow, so that there are few


@check
def an_error_passes_through(subject: Subject) -> None:
    """An error in ``training_step`` reaches the caller as it is."""
    module = _failing(subject)
    error = _fail(subject, module)
    require(error is module.error, f"{type(error).__name__} came out: {error}" if error else "no error came out")


@check
def removes_its_hooks(subject: Subject) -> None:
    """Neither a fit nor an error leaves hooks on module, parameters or optimizer, or gradients switched off."""
    failed = _failing(subject)
    _fail(subject, failed)
    for when, module in (("a fit", subject.outcome.module), ("an error", failed)):
        hooks = [f"{name} of {type(part).__name__}" for part in module.modules() for name in _hooks(part)]
        hooks += [f"{name} of {parameter}" for parameter, p in module.named_parameters() for name in _hooks(p)]
        hooks += [f"{name} of the optimizer" for optimizer in module.made for name in _hooks(optimizer)]
        require(not hooks, f"left after {when}: {', '.join(hooks)}")
    require(torch.is_grad_enabled(), "gradients are switched off")


@check
def fits_again_after_an_error(subject: Subject) -> None:
    """After an error the same callback fits another run as a new one does."""
    callback = subject.build()
    with contextlib.suppress(RuntimeError):
        run(callback, module=_failing(subject))
    again = run(callback, **subject.setting)
    require_equal(again.parameters, subject.outcome.parameters, "parameters after the second fit")
    require_equal(again.rows, subject.outcome.rows, "logged values of the second fit")
    state = without_volatile(again.state)
    require_equal(state, without_volatile(subject.outcome.state), "state after the second fit")


def _failing(subject: Subject) -> Problem:
    return subject.problem(fail_at=FAIL_EARLY_AT if "batch size" in subject.owns else FAIL_AT)


def _fail(subject: Subject, module: Problem) -> BaseException | None:
    try:
        subject.run(module=module)
    except BaseException as error:
        return error
    return None


def _hooks(owner: Any) -> list[str]:
    """Names of the hook tables of a module, parameter or optimizer that are not empty."""
    names = {name for name in vars(owner) if name.endswith("_hooks")}
    if isinstance(owner, torch.Tensor):
        names |= {"_backward_hooks", "_post_accumulate_grad_hooks"}
    return sorted(name for name in names if getattr(owner, name))
