"""``fit`` and its companions: run folders, checkpoints, resume, optimizers and schedulers from a config."""

import logging
import os
import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from lightning_opt.callbacks import ResumeState, RunReport
from lightning_opt.cli import LightningOptCLI, PeriodicCheckpoint, main
from lightning_opt.cli.lightning_cli import build_optimizers
from lightning_opt.cli.runs import new_run_folder, newest_checkpoint

RUNS = Path("runs/quick")
BORING = "lightning.pytorch.demos.boring_classes.BoringModel"
with_a_plain_loader = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:ResumeState. DataLoader"
)


def _weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def _checkpoint(version: int = 0) -> Path:
    return (RUNS / f"version_{version}/checkpoints/last.ckpt").resolve()


def test_a_fit_leaves_config_checkpoint_metrics_and_tests(run, capsys) -> None:
    assert run("fit") == 0
    folder = RUNS / "version_0"
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "metrics.csv", "checkpoints"}
    assert torch.load(_checkpoint(), weights_only=True)["global_step"] == 4
    assert "train/loss" in (folder / "metrics.csv").read_text()
    assert "test/accuracy" in (folder / "metrics.csv").read_text()
    out = capsys.readouterr().out
    assert "test/accuracy" in out
    assert f"checkpoint: {_checkpoint().relative_to(Path.cwd())}\n" in out


def test_a_fit_has_no_news_of_what_is_as_it_should_be(run, caplog) -> None:
    """Steps are counted for the schedule; the two of an epoch are fewer than the logging interval, all are not."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    try:
        words = ("--lr_scheduler=LinearDecayLR", "--trainer.max_epochs=3", "--trainer.log_every_n_steps=3")
        assert run("fit", *words) == 0
        assert "Loading `train_dataloader`" not in caplog.text
        assert "max_epochs=3" in caplog.text
        with pytest.warns(UserWarning, match="smaller than the logging interval"):  # here nothing would be logged
            run("fit", "--trainer.max_epochs=1", "--trainer.log_every_n_steps=3")
    finally:
        logger.removeHandler(caplog.handler)


def test_every_fit_has_its_own_folder(run) -> None:
    assert [run("fit"), run("fit", "--trainer.logger=false"), run("fit")] == [0, 0, 0]
    assert sorted(path.name for path in RUNS.iterdir()) == ["version_0", "version_1", "version_2"]
    assert {path.name for path in (RUNS / "version_1").iterdir()} == {"config.yaml", "checkpoints"}
    assert Path("runs").exists()
    assert {path.name for path in Path().iterdir()} == {"runs"}


def test_the_saved_config_repeats_the_run(run) -> None:
    assert run("fit", "--optimizer.lr=0.003", "--seed_everything=5") == 0
    config = yaml.safe_load((RUNS / "version_0/config.yaml").read_text())
    assert config["optimizer"]["init_args"]["lr"] == 0.003
    assert config["name"] == "quick"
    assert main(["fit", f"--config={RUNS}/version_0/config.yaml"]) == 0
    first, second = _weights(_checkpoint(0)), _weights(_checkpoint(1))
    assert all(torch.equal(first[name], second[name]) for name in first)


@with_a_plain_loader
def test_the_name_is_the_folder(run) -> None:
    assert run("fit", "--name=mine", "--trainer.default_root_dir=elsewhere") == 0
    assert Path("elsewhere/mine/version_0/config.yaml").exists()
    Path("own.yaml").write_text(f"{{model: {{class_path: {BORING}}}, optimizer: {{class_path: SGD}}}}")
    quick = [
        "--trainer.max_steps=1",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--report=false",
    ]
    assert main(["fit", "--config=own.yaml", "--trainer.logger=false", *quick]) == 0
    assert Path("runs/fit/version_0/config.yaml").exists()


def test_a_recipes_name_is_the_name() -> None:
    for words in ([], ["--config=digits/quickstart"]):
        cli = LightningOptCLI(["fit", *words, "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"])
        assert cli.config.fit.name == "digits/quickstart"


def test_own_callbacks_are_added_once(launch) -> None:
    given = ["--trainer.callbacks+=ResumeState", "--trainer.callbacks+=RunReport", "--report=true"]
    callbacks = launch("fit", *given, "--trainer.fast_dev_run=true").trainer.callbacks
    for kind in (ResumeState, RunReport, PeriodicCheckpoint):
        assert sum(isinstance(callback, kind) for callback in callbacks) == 1


def test_fast_dev_run_and_evaluation_write_nothing(run) -> None:
    assert run("fit", "--trainer.fast_dev_run=true", "--report=true") == 0
    assert run("test") == 0
    assert not list(Path().iterdir())


def test_evaluating_without_a_checkpoint_says_so(run, capsys) -> None:
    assert run("validate") == 0
    assert "No --ckpt_path, so the weights are untrained; --ckpt_path=last" in capsys.readouterr().err


def test_a_logger_of_the_users_leaves_the_run_folder_as_it_is(run) -> None:
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.version=7"]
    assert run("fit", *logger) == 0
    assert {path.name for path in (RUNS / "version_0").iterdir()} == {"config.yaml", "checkpoints"}
    assert {path.name for path in Path("logs/lightning_logs/version_7").iterdir()} == {"metrics.csv"}


def test_without_checkpointing(run, capsys) -> None:
    assert run("fit", "--trainer.enable_checkpointing=false") == 0
    assert not list(Path().rglob("*.ckpt"))
    assert "checkpoint:" not in capsys.readouterr().out


def test_no_test_after_fit(run, capsys) -> None:
    assert run("fit", "--test_after_fit=false") == 0
    assert "test/accuracy" not in capsys.readouterr().out


def test_the_test_after_fit_takes_the_best_weights(launch) -> None:
    best = "[{class_path: ModelCheckpoint, init_args: {monitor: val/loss, mode: max, filename: best}}]"
    cli = launch(
        "fit", f"--trainer.callbacks={best}", "--optimizer.lr=0.01"
    )  # the best, having the largest loss, is the first
    chosen = torch.load(cli.run_folder / "checkpoints/best.ckpt", weights_only=True)
    assert chosen["global_step"] == 2
    tested = launch("test", f"--ckpt_path={cli.run_folder}/checkpoints/best.ckpt")
    assert float(tested.trainer.callback_metrics["test/loss"]) == cli.test_results[0]["test/loss"]


# --- swapping classes ---


def test_swapping_the_optimizer_keeps_what_it_knows_and_says_so(launch, capsys) -> None:
    Path("own.yaml").write_text(
        "optimizer: {class_path: lightning_opt.optim.AdaBelief, init_args: {lr: 0.5, eps: 1.0e-9, rectify: true}}"
    )
    cli = launch("fit", "--config=own.yaml", "--optimizer=Adam", "--trainer.fast_dev_run=true")
    (group,) = cli.trainer.optimizers[0].param_groups
    assert type(cli.trainer.optimizers[0]) is torch.optim.Adam
    assert (group["lr"], group["eps"], group["betas"]) == (0.5, 1e-9, (0.9, 0.999))
    assert (
        "optimizer: Adam instead of AdaBelief; with lr=0.5, eps=1e-09; without rectify=True." in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--optimizer=SGD", "--optimizer.lr=0.25", "--optimizer.momentum=0.5"],
        ["--optimizer.momentum=0.5", "--optimizer.lr", "0.25", "--optimizer", "SGD"],
        ["--optimizer.momentum=0.5", "--optimizer=SGD", "--config=../quick.yaml", "--optimizer.lr=0.25"],
    ],
)
def test_the_order_of_words_does_not_matter(words: list[str], launch) -> None:
    optimizer = launch("fit", *words, "--trainer.fast_dev_run=true").trainer.optimizers[0]
    assert type(optimizer) is torch.optim.SGD
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.25, 0.5)


def test_a_later_config_overrides_an_earlier_one_class_included(launch) -> None:
    Path("own.yaml").write_text("optimizer: {class_path: torch.optim.SGD, init_args: {momentum: 0.5}}")
    optimizer = launch("fit", "--config=own.yaml", "--trainer.fast_dev_run=true").trainer.optimizers[0]
    assert type(optimizer) is torch.optim.SGD
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.001, 0.5)


def test_a_short_name_means_ours_even_if_another_package_has_it_too(launch, monkeypatch) -> None:
    peer = type("AdaBelief", (torch.optim.SGD,), {"__module__": "lightning.pytorch.demos"})
    monkeypatch.setattr("lightning.pytorch.demos.AdaBelief", peer, raising=False)
    cli = launch("fit", "--optimizer=AdaBelief", "--optimizer.lr=0.1", "--trainer.fast_dev_run=true")
    assert type(cli.trainer.optimizers[0]).__module__ == "lightning_opt.optim.adabelief"


# --- what the optimizer and the scheduler get ---


class Groups(torch.optim.SGD):
    @classmethod
    def param_groups_for(cls, module: nn.Module) -> list[dict]:
        named = dict(module.named_parameters())
        return [{"params": [named["0.weight"]], "momentum": 0.5}, {"params": [named["0.bias"]]}]


class Warmup(torch.optim.lr_scheduler.LinearLR):
    interval = "step"


class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    monitor = "val/loss"


def _build(optimizer: type, scheduler: type | None = None, interval: str | None = None, **init_args) -> dict:
    from jsonargparse import Namespace

    def spec(cls: type, **arguments) -> Namespace:
        return Namespace(class_path=f"{cls.__module__}.{cls.__qualname__}", init_args=Namespace(arguments))

    module = pl.LightningModule()
    module.add_module("0", nn.Linear(2, 2))
    module.add_module("1", nn.Linear(2, 2).requires_grad_(False))
    return build_optimizers(
        module, spec(optimizer, lr=0.1, **init_args), spec(scheduler) if scheduler else None, interval
    )


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """This test module under its name, which pytest's importlib mode does not give."""
    import sys
    import types

    module = types.ModuleType(Groups.__module__)
    module.__dict__.update(Groups=Groups, Warmup=Warmup, Plateau=Plateau)
    monkeypatch.setitem(sys.modules, Groups.__module__, module)


def test_parameters_are_named_and_trainable() -> None:
    (group,) = _build(torch.optim.AdamW)["optimizer"].param_groups
    assert group["param_names"] == ["0.weight", "0.bias"]


def test_the_optimizers_own_groups(importable) -> None:
    groups = _build(Groups)["optimizer"].param_groups
    assert [group["momentum"] for group in groups] == [0.5, 0]


def test_the_schedulers_interval_and_monitor(importable) -> None:
    assert "lr_scheduler" not in _build(torch.optim.AdamW)
    assert _build(torch.optim.AdamW, torch.optim.lr_scheduler.LinearLR)["lr_scheduler"]["interval"] == "epoch"
    assert _build(torch.optim.AdamW, Warmup)["lr_scheduler"]["interval"] == "step"
    assert _build(torch.optim.AdamW, Warmup, "epoch")["lr_scheduler"]["interval"] == "epoch"
    assert _build(torch.optim.AdamW, Plateau)["lr_scheduler"]["monitor"] == "val/loss"


@pytest.mark.parametrize(("words", "lr"), [([], 0.4), (["--lr_scheduler_interval=step"], 0.1)])
def test_a_scheduler_of_torch_by_epoch_or_by_step(words: list[str], lr: float, launch) -> None:
    """StepLR halves every 2: once in 2 epochs, twice in 4 steps."""
    cli = launch(
        "fit",
        "--optimizer=SGD", "--optimizer.lr=0.8", "--lr_scheduler=StepLR", "--lr_scheduler.step_size=2",
        "--lr_scheduler.gamma=0.5", "--test_after_fit=false", *words, *(["--optimizer.lr=0.4"] if words else []),
    )  # fmt: skip
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(lr)


def test_a_plateau_scheduler_by_its_monitor(launch) -> None:
    words = ["--lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau", "--lr_scheduler.monitor=val/loss"]
    (config,) = launch("fit", *words, "--trainer.fast_dev_run=true").trainer.lr_scheduler_configs
    assert (config.monitor, config.reduce_on_plateau) == ("val/loss", True)


@with_a_plain_loader
def test_a_modules_own_optimizer_gives_way_and_says_so(capsys) -> None:
    words = [f"--model={BORING}", "--data=null", "--trainer.fast_dev_run=true", "--trainer.enable_progress_bar=false"]
    assert main(["fit", *words]) == 0
    assert (
        "BoringModel.configure_optimizers gives way to AdaBelief; --optimizer=null keeps it." in capsys.readouterr().err
    )
    cli = LightningOptCLI(["fit", *words, "--optimizer=null"])
    assert type(cli.trainer.optimizers[0]) is torch.optim.SGD


@with_a_plain_loader
def test_a_module_in_the_working_folder() -> None:
    Path("my_module.py").write_text(f"from {BORING.rpartition('.')[0]} import BoringModel as MyModel\n")
    words = ["--data=null", "--trainer.fast_dev_run=true", "--trainer.enable_progress_bar=false", "--optimizer=null"]
    assert main(["fit", "--model=my_module.MyModel", *words]) == 0


# --- checkpoints and resume ---


def test_checkpoints_every_n_steps_and_at_the_end(run) -> None:
    assert run("fit", "--checkpoint.every_n_train_steps=3", "--checkpoint.save_top_k=-1") == 0
    steps = sorted(torch.load(p, weights_only=True)["global_step"] for p in _checkpoint().parent.glob("epoch*.ckpt"))
    assert steps == [3, 4]
    assert run("fit", "--checkpoint.every_n_train_steps=1") == 0
    names = {path.name for path in _checkpoint(1).parent.iterdir()}
    assert len(names) == 2  # the newest and the link to it
    assert "last.ckpt" in names


@pytest.mark.parametrize("steps", [2, 3, 4])  # the end of an epoch, its middle, the end of the run
def test_resume_repeats_the_uninterrupted_run(steps: int, run) -> None:
    assert run("fit", "--trainer.max_epochs=3") == 0
    whole = torch.load(_checkpoint(0), weights_only=True)
    shutil.rmtree("runs")
    assert run("fit", f"--trainer.max_steps={steps}") == 0
    assert run("fit", "--trainer.max_epochs=3", "--ckpt_path=last") == 0
    resumed = torch.load(_checkpoint(1), weights_only=True)
    assert resumed["global_step"] == whole["global_step"] == 6
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name
    assert str(whole["optimizer_states"]) == str(resumed["optimizer_states"])


def test_resume_in_the_middle_of_the_final_steps(run) -> None:
    """A run that was complete goes on where it ended, not from its last multiple of N."""
    assert run("fit", "--checkpoint.every_n_train_steps=3") == 0
    assert run("fit", "--ckpt_path=last", "--trainer.max_epochs=3") == 0
    assert torch.load(_checkpoint(1), weights_only=True)["global_step"] == 6


def test_last_is_the_furthest_of_the_newest_folder_that_has_one(run, workdir) -> None:
    for version, steps in {0: [100, 900], 1: [50, 100], 2: []}.items():
        folder = RUNS / f"version_{version}/checkpoints"
        folder.mkdir(parents=True)
        for step in steps:
            torch.save({}, folder / f"epoch=1-step={step}.ckpt")
    assert newest_checkpoint("runs", "quick").name == "epoch=1-step=100.ckpt"
    assert newest_checkpoint("runs", "quick").parts[-3] == "version_1"


def test_a_half_written_checkpoint_is_skipped_with_a_warning(run) -> None:
    assert run("fit", "--checkpoint.every_n_train_steps=3", "--checkpoint.save_top_k=-1") == 0
    whole = _checkpoint()
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"step=4.ckpt is not a complete checkpoint; trying the one before it"):
        assert newest_checkpoint("runs", "quick").name.endswith("step=3.ckpt")


def test_an_unreadable_checkpoint_by_its_path(run, capsys) -> None:
    Path("broken.ckpt").write_bytes(b"PK\3\4 nothing")
    assert run("fit", "--ckpt_path=broken.ckpt") == 2
    assert "--ckpt_path=broken.ckpt: not a complete checkpoint" in capsys.readouterr().err


def test_last_without_any_checkpoint(run, capsys) -> None:
    assert run("fit", "--ckpt_path=last") == 2
    assert "no checkpoint in runs/quick/version_*/checkpoints" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_resume_with_another_optimizer_is_refused_but_testing_is_not(run, capsys) -> None:
    assert run("fit") == 0
    assert run("fit", "--ckpt_path=last", "--optimizer=SGD", "--optimizer.lr=0.1") == 2
    error = capsys.readouterr().err
    assert "was written with the optimizer AdaBelief, this run uses SGD, as no run in runs/quick did: resume" in error
    assert run("test", "--optimizer=SGD", "--optimizer.lr=0.1", "--ckpt_path=last") == 0


def test_a_refused_resume_names_the_newest_run_that_fits(run, capsys) -> None:
    sgd = ("--optimizer=SGD", "--optimizer.lr=0.1")
    for words in (sgd, sgd, ()):  # versions 0, 1 and 2
        assert run("fit", "--trainer.max_epochs=1", *words) == 0
    content = _checkpoint(1).read_bytes()
    capsys.readouterr()
    assert run("fit", "--ckpt_path=last", *sgd) == 2
    error = capsys.readouterr().err
    named = f"runs/quick/version_1/checkpoints/{_checkpoint(1).name}"
    assert f"The newest run with SGD goes on with --ckpt_path={named}; or resume with AdaBelief, or start" in error
    assert run("fit", f"--ckpt_path={named}", *sgd) == 0  # version 3
    Path("runs/quick/version_3").rename("runs/quick/away")
    _checkpoint(1).write_bytes(content[: len(content) // 2])
    Path("runs/quick/version_2/config.yaml").touch()
    assert run("fit", "--ckpt_path=last", *sgd) == 2
    assert "--ckpt_path=runs/quick/version_0/checkpoints/" in capsys.readouterr().err


def test_test_and_predict_read_the_last_checkpoint(launch) -> None:
    cli = launch("fit")
    tested = launch("test", "--ckpt_path=last")
    assert float(tested.trainer.callback_metrics["test/loss"]) == pytest.approx(cli.test_results[0]["test/loss"])
    launch("predict", "--ckpt_path=last")
    predictions = torch.cat(torch.load(RUNS / "version_1/predictions.pt", weights_only=True))
    assert predictions.shape == (360, 10)
    labels = cli.datamodule.test_set.labels
    accuracy = (predictions.argmax(1) == labels).float().mean().item()
    assert accuracy == pytest.approx(cli.test_results[0]["test/accuracy"])


# --- interruption ---


class Interrupt(pl.Callback):
    """Ctrl-C behind a step."""

    def __init__(self, step: int = 3, signal_number: int = signal.SIGINT) -> None:
        self.step = step
        self.signal_number = signal_number

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.signal_number)


@contextmanager
def interrupted_at(step: int, signal_number: int) -> Iterator[None]:
    """Every Trainer that the command makes gets the signal behind a step."""
    own = LightningOptCLI._own_callbacks
    callback = Interrupt(step, signal_number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LightningOptCLI, "_own_callbacks", lambda *a: [*own(*a), callback])
        yield


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_resume_and_that_is_exact(signal_number: int, run, capsys) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert run("fit", "--trainer.max_epochs=3", "--name=whole") == 0
    words = ["--trainer.max_epochs=3", "--name=a b", "--checkpoint.every_n_train_steps=1"]
    with interrupted_at(3, signal_number):
        assert run("fit", *words) == 128 + signal_number
    error = capsys.readouterr().err
    assert "Interrupted. Resume with: lightning-opt fit " in error
    resume = shlex.split(error[error.index("lightning-opt fit") :].splitlines()[0])
    assert main(resume[1:]) == 0
    whole, resumed = _weights(newest_checkpoint("runs", "whole")), _weights(newest_checkpoint("runs", "a b"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_ctrl_c_before_the_first_checkpoint_does_not_offer_that_of_an_older_run(run, capsys) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert run("fit") == 0
    with interrupted_at(1, signal.SIGINT):
        assert run("fit") == 130
    error = capsys.readouterr().err
    assert "Interrupted before the first checkpoint; checkpoint.every_n_train_steps is 100." in error
    assert "--ckpt_path=last" not in error


# --- run folders ---


def test_two_runs_that_start_at_once_get_two_folders(monkeypatch) -> None:
    first = new_run_folder("runs", "a/b")
    assert first == Path("runs/a/b/version_0")
    with monkeypatch.context() as context:
        context.setattr(
            "lightning_opt.cli.runs._run_folders", lambda parent: []
        )  # as seen before the other made its own
        assert new_run_folder("runs", "a/b") == Path("runs/a/b/version_1")


def test_other_ranks_take_the_folder_of_rank_0(monkeypatch) -> None:
    folder = new_run_folder("runs", "fit")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert new_run_folder("runs", "fit") == folder
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]


# --- the checkpoint callback ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_train_steps": 0}, "every_n_train_steps must be >= 1"),
        ({"save_top_k": 3}, "save_top_k must be one of 1, -1"),
    ],
)
def test_periodic_checkpoint_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PeriodicCheckpoint(**arguments)


def test_it_lives_beside_a_model_checkpoint(launch) -> None:
    cli = launch("fit", "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_epochs=1")
    kinds = [type(callback) for callback in cli.trainer.checkpoint_callbacks]
    assert kinds == [ModelCheckpoint, PeriodicCheckpoint]
