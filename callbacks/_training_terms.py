"""Adding terms to the loss that ``training_step`` returns, under DDP, autocast and accumulation alike.

Lightning looks ``training_step`` up on the instance at every batch, inside what DDP and the precision plugin wrap, and
divides what it returns by the number of micro-batches: so the terms are added there.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import lightning.pytorch as pl
from torch import Tensor


class Term(Protocol):
    """Something that a callback adds to the training loss."""

    def before_step(self) -> None:
        """Called before ``training_step``."""

    def after_step(self) -> Tensor | None:
        """Called behind it: what to add to the loss, or None."""


def add_term(pl_module: pl.LightningModule, term: Term) -> None:
    """Add a term to the loss of every ``training_step`` from now on."""
    step: Any = vars(pl_module).get("training_step")
    if not hasattr(step, "terms"):
        step = _with_terms(pl_module.training_step)
        vars(pl_module)["training_step"] = step
    step.terms.append(term)


def remove_term(pl_module: pl.LightningModule, term: Term) -> None:
    """Take a term away again; the last one restores ``training_step``."""
    step: Any = vars(pl_module).get("training_step")
    terms = getattr(step, "terms", [])
    if any(t is term for t in terms):
        terms[:] = [t for t in terms if t is not term]
        if not terms:
            del vars(pl_module)["training_step"]


def _with_terms(training_step: Callable[..., Any]) -> Callable[..., Any]:
    terms: list[Term] = []

    @functools.wraps(training_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        for term in terms:
            term.before_step()
        output = training_step(*args, **kwargs)
        for term in terms:
            value = term.after_step()
            if value is not None:
                output = _added(output, value)
        return output

    step.terms = terms  # type: ignore[attr-defined]
    return step


def _added(output: Any, value: Tensor) -> Any:
    """What ``training_step`` returned, a loss, a dict with one or None for a batch that is skipped, with the term."""
    if output is None:
        return None
    if isinstance(output, dict):
        return {**output, "loss": output["loss"] + value.to(output["loss"].dtype)}
    return output + value.to(output.dtype)
