import copy
import functools
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    Checkpoint,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
)
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassRecall

from lightning_opt.callbacks import ResumeState, resume_state
from lightning_opt.data import ResumableLoader

# None of these says that something is wrong: small data, few workers, no deterministic CUDA.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
]

settings = {"ResumeState": {}}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


generator = torch.Generator().manual_seed(0)
INPUTS = torch.randn(38, 6, generator=generator)
LABELS = torch.randint(3, (38,), generator=generator)


class Augmented(TensorDataset):
    """Adds noise from the generator that a worker process, or else the main process, uses."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.rand(()) + 0.1 * float(np.random.rand()), y


class Net(pl.LightningModule):
    """Uses everything that a resume may lose: dropout, BatchNorm, three random generators, metrics, two schedulers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
        self.train_scores = MetricCollection(
            {"recall": MulticlassRecall(3, average="micro"), "accuracy": MulticlassAccuracy(3, average="micro")}
        )
        self.val_accuracy = MulticlassAccuracy(3)
        self.own_metric = MulticlassAccuracy(3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x + 0.01 * random.random() + 0.01 * float(np.random.randn())
        out = self.net(x)
        loss = nn.functional.cross_entropy(out, y)
        self.train_scores.update(out, y)
        self.own_metric.update(out, y)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True)
        self.log("train/largest", loss, on_step=False, on_epoch=True, reduce_fx=max, sync_dist=True)
        self.log_dict(self.train_scores, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        self.log("train/own", self.own_metric.compute(), sync_dist=True)
        self.own_metric.reset()

    def validation_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x + 0.01 * torch.rand(()))
        self.val_accuracy(out, y)
        self.log("val/loss", nn.functional.cross_entropy(out, y), on_step=True, on_epoch=True, sync_dist=True)
        self.log("val/accuracy", self.val_accuracy)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        steps = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.9)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=0.5)
        return [optimizer], [
            {"scheduler": steps, "interval": "step"},
            {"scheduler": plateau, "interval": "epoch", "monitor": "train/loss_epoch"},
        ]


class Rows(Logger):
    """Keeps what is logged."""

    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass


class SaveEverywhere(Checkpoint):
    """Writes a checkpoint at every moment at which ModelCheckpoint may, and notes what had happened by then."""

    def __init__(self, folder, moments) -> None:
        self.folder, self.moments = folder, moments
        self.saved: list[dict[str, Any]] = []
        self.events: list[Any] = []

    def save(self, trainer, moment):
        if moment not in self.moments:
            return
        path = self.folder / f"{len(self.saved)}.ckpt"
        rows = len(trainer.logger.rows) if trainer.logger else 0
        self.saved.append({"path": path, "moment": moment, "rows": rows, "events": len(self.events)})
        trainer.save_checkpoint(path)

    def on_train_epoch_start(self, trainer, pl_module):
        self.events.append(("epoch", trainer.current_epoch))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.events.append(("batch", batch_idx, batch[0].tolist(), batch[1].tolist()))

    def on_validation_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.events.append(("validate", trainer.global_step))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            self.events.append(("validation batch", batch_idx))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.save(trainer, "batch")

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, "epoch")

    def on_train_end(self, trainer, pl_module):
        self.save(trainer, "end")


def loader(**kwargs):
    return ResumableLoader(Augmented(INPUTS, LABELS), batch_size=4, shuffle=True, seed=3, drop_last=True, **kwargs)


def val_loader():
    return DataLoader(TensorDataset(INPUTS, LABELS), batch_size=20)  # creating its iterator draws a random number


def fit(
    folder,
    ckpt_path=None,
    *,
    moments=(),
    module=Net,
    train=loader,
    val=val_loader,
    callbacks=(),
    seed=0,
    resume_state=True,
    **kwargs,
):
    pl.seed_everything(seed + 1000 * int(os.environ.get("LOCAL_RANK", 0)), verbose=False)
    folder.mkdir(exist_ok=True)
    saver = SaveEverywhere(folder, moments)
    settings = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": Rows(),
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 1,
        "limit_val_batches": 1.0 if val else 0,
    }
    trainer = pl.Trainer(
        **{**settings, **kwargs}, callbacks=[*[ResumeState()] * resume_state, saver, *copy.deepcopy(callbacks)]
    )
    model = module()
    trainer.fit(model, train() if train else None, val() if val else None, ckpt_path=ckpt_path)
    return {
        "events": saver.events,
        "saved": saver.saved,
        "rows": trainer.logger.rows if trainer.logger else [],
        "final": {
            "weights": model.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "metrics": trainer.callback_metrics,
            "counts": (trainer.global_step, trainer.current_epoch, trainer.fit_loop.total_batch_idx),
            "random": (torch.get_rng_state(), np.random.get_state()[1], random.getstate()),
        },
    }


def assert_same(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), where
    elif isinstance(a, np.ndarray):
        assert (a == b).all(), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), f"{where}: {a} {b}"
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), f"{where}: {a} {b}"


def check_all(tmp_path, moments=("batch", "validation", "epoch"), every=1, **settings):
    whole = fit(tmp_path / "whole", moments=moments, **settings)
    assert whole["saved"]
    for saved in whole["saved"][::every]:
        resumed = fit(tmp_path / "resumed", saved["path"], seed=99, **settings)
        where = f"{saved['path'].name} at {saved['moment']}: "
        assert_same(resumed["events"], whole["events"][saved["events"] :], where + "events")
        assert_same(resumed["rows"], whole["rows"][saved["rows"] :], where + "rows")
        assert_same(resumed["final"], whole["final"], where + "final")
    return whole


@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_moment(tmp_path, accumulate):
    """9 batches an epoch, validation behind batches 4 and 8, windows that end at 3, 6 and 9."""
    check_all(tmp_path, accumulate_grad_batches=accumulate, val_check_interval=4)


def test_last_step_in_the_middle_of_an_epoch(tmp_path):
    check_all(tmp_path, every=3, max_epochs=-1, max_steps=13)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers(tmp_path, persistent):
    """Augmentation draws from the generators of the worker processes, which start anew on a resume."""
    train = functools.partial(loader, num_workers=2, persistent_workers=persistent)
    check_all(tmp_path, every=7, moments=("batch", "epoch"), train=train)


def test_validation_over_epochs_and_reloads(tmp_path):
    schedule = GradientAccumulationScheduler({0: 1, 1: 2})
    check_all(
        tmp_path,
        every=4,
        limit_train_batches=7,
        val_check_interval=5,
        check_val_every_n_epoch=None,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[schedule],
        max_epochs=3,
    )


def test_validation_in_some_epochs(tmp_path):
    check_all(tmp_path, every=8, max_epochs=4, check_val_every_n_epoch=2)


def test_loaders_are_reloaded_in_the_same_epochs(tmp_path):
    class Reloads(Net):
        calls: list[int]

        def train_dataloader(self):
            self.calls.append(self.trainer.current_epoch)
            return loader()

    settings = {"module": Reloads, "train": None, "val": None, "reload_dataloaders_every_n_epochs": 2, "max_epochs": 5}
    Reloads.calls = []
    whole = fit(tmp_path / "whole", moments=("batch",), **settings)
    assert Reloads.calls == [0, 2, 4]
    for epoch, expected in ((1, [1, 2, 4]), (2, [2, 4]), (3, [3, 4])):
        Reloads.calls = []
        resumed = fit(tmp_path / "resumed", whole["saved"][epoch * 9 + 4]["path"], **settings)
        assert Reloads.calls == expected
        assert_same(resumed["final"], whole["final"])


def test_early_stopping(tmp_path):
    """A run that is about to stop is still about to when resumed; one that has stopped may be trained further."""
    settings = {"val_check_interval": 3, "max_epochs": 3}
    stopper = EarlyStopping("val/loss", patience=1, min_delta=10.0)
    moments = ("validation", "epoch", "end")
    whole = fit(tmp_path / "whole", moments=moments, callbacks=[stopper], **settings)
    assert [saved["moment"] for saved in whole["saved"]] == ["validation", "validation", "epoch", "end"]
    for saved in whole["saved"][:3]:
        resumed = fit(tmp_path / "resumed", saved["path"], callbacks=[stopper], **settings)
        assert_same(resumed["rows"], whole["rows"][saved["rows"] :])
        assert_same(resumed["final"], whole["final"])
    with pytest.warns(UserWarning, match="Please add the following callbacks.*EarlyStopping"):
        further = fit(tmp_path / "further", whole["saved"][3]["path"], **settings)
    assert further["final"]["counts"][1] == 3


def test_without_validation_or_logger(tmp_path):
    check_all(tmp_path, every=5, logger=False, val=None, precision="bf16-mixed")


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 3 == 2:
            self.optimizers().step()
            self.optimizers().zero_grad()

    def configure_optimizers(self):
        return super().configure_optimizers()[0]


def test_manual_optimization(tmp_path):
    check_all(tmp_path, every=4, module=Manual)


class AsksForItsLength(Net):
    """As modules with a schedule in steps do; Lightning then sets the loader up before it knows its position."""

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        total = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=total)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def test_a_loader_that_is_set_up_too_early(tmp_path):
    check_all(tmp_path, every=3, module=AsksForItsLength, val_check_interval=4)


def own_loader():
    return DataLoader(TensorDataset(INPUTS, LABELS), batch_size=4, shuffle=True, drop_last=True)


def test_own_loader_at_epoch_ends(tmp_path):
    with pytest.warns(PossibleUserWarning, match="DataLoader cannot resume in the middle of an epoch"):
        check_all(tmp_path, moments=("epoch",), max_epochs=3, train=own_loader)


def test_train_further(tmp_path):
    whole = fit(tmp_path / "whole", max_epochs=3)
    short = fit(tmp_path / "short", max_epochs=2, moments=("end",))
    resumed = fit(tmp_path / "resumed", short["saved"][0]["path"], seed=99, max_epochs=3)
    assert_same(short["rows"] + resumed["rows"], whole["rows"])
    assert_same(resumed["final"], whole["final"])


def test_resuming_a_finished_run_does_nothing(tmp_path):
    whole = fit(tmp_path / "whole", moments=("end",))
    resumed = fit(tmp_path / "resumed", whole["saved"][0]["path"], seed=99, callbacks=[Kill("on_train_start", 1)])
    assert resumed["rows"] == []
    assert_same(resumed["final"]["weights"], whole["final"]["weights"])


def test_leaves_no_trace(tmp_path):
    with_saves = fit(tmp_path / "a", moments=("batch", "validation", "epoch"), accumulate_grad_batches=3)
    without = fit(tmp_path / "b", resume_state=False, accumulate_grad_batches=3)
    assert_same(with_saves["final"], without["final"])
    assert_same(with_saves["rows"], without["rows"])


def test_lightning_alone_is_not_exact(tmp_path):
    """The check can fail: the same comparison without the callback."""
    with pytest.raises(AssertionError, match="at batch"):
        check_all(tmp_path, moments=("batch",), every=4, resume_state=False)


class Killed(Exception):
    pass


class Kill(Checkpoint):
    """Ends the run behind ModelCheckpoint in the n-th call of a hook."""

    def __init__(self, hook, n):
        self.n = n
        setattr(self, hook, self.count)

    def count(self, trainer, *_):
        if not trainer.sanity_checking:
            self.n -= 1
            if self.n == 0:
                raise Killed


@pytest.mark.parametrize(
    ("hook", "n"),
    [
        ("on_train_batch_start", 7),
        ("on_before_optimizer_step", 4),
        ("on_train_batch_end", 4),
        ("on_validation_batch_start", 4),
        ("on_train_epoch_end", 1),
        ("on_train_batch_end", 18),
        ("on_train_end", 1),
    ],
)
def test_killed_with_model_checkpoint(tmp_path, hook, n):
    """The rows of the killed and of the resumed run together are those of the whole run, whatever was logged twice."""
    settings = {"val_check_interval": 4, "accumulate_grad_batches": 2}
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=2, save_last=True)

    whole = fit(tmp_path / "whole", **settings)
    killed = Rows()
    with pytest.raises(Killed):
        fit(tmp_path / "killed", callbacks=[checkpoint, Kill(hook, n)], logger=killed, **settings)
    resumed = fit(tmp_path / "resumed", "last", seed=99, callbacks=[checkpoint], **settings)
    assert_same(resumed["final"], whole["final"])
    assert_same(resumed["rows"], whole["rows"][len(whole["rows"]) - len(resumed["rows"]) :])
    assert_same(killed.rows, whole["rows"][: len(killed.rows)])
    assert len(killed.rows) + len(resumed["rows"]) >= len(whole["rows"])


def test_checkpoint_inside_a_batch_repeats_the_batch(tmp_path):
    settings = {"val": None, "max_epochs": 1}
    checkpoint = ModelCheckpoint(
        tmp_path / "checkpoints", every_n_train_steps=100, save_last=True, save_on_exception=True
    )
    whole = fit(tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        fit(tmp_path / "killed", callbacks=[checkpoint, Kill("on_before_backward", 5)], **settings)
    # a rank that crashes alone must not wait for the others to send theirs
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt")["callbacks"]["ResumeState"]["ranks"] is None
    with pytest.warns(UserWarning, match="written inside a batch"):
        resumed = fit(tmp_path / "resumed", "last", callbacks=[checkpoint], **settings)
    labels = [event[3] for event in whole["events"] if event[0] == "batch"]
    assert [event[3] for event in resumed["events"]] == labels[4:]
    assert resumed["final"]["counts"][:2] == whole["final"]["counts"][:2]  # steps and epochs


@pytest.fixture(scope="module")
def mid_epoch(tmp_path_factory):
    """A checkpoint behind the first batch and one at the end of an epoch."""
    folder = tmp_path_factory.mktemp("saved")
    saved = fit(folder, moments=("batch", "epoch"), max_epochs=1, val=None, accumulate_grad_batches=3)["saved"]
    return saved[0]["path"], saved[-1]["path"]


def test_state_is_tensors_and_builtins(mid_epoch):
    state = torch.load(mid_epoch[0], weights_only=True)["callbacks"]["ResumeState"]
    assert state["moment"] == "batch end"
    assert set(state["ranks"][0]["gradients"]) == {name for name, _ in Net().named_parameters()}
    assert torch.load(mid_epoch[1], weights_only=True)["callbacks"]["ResumeState"]["ranks"][0]["gradients"] == {}


def test_random_state_of_an_accelerator(monkeypatch):
    """Where there is none to try, with a stand-in for its module in torch."""
    generator = torch.Generator()
    device = SimpleNamespace(get_rng_state=generator.get_state, set_rng_state=generator.set_state)
    monkeypatch.setattr(torch, "get_device_module", {"cuda": device}.__getitem__)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda", 0)))
    state = resume_state._random_state(trainer)
    drawn = torch.rand(3, generator=generator)
    resume_state._set_random_state(trainer, state)
    assert drawn.equal(torch.rand(3, generator=generator))
    trainer.strategy.root_device = torch.device("cpu")
    resume_state._set_random_state(trainer, state)  # resumed elsewhere: what does not fit is left out


@pytest.mark.parametrize("which", [0, 1])
def test_other_world_size(tmp_path, mid_epoch, which):
    checkpoint = torch.load(mid_epoch[which])
    checkpoint["callbacks"]["ResumeState"]["world_size"] = 4
    torch.save(checkpoint, tmp_path / "four.ckpt")
    match = "written by 4 ranks, this run has 1"
    expected = pytest.raises(MisconfigurationException, match=match) if which == 0 else pytest.warns(match=match)
    with expected:
        fit(tmp_path / "resumed", tmp_path / "four.ckpt", max_epochs=2, val=None)


def test_checkpoint_without_the_callback(tmp_path, mid_epoch):
    checkpoint = torch.load(mid_epoch[1])
    del checkpoint["callbacks"]["ResumeState"]
    torch.save(checkpoint, tmp_path / "bare.ckpt")
    with pytest.warns(UserWarning, match="written without this callback"):
        fit(tmp_path / "resumed", tmp_path / "bare.ckpt", max_epochs=2, val=None)


def test_a_changed_accumulation_is_kept(tmp_path, mid_epoch):
    """What the user now asks for wins over what the checkpoint's run was told."""
    resumed = fit(tmp_path / "resumed", mid_epoch[1], max_epochs=2, val=None, accumulate_grad_batches=1)
    assert resumed["final"]["counts"][0] == 3 + 9  # windows of 3 batches, then of 1


def test_warns_of_module_hooks(tmp_path):
    class Late(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            pass

    with pytest.warns(PossibleUserWarning, match="on_train_batch_end of Late"):
        fit(tmp_path / "fit", module=Late, max_epochs=1, limit_train_batches=1, val=None)


def test_two_of_them_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="more than one ResumeState"):
        fit(tmp_path / "fit", callbacks=[ResumeState()])


def test_evaluation_takes_nothing_back(tmp_path, mid_epoch):
    """Neither during the evaluation nor in a later fit of the same Trainer."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = pl.Trainer(callbacks=[ResumeState()], default_root_dir=tmp_path, max_epochs=1, **quiet)
    module = Net()
    torch.manual_seed(5)
    trainer.validate(module, val_loader(), ckpt_path=mid_epoch[0], verbose=False)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    trainer.validate(module, val_loader(), verbose=False)
    assert after.equal(torch.get_rng_state())
    trainer.fit(module, loader(), val_loader())
    assert trainer.fit_loop.total_batch_idx == 8


def test_two_ranks(tmp_path):
    """Each rank has its own data, dropout, BatchNorm statistics and partial gradients."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env={**os.environ, **shared, "LOCAL_RANK": rank, "NODE_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        for rank in ranks:
            output, _ = rank.communicate(timeout=300)
            assert rank.returncode == 0, output
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    with pytest.raises(MisconfigurationException, match="written by 2 ranks, this run has 1"):
        fit(tmp_path / "resumed", tmp_path / "whole" / "0.ckpt", accumulate_grad_batches=3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_all(
        Path(sys.argv[1]),
        every=2,
        val=loader,
        strategy="ddp",
        devices=2,
        accumulate_grad_batches=3,
        val_check_interval=2,
    )
