"""The callback under test, the problem it is tested on, and what came out of a run."""

import contextlib
import copy
import dataclasses
import functools
import io
import logging
import random
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_opt import registry
from lightning_opt.callbacks._ownership import Possession, possessions
from lightning_opt.data import ResumableLoader

from ..contract import ContractError, NotApplicable, require
from .problem import Problem, WithoutLength, data

EPOCHS, BATCHES, LOG_EVERY = 2, 6, 2
VOLATILE = ("wall_time",)
"""Keys of a callback's state that may differ between a resumed and an uninterrupted run."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A callback class and the arguments it is built with."""

    cls: type[pl.Callback]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.cls.__name__}({', '.join(f'{name}={value!r}' for name, value in self.kwargs.items())})"

    def build(self) -> pl.Callback:
        """A new callback."""
        return self.cls(**self.kwargs)

    @functools.cached_property
    def entry(self) -> registry.Entry | None:
        """What the registry knows about the class."""
        return next((entry for entry in registry.entries("callback") if entry.target is self.cls), None)

    def needs_observer(self) -> None:
        """Raise NotApplicable unless the class is registered as one that only watches."""
        if not self.is_observer:
            raise NotApplicable(f"{self} is not registered with the capability 'observer', or sets something")

    @property
    def is_observer(self) -> bool:
        """Whether training must be the same with and without it: so registered, and it sets nothing as it is built."""
        return self.entry is not None and "observer" in self.entry.capabilities and not self.owns

    @property
    def is_for_odes(self) -> bool:
        """Whether it acts on layers that solve a differential equation."""
        return self.entry is not None and "ode" in self.entry.capabilities

    @functools.cached_property
    def owns(self) -> frozenset[Possession]:
        """What it sets that nobody else may set."""
        return possessions(self.build())

    @functools.cached_property
    def setting(self) -> dict[str, Any]:
        """The options of the problem that it is tested on.

        A callback that sets the learning rate may refuse a schedule beside it, and Adam: then it is tested without. One
        with the capability ``"ode"`` is tested on a module that solves a differential equation.
        """
        settings: list[dict[str, Any]] = [{}, {"scheduled": False}, {"scheduled": False, "adam": False}]
        if self.is_for_odes:
            return {"ode": True}
        for setting in settings if self.owns else []:
            try:
                run(self.build(), **setting, max_steps=1, limit_val_batches=0)
            except MisconfigurationException:
                continue
            return setting
        return {}

    def problem(self, **options: bool | int) -> Problem:
        """A new problem that it can be tested on."""
        return Problem(**{**self.setting, **options})  # type: ignore[arg-type]

    def run(self, *others: pl.Callback, **options: Any) -> "Outcome":
        """Fit with a new callback, in the problem that it can be tested on."""
        return run(self.build(), *others, **{**self.setting, **options})

    @functools.cached_property
    def outcome(self) -> "Outcome":
        """Of the standard run."""
        return self.run()

    def run_or_refuse(self, **options: Any) -> "Outcome":
        """Run in a setting that a callback may refuse, which it must do clearly and before the first step.

        Raises:
            NotApplicable: If it does.
        """
        module = self.problem(**{k: v for k, v in options.items() if k in Problem.options})
        try:
            outcome = self.run(module=module, **options)
        except MisconfigurationException as error:
            require(module.batches == 0, f"refused after {module.batches} batches only: {error}")
            raise NotApplicable(f"refused in setup: {error}") from error
        if self.is_observer:
            require_same_training(outcome, baseline(**options), "with the callback against without")
        return outcome


CHECKS: dict[str, Callable[[Subject], None]] = {}


def check(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
    """Enter a check into the kit under the function's name; the first line of its docstring is the promise."""
    CHECKS[function.__name__] = function
    return function


class Rows(Logger):
    """Keeps what is logged, by name and step; NaN is a value like any other."""

    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[tuple[str, int], float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep them; a row that is logged again replaces the first."""
        self.values.update({(name, step or 0): float(value) for name, value in metrics.items()})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Ignored."""


@dataclasses.dataclass
class Outcome:
    """What a run left behind."""

    trainer: pl.Trainer
    module: Problem
    callback: pl.Callback | None
    parameters: dict[str, Tensor]
    optimizers: list[dict[str, Any]]
    rows: dict[tuple[str, int], float]
    state: dict[str, Any]
    random_states: dict[str, Any]
    files: set[str]


def run(
    *callbacks: pl.Callback,
    module: Problem | None = None,
    folder: Path | None = None,
    ckpt_path: Path | None = None,
    batch_size: int = 8,
    shuffle: bool = True,
    length: bool = True,
    seed: int = 0,
    **options: Any,
) -> Outcome:
    """Fit the problem with callbacks; the first one is under test.

    Args:
        *callbacks: For the Trainer.
        module: The problem.
        folder: Where files go; a temporary folder by default.
        ckpt_path: Resume from here.
        batch_size: Of the 48 training examples.
        shuffle: Whether their order is random, from a generator of its own.
        length: Whether the training data have one.
        seed: Of the global random states.
        **options: For the problem and for the Trainer.
    """
    of_problem = {name: options.pop(name) for name in Problem.options if name in options}
    module = module or Problem(**of_problem)
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_thread())
        folder = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(quiet())
        logger = Rows()
        trainer = make_trainer(folder, callbacks, **{"logger": logger, **options})
        loader = (
            ResumableLoader(TensorDataset(*data()), batch_size, shuffle=shuffle, seed=1)
            if length
            else DataLoader(WithoutLength(), batch_size)
        )
        seed_everything(seed)
        trainer.fit(module, loader, DataLoader(TensorDataset(*data()), 16), ckpt_path=ckpt_path)
        files = {str(path.relative_to(folder)) for path in folder.rglob("*")}
        return Outcome(
            trainer,
            module,
            callbacks[0] if callbacks else None,
            {name: value.detach().clone() for name, value in module.state_dict().items()},
            copy.deepcopy([optimizer.state_dict() for optimizer in trainer.optimizers]),
            logger.values,
            copy.deepcopy(callbacks[0].state_dict()) if callbacks else {},
            {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()},
            files,
        )


def make_trainer(folder: Path, callbacks: tuple[pl.Callback, ...], **options: Any) -> pl.Trainer:
    """A Trainer for the problem."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": EPOCHS,
        "log_every_n_steps": LOG_EVERY,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return pl.Trainer(**{**defaults, **options}, callbacks=list(callbacks))


@functools.cache
def baseline(**options: Any) -> Outcome:
    """The run without any callback."""
    return run(**options)


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The problem is too small to share, and a second thread that is waited for costs ten times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's advice, warnings, and what a callback prints."""
    chatter = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning_utilities")]
    levels = [logger.level for logger in chatter]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in chatter:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(chatter, levels, strict=True):
                logger.setLevel(level)


def require_trained(subject: Subject, outcome: Outcome) -> None:
    """Require one counted step a batch, or fewer where the callback sets the batch size, and no example left out."""
    steps, made = outcome.trainer.global_step, len(outcome.module.steps)
    require(steps == made, f"global_step is {steps} after {made} optimizer steps")
    require(steps == EPOCHS * BATCHES or "batch size" in subject.owns, f"{steps} steps, not {EPOCHS * BATCHES}")
    for epoch in range(EPOCHS):
        seen = torch.cat([numbers for when, numbers in outcome.module.seen if when == epoch]).tolist()
        odd = sorted(i for i in range(len(data()[0])) if seen.count(i) != 1)
        require(not odd, f"in epoch {epoch} example {odd[:1]} was trained on {seen.count(odd[0]) if odd else 1} times")


def require_same_training(actual: Outcome, expected: Outcome, what: str) -> None:
    """Require the same parameters, optimizer state, number of steps and logged values, bit for bit."""
    require_equal(actual.parameters, expected.parameters, f"{what}: parameters and buffers")
    require_equal(actual.optimizers, expected.optimizers, f"{what}: optimizer state")
    steps = actual.trainer.global_step, expected.trainer.global_step
    require(steps[0] == steps[1], f"{what}: {steps[0]} steps, not {steps[1]}")
    shared = {key: actual.rows.get(key) for key in expected.rows}
    require_equal(shared, expected.rows, f"{what}: logged values")


def require_equal(actual: Any, expected: Any, what: str) -> None:
    """Require the same structure, types and bits."""
    difference = next(differences(actual, expected), None)
    if difference is not None:
        raise ContractError(f"{what}: {difference}")


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Where two nested structures of tensors and builtins differ."""
    if type(a) is not type(b) and not (isinstance(a, (int, float)) and isinstance(b, (int, float))):
        yield f"{where or 'it'} is {_short(a)}, not {_short(b)}"
    elif isinstance(a, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            yield f"{where} has shape {tuple(a.shape)} and {a.dtype}, not {tuple(b.shape)} and {b.dtype}"
        elif not bool(((a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b).all()):
            yield f"{where} differs by up to {(a.double() - b.double()).abs().max().item():.3g}"
    elif isinstance(a, np.ndarray):
        if not np.array_equal(a, b):
            yield f"{where} differs"
    elif isinstance(a, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            if key not in a or key not in b:
                yield f"{where}[{key!r}] is only in {'the first' if key in a else 'the second'}"
            else:
                yield from differences(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            yield f"{where} has {len(a)} entries, not {len(b)}"
        for index, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from differences(x, y, f"{where}[{index}]")
    elif a != b and not (a != a and b != b):
        yield f"{where or 'it'} is {_short(a)}, not {_short(b)}"


def described(callback: Any) -> str:
    """Its ``repr`` without the address that Python's own has."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(callback))


def without_volatile(state: Any) -> Any:
    """A state without the keys that time decides."""
    if isinstance(state, dict):
        return {key: without_volatile(value) for key, value in state.items() if key not in VOLATILE}
    return state


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
