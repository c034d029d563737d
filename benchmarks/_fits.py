"""Fits of a Trainer beside each other: what a callback costs of the time of a step."""

import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch


class StepClock(pl.Callback):
    """Wall and CPU seconds from the start of one step to the end of another.

    It must be the last of the callbacks, so that the others are within.

    Attributes:
        last: The last step that is timed; the fit must reach it.
        wall, cpu: Seconds a step, once it has; CPU seconds count all threads.
    """

    def __init__(self, warmup: int, steps: int) -> None:
        self.first, self.steps, self.last = warmup, steps, warmup + steps
        self.wall = self.cpu = 0.0
        self.running = False

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.first and not self.running:
            _synchronize()
            self.running, self.wall, self.cpu = True, -time.perf_counter(), -time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.last and self.running:
            _synchronize()
            self.running = False
            self.wall = (self.wall + time.perf_counter()) / self.steps
            self.cpu = (self.cpu + time.process_time()) / self.steps


def paired_fits(
    fits: dict[str, Callable[[Any], Any]],
    rounds: int,
    *,
    warmup: int = 5,
    steps: int = 40,
    clock: Callable[[int, int], StepClock] = StepClock,
) -> dict[str, dict[str, list[float]]]:
    """Time fits in one process, one of each a round, in an order that turns by one every round.

    Args:
        fits: Name to a function that fits with the clock as its last callback, for at least ``clock.last`` steps.
        rounds: Timed fits of each; one of each runs before them.
        warmup: Steps of a fit before the clock starts.
        steps: Steps that are timed.
        clock: Makes the clocks.

    Returns:
        Under ``"wall"`` and ``"cpu"`` for each name the seconds a step, by round, as ``ratio_summary`` takes them.
    """
    names = list(fits)
    times: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in names} for kind in ("wall", "cpu")}
    for turn in range(-1, rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            running = clock(warmup, steps)
            fits[name](running)
            if turn >= 0:
                times["wall"][name].append(running.wall)
                times["cpu"][name].append(running.cpu)
    return times


def quiet_trainer(**options: Any) -> pl.Trainer:
    """A Trainer on the CPU that says, logs and saves nothing, unless the options ask for it."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    defaults = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    return pl.Trainer(**{**defaults, "enable_progress_bar": False, "enable_model_summary": False, **options})


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
