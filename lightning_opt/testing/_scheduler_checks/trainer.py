"""In a fit of Lightning's Trainer: one step of the schedule for each optimizer step, also when resumed."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from lightning_opt.callbacks import ResumeState

from .._callback_checks.problem import Problem
from .._callback_checks.state import Saver
from .._callback_checks.subject import Outcome, require_equal, run
from .subject import LR, STEPS, Subject, check, rates, require_rates


@check
def steps_once_an_optimizer_step(subject: Subject) -> None:
    """In a fit each optimizer step has the next rate, with accumulated gradients too."""
    expected = rates(subject.build())
    if interval(subject) == "epoch":
        expected = [expected[step // (STEPS // 2)] for step in range(STEPS)]
    for options in ({}, {"accumulate_grad_batches": 2, "batch_size": 4}):
        outcome = _fit(subject, **options)
        require_rates(_rates(outcome), expected, f"in a fit with {options or 'nothing special'}")


@check
def resumes_exactly(subject: Subject) -> None:
    """A fit that is killed within an epoch and resumed has the rates and parameters of the whole run."""
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder))
        whole = _fit(subject, ResumeState(), saver)
        for batch in (4, 6, 9):
            path, step = saver.files[batch]
            resumed = _fit(subject, ResumeState(), ckpt_path=path, seed=99)
            require_rates(_rates(resumed), _rates(whole)[step:], f"resumed at step {step}")
            require_equal(resumed.parameters, whole.parameters, f"resumed at step {step}: parameters and buffers")


def interval(subject: Subject) -> str:
    """When it is stepped; torch's own do not say."""
    return getattr(subject.cls, "interval", "step")


class _Scheduled(Problem):
    """The problem with the scheduler under test."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject = subject

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=LR, momentum=0.9, weight_decay=0.1)
        return [optimizer], [{"scheduler": self.subject.build(optimizer), "interval": interval(self.subject)}]


def _fit(subject: Subject, *callbacks: Any, **options: Any) -> Outcome:
    return run(*callbacks, module=_Scheduled(subject), **options)


def _rates(outcome: Outcome) -> list[list[float]]:
    return [[float(group["lr"]) for group in groups] for _, groups in outcome.module.steps]
