"""Schedules from a config: their length and their interval, with two epochs of two steps."""

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_opt.callbacks import ScheduleCheck
from lightning_opt.cli import main

SGD = ("--optimizer=SGD", "--optimizer.lr=0.8", "--test_after_fit=false")


def _rate(cli):
    return cli.trainer.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize("batches", [1, 2])
def test_the_length_of_a_schedule_is_that_of_the_run(batches, launch, capsys):
    words = (f"--trainer.accumulate_grad_batches={batches}", "--lr_scheduler.min_factor=0.5")
    cli = launch("fit", *SGD, "--lr_scheduler=LinearDecayLR", *words)
    scheduler = cli.trainer.lr_scheduler_configs[0].scheduler
    assert (scheduler.total_steps, scheduler.last_epoch) == (4 // batches, 4 // batches)
    assert _rate(cli) == 0.4
    assert cli.trainer.lr_scheduler_configs[0].interval == "step"
    assert sum(isinstance(callback, ScheduleCheck) for callback in cli.trainer.callbacks) == 1
    assert "lr_scheduler" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("warmup", "length", "steps"),
    [("0.5", "--trainer.max_epochs=2", 2), ("0.1", "--trainer.fast_dev_run=1", 0), ("3", "--trainer.max_epochs=2", 3)],
)
def test_a_warm_up_in_steps_or_as_a_share_of_the_run(warmup, length, steps, launch):
    cli = launch("fit", *SGD, "--lr_scheduler=LinearDecayLR", f"--lr_scheduler.warmup_steps={warmup}", length)
    assert cli.trainer.lr_scheduler_configs[0].scheduler.warmup_steps == steps


def test_null_in_a_config_means_the_run(launch):
    words = ("--lr_scheduler=LastIterateLR", "--lr_scheduler.kind=linear", "--lr_scheduler.total_steps=null")
    assert (
        launch("fit", *SGD, *words, "--trainer.max_steps=3").trainer.lr_scheduler_configs[0].scheduler.total_steps == 3
    )


def test_one_cycle_of_torch_gets_its_length_and_is_stepped_every_step(launch, capsys):
    cli = launch("fit", *SGD, "--lr_scheduler=OneCycleLR", "--lr_scheduler.max_lr=0.1", "--optimizer.momentum=0.9")
    config = cli.trainer.lr_scheduler_configs[0]
    assert (config.interval, config.scheduler.total_steps, config.scheduler.last_epoch) == ("step", 4, 4)
    assert "OneCycleLR is stepped every optimizer step; --lr_scheduler_interval=epoch" in capsys.readouterr().err


def test_its_own_way_of_saying_the_length_is_left_alone(launch):
    words = ("--lr_scheduler.epochs=3", "--lr_scheduler.steps_per_epoch=5", "--optimizer.momentum=0.9")
    with pytest.warns(UserWarning, match="OneCycleLR has total_steps=15 .* will have 4: it ends before its schedule"):
        cli = launch("fit", *SGD, "--lr_scheduler=OneCycleLR", "--lr_scheduler.max_lr=0.1", *words)
    assert cli.trainer.lr_scheduler_configs[0].scheduler.total_steps == 15


def test_a_length_in_steps_that_is_stepped_every_epoch_is_noticed(launch, capsys):
    with pytest.warns(
        UserWarning, match=r"T_max=4 and is stepped every epoch, .* will have 2.*--lr_scheduler_interval"
    ):
        launch("fit", *SGD, "--lr_scheduler=CosineAnnealingLR", "--lr_scheduler.T_max=4")
    assert "CosineAnnealingLR is stepped every epoch; --lr_scheduler_interval=step" in capsys.readouterr().err
    words = ("--lr_scheduler=CosineAnnealingLR", "--lr_scheduler.T_max=4", "--lr_scheduler_interval=step")
    assert _rate(launch("fit", *SGD, *words)) == pytest.approx(0, abs=1e-15)
    assert "is stepped every" not in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_a_run_without_end_is_refused_before_the_first_step(run, capsys):
    words = ("--trainer.max_epochs=-1", "--trainer.max_time=00:00:01:00", "--lr_scheduler=LinearDecayLR")
    assert run("fit", *SGD, *words) == 2
    err = capsys.readouterr().err
    assert "LinearDecayLR: total_steps cannot be found out" in err
    assert "--trainer.max_steps" in err


def test_a_wrong_value_is_refused_before_anything_is_written(run, capsys, workdir):
    assert run("fit", *SGD, "--lr_scheduler=LinearDecayLR", "--lr_scheduler.min_factor=2") == 2
    assert "LinearDecayLR: min_factor must be in [0.0, 1.0], got 2.0" in capsys.readouterr().err
    assert not list(workdir.iterdir())


def test_a_resumed_run_goes_on_with_its_schedule(run, launch):
    words = (*SGD, "--lr_scheduler=LinearDecayLR", "--checkpoint.every_n_train_steps=1", "--checkpoint.save_top_k=-1")
    whole = launch("fit", *words)
    path = "runs/quick/version_0/checkpoints/epoch=1-step=3.ckpt"
    resumed = launch("fit", *words, f"--ckpt_path={path}")
    assert (_rate(whole), _rate(resumed)) == (0.0, 0.0)
    assert resumed.trainer.global_step == 4
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert a.equal(b)


def test_schedules_are_found_by_their_short_names(capsys):
    assert rank_zero_only.rank == 0
    assert main(["fit", "--lr_scheduler.help=RefinedLR"]) == 0
    assert "--lr_scheduler.init_args.schedule" in capsys.readouterr().out.replace(
        "lr_scheduler.schedule", "lr_scheduler.init_args.schedule"
    )
