"""Under the Lightning Trainer: resume, accumulation, clipping, precision, compilation, counting."""

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_opt.callbacks import ResumeState
from lightning_opt.data import ResumableLoader

from ..contract import require
from .state import require_equal_state
from .subject import Subject, check, gradients, require_equal, require_near, tensors, values

SAMPLES = 24


class Regression(pl.LightningModule):
    """A network of two layers without biases, with weights that do not depend on the random state."""

    def __init__(self, subject: Subject, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        self.subject = subject
        self.steps = 0
        self.net: nn.Module = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 2, bias=False))
        for p, value in zip(self.net.parameters(), tensors([(6, 4), (2, 6)], dtype, seed), strict=True):
            p.data = value.data / 2

    def loss(self, batch: list[Tensor]) -> Tensor:
        """Mean squared error."""
        return (self.net(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.subject.build(self.parameters())
        optimizer.register_step_post_hook(self._count)
        return optimizer

    def _count(self, *_: Any) -> None:
        self.steps += 1


class ManualRegression(Regression):
    """The same with manual optimization."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()  # type: ignore[union-attr]
        return loss


def data(dtype: torch.dtype = torch.float32) -> TensorDataset:
    """24 samples, in and out."""
    inputs, targets = gradients([torch.empty(SAMPLES, 4, dtype=dtype), torch.empty(SAMPLES, 2, dtype=dtype)], 0)
    return TensorDataset(inputs, targets)


def fit(module: Regression, batch_size: int = 4, **settings: Any) -> pl.Trainer:
    """Two epochs over the data, in order, with a Trainer that writes and prints nothing."""
    arguments: dict[str, Any] = {"train_dataloaders": DataLoader(data(next(module.parameters()).dtype), batch_size)}
    for name in ("train_dataloaders", "val_dataloaders", "ckpt_path"):
        if name in settings:
            arguments[name] = settings.pop(name)
    silent = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)
    with quiet():
        trainer = pl.Trainer(**{**silent, "accelerator": "cpu", "devices": 1, "max_epochs": 2, **settings})
        trainer.fit(module, **arguments)
    return trainer


@check
def interrupted_training_resumes_exactly(subject: Subject) -> None:
    """A fit resumed from a checkpoint in the middle of a shuffled epoch ends as the uninterrupted one, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:

        def train(seed: int, **settings: Any) -> tuple[Regression, pl.Trainer]:
            module = Regression(subject, seed=seed)
            loaders: dict[str, Any] = {
                "train_dataloaders": ResumableLoader(data(), 4, shuffle=True),
                "val_dataloaders": _validation(),
            }
            checkpoint = ModelCheckpoint(f"{folder}/{seed}", "{step}", every_n_train_steps=8, save_top_k=-1)
            callbacks = [ResumeState(), checkpoint]
            return module, fit(module, **loaders, callbacks=callbacks, enable_checkpointing=True, **settings)

        straight, trainer = train(0)
        resumed, again = train(1, ckpt_path=f"{folder}/0/step=8.ckpt")
    require(trainer.global_step == 12 == again.global_step, f"{trainer.global_step} and {again.global_step} steps")
    require_equal(resumed.parameters(), straight.parameters(), "resumed against uninterrupted")
    require_equal_state(again.optimizers[0], trainer.optimizers[0], "state of the optimizer")
    logged, expected = again.callback_metrics["val/loss"], trainer.callback_metrics["val/loss"]
    require(bool(logged == expected), f"val/loss is {logged}, not {expected}")


def _validation() -> DataLoader:
    return DataLoader(data(), SAMPLES)


@check
def accumulated_gradients_equal_one_big_batch(subject: Subject) -> None:
    """Four micro-batches accumulated train as one batch four times as large."""
    small, big = Regression(subject, torch.float64), Regression(subject, torch.float64)
    fit(small, 2, accumulate_grad_batches=4)
    fit(big, 8)
    require(small.steps == big.steps == 6, f"{small.steps} and {big.steps} steps, not 6")
    require_near(small.parameters(), big.parameters(), "accumulated against one batch")


@check
def clipped_gradients_train(subject: Subject) -> None:
    """``gradient_clip_val`` clips the gradients that the step uses, as a loop written by hand does."""
    clipped, by_hand = Regression(subject, torch.float64), Regression(subject, torch.float64)
    fit(clipped, 8, gradient_clip_val=0.1)
    optimizer = by_hand.configure_optimizers()
    for _ in range(2):
        for batch in DataLoader(data(torch.float64), 8):
            params = list(by_hand.parameters())
            grads = torch.autograd.grad(by_hand.loss(batch), params)
            norm = torch.stack([g.norm() for g in grads]).norm()
            for p, g in zip(params, grads, strict=True):
                p.grad = g * (0.1 / (norm + 1e-6)).clamp_max(1.0)
            optimizer.step()
    require_near(clipped.parameters(), by_hand.parameters(), "the Trainer against a loop by hand")


@check
def bf16_mixed_precision_trains(subject: Subject) -> None:
    """``precision="bf16-mixed"`` keeps float32 weights and goes the way of the float32 run."""
    _goes_the_same_way(subject, precision="bf16-mixed")


@check
def fp16_mixed_precision_trains_with_clipping(subject: Subject) -> None:
    """``precision="16-mixed"`` with a gradient scaler and clipping goes the way of the float32 run."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    _goes_the_same_way(subject, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], gradient_clip_val=1e3)


def _goes_the_same_way(subject: Subject, **settings: Any) -> None:
    mixed, full = Regression(subject), Regression(subject)
    start = values(full.parameters())
    fit(mixed, max_steps=4, **settings)
    fit(full, max_steps=4)
    require(all(p.dtype == torch.float32 for p in mixed.parameters()), "the weights are not float32 any more")
    for i, (a, b, s) in enumerate(zip(mixed.parameters(), full.parameters(), start, strict=True)):
        off, way = (a - b).norm().item(), (b - s).norm().item()
        # half: rounded gradients flip the sign of small ones, on which some methods depend
        require(off <= way / 2, f"tensor {i} ends {off:.3g} away from the float32 run, which moved {way:.3g}")


@check
def compiled_network_trains(subject: Subject) -> None:
    """A module whose inner network is compiled trains as it does uncompiled."""
    compiled, plain = Regression(subject, torch.float64), Regression(subject, torch.float64)
    compiled.net = torch.compile(compiled.net, backend="eager")  # type: ignore[assignment]
    fit(compiled)
    fit(plain)
    require_near(compiled.parameters(), plain.parameters(), "compiled against not")


@check
def fast_dev_run_takes_one_step(subject: Subject) -> None:
    """``fast_dev_run`` takes one step."""
    module = Regression(subject)
    start = values(module.parameters())
    trainer = fit(module, fast_dev_run=True)
    require(trainer.global_step == module.steps == 1, f"{module.steps} steps, global_step {trainer.global_step}")
    require(any(bool((p != s).any()) for p, s in zip(module.parameters(), start, strict=True)), "nothing moved")


@check
def one_step_is_one_global_step(subject: Subject) -> None:
    """Each step counts once in ``trainer.global_step``, with accumulation too."""
    for accumulate, expected in ((1, 12), (3, 4)):
        module = Regression(subject)
        trainer = fit(module, accumulate_grad_batches=accumulate)
        counts = f"{module.steps} steps, global_step {trainer.global_step}"
        require(module.steps == trainer.global_step == expected, f"{counts}, not {expected}")


@check
def manual_optimization_trains(subject: Subject) -> None:
    """Manual optimization trains as automatic optimization does, and counts the same steps."""
    manual, automatic = ManualRegression(subject), Regression(subject)
    trainer = fit(manual)
    fit(automatic)
    require(trainer.global_step == 12, f"global_step is {trainer.global_step} after 12 steps")
    require_equal(manual.parameters(), automatic.parameters(), "manual against automatic")


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what Lightning says about a Trainer as small as this one."""
    logs = [logging.getLogger("lightning.pytorch"), logging.getLogger("lightning.fabric")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.* is deprecated")
            warnings.filterwarnings("ignore", "The dirpath has changed from")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
