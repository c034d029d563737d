"""A working folder of its own for every test of the command, and a fit that takes a second."""

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_opt import registry

registry.load_all()  # here, so that Lightning's log handler holds a stream that outlives each test

QUICK = [
    "--model.net.hidden=[8]",
    "--data.train_size=64",
    "--data.val_size=32",
    "--trainer.max_epochs=2",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=1",
    "--report=false",
]  # two epochs of two steps


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_OPT_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["lightning-opt"])
    interrupt, terminate = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGINT, interrupt)  # Lightning ignores further Ctrl-C once it has seen one
    signal.signal(signal.SIGTERM, terminate)


@pytest.fixture
def fit() -> Callable[..., int]:
    """``fit("--optimizer=SGD", ...)``: the exit status of a quick ``lightning-opt fit``."""
    from lightning_opt.cli import main

    return lambda *words: main(["fit", *QUICK, *words])


@pytest.fixture
def quick_cli() -> Callable[..., object]:
    """``quick_cli("--optimizer=SGD", ...)``: the LightningOptCLI after a quick fit."""
    from lightning_opt.cli import LightningOptCLI

    return lambda *words: LightningOptCLI(["fit", *QUICK, *words])
