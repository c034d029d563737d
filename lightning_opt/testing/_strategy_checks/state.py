"""State: what a checkpoint is made of, and that every rank resumes from it exactly."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .._callback_checks.state import foreign_types
from ..contract import require
from .fit import EPOCHS
from .subject import Subject, check, require_equal, require_trained


@check
def state_is_tensors_and_builtins(subject: Subject) -> None:
    """A checkpoint holds tensors and Python builtins only, and loads with ``weights_only``."""
    with tempfile.TemporaryDirectory() as folder:
        subject.run(folder=folder, max_epochs=1)
        checkpoint = torch.load(Path(folder, "last.ckpt"), weights_only=False)
        foreign = foreign_types(checkpoint)
        require(not foreign, f"neither tensors nor builtins: {', '.join(foreign)}")
        torch.load(Path(folder, "last.ckpt"), weights_only=True)


@check
def resumes_exactly(subject: Subject) -> None:
    """A run that is killed within or at the end of an epoch and resumed ends, logs and has state as the whole run."""
    with tempfile.TemporaryDirectory() as folder:
        epoch = subject.outcome[0]["batches"] // EPOCHS
        moments = [epoch - 2, epoch, epoch + 3]  # within the first epoch, at its end, within the second
        whole = subject.run(folder=folder, save_after=moments)
        require_trained(whole)
        expected = _checkpoint(folder)
        for batch in moments:
            with tempfile.TemporaryDirectory() as other:
                resumed = subject.run(folder=other, ckpt_path=str(Path(folder, f"{batch}.ckpt")), seed=99)
                what = f"resumed behind batch {batch} against uninterrupted"
                for rank in range(2):
                    for part in ("parameters", "optimizers"):
                        require_equal(resumed[rank][part], whole[rank][part], f"{what}: {part} of rank {rank}")
                require_equal(_later(resumed[0], batch), _later(whole[0], batch), f"{what}: logged values")
                require_equal(_checkpoint(other), expected, f"{what}: last checkpoint")


def _checkpoint(folder: str) -> dict[str, Any]:
    """The last checkpoint, without counters of Lightning's that tell a resumed run from another."""
    return dict(_without_loops(torch.load(Path(folder, "last.ckpt"), weights_only=True)))


def _without_loops(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if key not in ("loops", "progress"):
            yield key, dict(_without_loops(value)) if isinstance(value, dict) else value


def _later(told: dict[str, Any], step: int) -> dict[str, float]:
    """Logged values from the checkpoint's own step on; loggers count from 0."""
    return {f"{name} in step {s}": value for name, s, value in told["rows"] if s >= step}
