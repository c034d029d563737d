"""A working folder of its own for every test of the command, and in it a config of a fit that takes a second."""

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_opt import registry

registry.load_all()  # here, so that Lightning's log handler holds a stream that outlives each test

QUICK = """\
name: quick
model:
  class_path: lightning_opt.models.Classifier
  init_args:
    net:
      class_path: lightning_opt.models.MLP
      init_args: {in_features: 64, hidden: [8]}
data:
  class_path: lightning_opt.data.Digits
  init_args: {train_size: 64, val_size: 32, batch_size: 32}
optimizer:
  class_path: lightning_opt.optim.AdaBelief
  init_args: {lr: 0.001}
trainer:
  max_epochs: 2
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
report: false
"""  # two epochs of two steps


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "work"
    folder.mkdir()
    (tmp_path / "quick.yaml").write_text(QUICK)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LIGHTNING_OPT_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["lightning-opt"])
    interrupt, terminate = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    yield folder
    signal.signal(signal.SIGINT, interrupt)  # Lightning ignores further Ctrl-C once it has seen one
    signal.signal(signal.SIGTERM, terminate)


@pytest.fixture
def run() -> Callable[..., int]:
    """``run("fit", "--optimizer=SGD", ...)``: the exit status of ``lightning-opt`` with the quick config."""
    from lightning_opt.cli import main

    return lambda command, *words: main([command, "--config=../quick.yaml", *words])


@pytest.fixture
def launch() -> Callable[..., object]:
    """``launch("fit", "--optimizer=SGD", ...)``: the LightningOptCLI with the quick config after it has run."""
    from lightning_opt.cli import LightningOptCLI

    return lambda command, *words: LightningOptCLI([command, "--config=../quick.yaml", *words])
