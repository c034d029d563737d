"""State: what it is made of, and that saving, copying and resuming change nothing."""

import copy
import io
import pickle
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from lightning_opt.callbacks import ResumeState

from ..contract import require
from .subject import BATCHES, Subject, check, described, require_equal, require_trained, without_volatile

_BUILTINS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


@check
def state_is_tensors_and_builtins(subject: Subject) -> None:
    """``state_dict`` after a fit holds tensors and Python builtins only, and loads with ``weights_only``."""
    state = subject.outcome.state
    foreign = foreign_types(state)
    require(not foreign, f"neither tensors nor builtins: {', '.join(foreign)}")
    require_equal(through_a_file(state), state, "saved and loaded")


@check
def loaded_state_is_the_saved_one(subject: Subject) -> None:
    """``load_state_dict`` of a new callback takes all of it."""
    fresh = subject.build()
    fresh.load_state_dict(through_a_file(subject.outcome.state))
    require_equal(fresh.state_dict(), subject.outcome.state, "state of the loaded callback")


@check
def copies_and_pickles(subject: Subject) -> None:
    """Deep copies and pickles, before and after a fit, have the same arguments and state."""
    assert subject.outcome.callback is not None
    for when, callback in (("before a fit", subject.build()), ("after a fit", subject.outcome.callback)):
        for how, twin in (("copy", copy.deepcopy(callback)), ("pickle", pickle.loads(pickle.dumps(callback)))):
            require(described(twin) == described(callback), f"{how} {when}: {twin!r}, not {callback!r}")
            state, expected = without_volatile(twin.state_dict()), without_volatile(callback.state_dict())
            require_equal(state, expected, f"state of a {how} {when}")


@check
def resumes_exactly(subject: Subject) -> None:
    """A run that is killed within or at the end of an epoch and resumed ends, logs and has state as the whole run."""
    helpers = [] if issubclass(subject.cls, ResumeState) else [ResumeState]
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder))
        whole = subject.run(*(helper() for helper in helpers), saver)
        require_trained(subject, whole)
        for batch in saver.moments(grows="batch size" in subject.owns):
            path, step = saver.files[batch]
            resumed = subject.run(*(helper() for helper in helpers), ckpt_path=path, seed=99)
            what = f"resumed behind batch {batch}, step {step}, against uninterrupted"
            require_equal(resumed.parameters, whole.parameters, f"{what}: parameters and buffers")
            require_equal(resumed.optimizers, whole.optimizers, f"{what}: optimizer state")
            require_equal(without_volatile(resumed.state), without_volatile(whole.state), f"{what}: state")
            # loggers count from 0; the rows of the checkpoint's own step were written before it was killed
            later = {key: value for key, value in whole.rows.items() if key[1] >= step}
            require_equal({key: resumed.rows.get(key) for key in later}, later, f"{what}: logged values")
            extra = {key for key in resumed.rows if key not in whole.rows}
            require(not extra, f"{what}: logged only when resumed: {sorted(extra)}")


class Saver(Checkpoint):
    """Writes a checkpoint behind every batch where ModelCheckpoint does, behind the other callbacks.

    Attributes:
        files: By the number of batches done, the file and the number of steps done.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[int, tuple[Path, int]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Save."""
        batch = len(self.files) + 1
        self.files[batch] = (self.folder / f"{batch}.ckpt", trainer.global_step)
        trainer.save_checkpoint(self.files[batch][0])

    def moments(self, *, grows: bool) -> list[int]:
        """The batches to resume behind: within the first epoch, at its end, within the second."""
        count = len(self.files)
        early = [1, 2, count // 2, count - 1] if grows else [BATCHES - 2, BATCHES, BATCHES + 3]
        return sorted({batch for batch in early if batch in self.files})


def through_a_file(state: Any) -> Any:
    """What is read of a state that was saved, with ``weights_only``."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def foreign_types(state: Any) -> list[str]:
    """Names of the types in a state that are neither tensors nor builtins."""
    return list(dict.fromkeys(_foreign(state)))


def _foreign(value: Any) -> Iterator[str]:
    """What torch.load refuses with ``weights_only``, or what pickles by reference to a class."""
    if type(value) in (dict, OrderedDict, Counter):
        for key, entry in value.items():
            yield from _foreign(key)
            yield from _foreign(entry)
    elif type(value) in (list, tuple, set):
        for entry in value:
            yield from _foreign(entry)
    elif not (isinstance(value, Tensor) or type(value) in _BUILTINS):
        yield type(value).__name__
