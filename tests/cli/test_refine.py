"""``lightning-opt refine``: record, refine, train again."""

import math
from pathlib import Path

import pytest
import torch
import yaml

from lightning_opt.cli import LightningOptCLI, main
from lightning_opt.cli.refine import summarize
from lightning_opt.schedules import NormRecord, RefinedLR, refine_schedule
from lightning_opt.schedules.refined import load_schedule

RECORD = ("--trainer.callbacks+=GradNormRecorder", "--test_after_fit=false", "--data.batch_size=2")


def write(path, norms=None, **changes):
    norms = torch.linspace(2, 1, 60).double() if norms is None else norms
    facts = {"norm": "l2", "optimizer": "SGD", "lr": 0.1, "total_steps": len(norms), "steps": len(norms)}
    NormRecord(norms, **{**facts, **changes}).save(path)
    return path


def test_record_refine_and_train_again(run, capsys):
    """From the first run to the second by the commands that are printed."""
    assert run("fit", *RECORD, "--lr_scheduler=LinearDecayLR") == 0
    assert main(["refine", "runs/quick"]) == 0
    out = capsys.readouterr().out
    assert "record:   runs/quick/version_0/checkpoints/gradnorms.npz" in out
    assert "l1 norms of AdaBelief with lr=0.001, 64 steps" in out
    assert (Path("runs/quick/version_0/refined.png").read_bytes()[1:4]) == b"PNG"
    schedule = load_schedule("runs/quick/version_0/refined.npz")
    record = NormRecord.load("runs/quick/version_0/checkpoints/gradnorms.npz")
    assert torch.equal(schedule, refine_schedule(record.norms, "adam"))
    command = next(line for line in out.splitlines() if line.startswith("run it:")).split()
    words = command[command.index("fit") : command.index("(tune")]
    cli = LightningOptCLI([*words, "--trainer.max_epochs=1"])
    scheduler = cli.trainer.lr_scheduler_configs[0].scheduler
    assert type(scheduler) is RefinedLR
    assert (scheduler.total_steps, scheduler.last_epoch) == (32, 32)  # resampled to the length of this run
    assert torch.equal(scheduler.schedule, schedule)
    assert cli.run_folder == Path("runs/quick_refined/version_0")
    assert cli.trainer.lr_scheduler_configs[0].interval == "step"


def test_a_record_without_a_config_gives_the_scheduler_alone(capsys, tmp_path):
    path = write(tmp_path / "norms.npz")
    assert main(["refine", str(path), "--out=out"]) == 0
    assert "lightning-opt fit --config BASE --config out/refined.yaml" in capsys.readouterr().out
    config = yaml.safe_load(Path("out/refined.yaml").read_text())
    assert set(config) == {"lr_scheduler", "lr_scheduler_interval"}
    assert Path(config["lr_scheduler"]["init_args"]["schedule"]) == Path("out/refined.npz").resolve()
    assert main(["refine", str(path), "--out=out"]) == 2
    assert "out/refined.npz exists; --force overwrites it" in capsys.readouterr().err
    assert main(["refine", str(path), "--out=out", "--force", "--method=numeric", "--tau=0.2"]) == 0
    expected = refine_schedule(NormRecord.load(path).norms, "numeric", tau=0.2)
    assert torch.equal(load_schedule("out/refined.npz"), expected)


def test_the_newest_run_with_a_record_is_taken(capsys, workdir):
    for version in (2, 10):
        folder = workdir / f"runs/x/version_{version}"
        folder.mkdir(parents=True)
        write(folder / "gradnorms.npz")
    (workdir / "runs/x/version_11").mkdir()
    assert main(["refine", "runs/x"]) == 0
    assert "runs/x/version_10/gradnorms.npz" in capsys.readouterr().out


def test_the_summary_in_words_and_numbers(capsys, tmp_path):
    assert main(["refine", str(write(tmp_path / "gradnorms.npz", torch.ones(1001)))]) == 0
    out = capsys.readouterr().out
    assert "starts at 100% of the peak, peaks at 0% of the run" in out
    assert "down to half of the peak at 50%, to 10% of it at 90% (linear decay: 10%)" in out
    assert "floor" not in out
    shape = summarize(refine_schedule(torch.cat([torch.full((50,), 2.0), torch.ones(51)])))
    assert (shape.peak, shape.half) == (0.5, 0.74)  # linear over the last 51 of 101 steps: 25 are at or above half
    norms = torch.cat([torch.ones(90), torch.full((10,), 1e-9)])
    assert main(["refine", str(write(tmp_path / "vanishing.npz", norms)), "--out=v"]) == 0
    assert "10.0% of the smoothed norms were raised to the floor" in capsys.readouterr().out


def test_every_third_step_recorded_gives_a_schedule_of_all_steps(tmp_path, capsys):
    path = write(tmp_path / "gradnorms.npz", steps=180, total_steps=180, every_n_steps=3)
    assert main(["refine", str(path)]) == 0
    assert len(load_schedule(tmp_path / "refined.npz")) == 180


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"steps": 20}, [], "holds 20 of 60 steps: where its end is missing.*--allow_incomplete"),
        ({"total_steps": -1}, [], "holds 60 of an unknown number of steps"),
        ({"norms": torch.tensor([1.0] * 40 + [math.nan])}, [], "got NaN at step 40: the run has diverged"),
        ({"norms": torch.zeros(60)}, [], "must not all be zero"),
        ({"norms": torch.ones(12)}, [], r"tau \* len\(norms\) must be at least 3"),
        ({}, ["--tau=0.7"], r"tau must be in \(0.0, 0.5\]"),
        ({}, ["--method=adam"], "--method=adam needs the other norm: .* holds l2 norms, of SGD"),
        ({"norm": "l1"}, ["--method=numeric"], "--method=numeric needs the other norm"),
    ],
)
def test_records_that_cannot_be_used(changes, words, message, tmp_path, capsys, workdir):
    path = write(tmp_path / "gradnorms.npz", **changes)
    assert main(["refine", str(path), "--out=out", *words]) == 2
    import re

    assert re.search(message, capsys.readouterr().err)
    assert not (workdir / "out").exists()


def test_an_incomplete_record_on_request(tmp_path, capsys):
    path = write(tmp_path / "gradnorms.npz", total_steps=500)
    assert main(["refine", str(path), "--allow_incomplete"]) == 0
    assert len(load_schedule(tmp_path / "refined.npz")) == 60


@pytest.mark.parametrize(("text", "message"), [("", "holds no config to repeat"), ("a: [1", "is not valid YAML")])
def test_a_run_whose_config_is_damaged(text, message, tmp_path, capsys):
    write(tmp_path / "gradnorms.npz")
    (tmp_path / "config.yaml").write_text(text)
    assert main(["refine", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "refined.npz").exists()


def test_a_folder_that_cannot_be_written_to(tmp_path, capsys):
    path = write(tmp_path / "gradnorms.npz")
    for out in (path, path / "below"):  # a file, not a folder
        assert main(["refine", str(path), f"--out={out}"]) == 2
        assert f"cannot write to {out}" in capsys.readouterr().err


def test_a_norm_that_is_not_known(tmp_path, capsys):
    assert main(["refine", str(write(tmp_path / "gradnorms.npz", norm="l3"))]) == 2
    assert "holds norms of a kind that is not known: 'l3'" in capsys.readouterr().err


def test_runs_without_a_record(tmp_path, capsys):
    assert main(["refine", str(tmp_path)]) == 2
    assert "holds no gradnorms.npz. Train with --trainer.callbacks+=GradNormRecorder" in capsys.readouterr().err
    assert main(["refine", "nowhere"]) == 2
    assert "there is no run folder nowhere" in capsys.readouterr().err
    (tmp_path / "other.npz").write_text("no")
    assert main(["refine", str(tmp_path / "other.npz")]) == 2
    assert "other.npz holds no record of gradient norms." in capsys.readouterr().err
    (tmp_path / "other.npz").write_text("")  # numpy has an error of its own for it
    assert main(["refine", str(tmp_path / "other.npz")]) == 2
    assert "other.npz holds no record of gradient norms." in capsys.readouterr().err
