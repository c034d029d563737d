"""Exact resume: the callback that saves what Lightning's checkpoints leave out."""

import copy
import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_opt._lightning import logged_values, metrics, replicas, restart
from lightning_opt.registry import register

# The moments at which a checkpoint may be written: in a hook of that name, or inside a batch or a validation.
BATCH_END = "batch end"
VALIDATION_END = "validation end"
EPOCH_END = "epoch end"
TRAIN_END = "train end"
INSIDE = "inside"


@register("callback", summary="Makes a resumed run repeat the uninterrupted one bit for bit")
class ResumeState(pl.Callback):
    """Saves in every checkpoint what Lightning leaves out, so that a resumed ``fit`` continues bit for bit.

    Add it to the Trainer, and read the training data with :class:`lightning_opt.data.ResumableLoader`. A ``fit`` that
    was killed anywhere and continues with ``Trainer.fit(..., ckpt_path=...)`` then has the parameters, the optimizer
    state and the logged values of the uninterrupted run, on the same machine with deterministic algorithms. It saves

    - the random state of python, numpy, torch and the accelerator, of every rank;
    - the gradients of an unfinished accumulation window, of every rank (with manual optimization all gradients);
    - the buffers of ranks beside the first, where they differ, as BatchNorm's do between two synchronizations of DDP;
    - values logged for the end of the epoch, torchmetrics inside the module, and ``trainer.callback_metrics``;
    - ``trainer.should_stop``, ``trainer.accumulate_grad_batches`` and counters of Lightning's loops.

    Lightning writes most checkpoints before it is done with a batch, a validation or an epoch, and skips the rest on
    a restart. The callback makes up for it first: a resumed run logs the checkpoint's step (again, with the same
    values), runs the validation that was due, and ends the epoch if it was over. No row is lost, some are logged twice.

    Not exact, and warned about:

    - A training loader without ``state_dict`` and ``load_state_dict``: the epoch is replayed from its first batch, so
      resume is exact only from checkpoints written at the end of an epoch.
    - ``on_train_batch_end`` and ``on_validation_end`` of the LightningModule, which Lightning calls after checkpoints
      are written. Those of callbacks, called before, are fine.
    - A checkpoint written inside a batch, for example on an exception: that batch is trained again.
    - An accumulation window under a strategy that owns the gradients (FSDP, DeepSpeed).

    With more than two ranks a sum over ranks may round differently in the first step after a resume, since DDP sorts
    its buckets anew.

    Raises:
        MisconfigurationException: When the checkpoint was written in the middle of an epoch by another number of
            ranks, or if the Trainer has two of these callbacks.

    Cost: about 15 KB a rank in every checkpoint, plus the state of metrics; inside an accumulation window one copy of
    the gradients a rank. One gather of objects over ranks a checkpoint. Nothing between checkpoints.

    Example:
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> callbacks = [ResumeState(), ModelCheckpoint(every_n_train_steps=100, save_last=True)]
        >>> trainer = pl.Trainer(callbacks=callbacks, logger=False)
    """

    def __init__(self) -> None:
        self._moment = INSIDE
        self._crashed = False
        self._accumulate = 1  # as the Trainer was made
        self._loaded: dict[str, Any] | None = None  # between on_load_checkpoint and the first batch
        self._pending: list[Callable[[], None]] = []  # to be undone if training never starts

    def __repr__(self) -> str:
        return "ResumeState()"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start afresh, and warn about module hooks that a checkpoint cannot cover."""
        if stage != "fit":
            return
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector of Lightning's
        if sum(isinstance(callback, ResumeState) for callback in callbacks) > 1:
            raise MisconfigurationException("The Trainer has more than one ResumeState callback; leave one.")
        self._moment, self._crashed, self._loaded = INSIDE, False, None
        self._accumulate = trainer.accumulate_grad_batches
        late = [hook for hook in ("on_train_batch_end", "on_validation_end") if is_overridden(hook, pl_module)]
        if late:
            rank_zero_warn(
                f"ResumeState: Lightning calls {' and '.join(late)} of {type(pl_module).__name__} after checkpoints are"
                " written, so a resumed run misses what they do for the checkpoint's batch. Move it to a callback's"
                " hook of that name.",
                category=PossibleUserWarning,
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the state to the checkpoint; called on every rank."""
        state = apply_to_collection(self._own_state(trainer, pl_module), Tensor, _cpu_copy)
        checkpoint["callbacks"][self.state_key] = {
            "moment": self._moment,
            "world_size": trainer.world_size,
            "should_stop": trainer.should_stop,
            "accumulate_grad_batches": [self._accumulate, trainer.accumulate_grad_batches],
            "loops": restart.loop_state(trainer),
            # a rank that crashes alone must not wait for the others
            "ranks": None if self._crashed else replicas.gather_states(trainer, state),
        }
        if self._moment == INSIDE:
            _rewind_loaders(checkpoint["loops"]["fit_loop"])

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check the state; it is taken back when the loops are about to start."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        state = checkpoint["callbacks"].get(self.state_key)
        progress = checkpoint["loops"]["fit_loop"]
        if state is None:
            rank_zero_warn("ResumeState: the checkpoint was written without this callback; resume is not exact.")
            return
        if state["moment"] == INSIDE or state["ranks"] is None:
            begun = progress["epoch_loop.batch_progress"]["total"]["ready"] > 0
            if begun:  # Lightning's Tuner saves before, and loads again
                rank_zero_warn(
                    "ResumeState: the checkpoint was written inside a batch or a validation, which is now run again;"
                    " resume is not exact."
                )
            return
        if state["world_size"] != trainer.world_size:
            message = (
                f"ResumeState: the checkpoint was written by {state['world_size']} ranks,"
                f" this run has {trainer.world_size}"
            )
            if state["moment"] in (BATCH_END, VALIDATION_END) and not _epoch_is_over(progress):
                raise MisconfigurationException(
                    f"{message}, and it is in the middle of an epoch. Resume with as many ranks, or from a checkpoint"
                    " written at the end of an epoch."
                )
            rank_zero_warn(f"{message}; random state and logged values of the ranks are not restored.")
            return
        self._loaded = {
            **state,
            "own": state["ranks"][trainer.global_rank],
            "progress": copy.deepcopy({**progress, "state_dict": {}}),
            "global_step": checkpoint["global_step"],
        }

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Arrange for the state to be taken back behind all hooks that run before training."""
        if trainer.ckpt_path is not None:
            restart.forget_early_loader(trainer)
        loaded = self._loaded
        if loaded is None:
            return
        self._pending.append(restart.at_first_advance(trainer, lambda: self._go_on(trainer, pl_module)))
        if loaded["moment"] != TRAIN_END:
            self._pending.append(restart.lift_limits(trainer, loaded["progress"], loaded["global_step"]))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if a training loader cannot resume."""
        loaders = CombinedLoader(trainer.train_dataloader).flattened
        foreign = {
            type(x).__name__ for x in loaders if not (hasattr(x, "state_dict") and hasattr(x, "load_state_dict"))
        }
        if foreign:
            rank_zero_warn(
                f"ResumeState: {', '.join(sorted(foreign))} cannot resume in the middle of an epoch and would replay it"
                " from its first batch, so resume is exact only from checkpoints written at the end of an epoch. Use"
                " lightning_opt.data.ResumableLoader for the training data.",
                category=PossibleUserWarning,
            )

    def on_train_epoch_start(self, *_: Any) -> None:  # noqa: D102
        self._moment = INSIDE

    def on_train_batch_start(self, *_: Any) -> None:  # noqa: D102
        self._moment = INSIDE

    def on_train_batch_end(self, *_: Any) -> None:  # noqa: D102
        self._moment = BATCH_END

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: D102
        if trainer.state.fn == TrainerFn.FITTING:
            self._moment = INSIDE

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: D102
        if trainer.state.fn == TrainerFn.FITTING:
            self._moment = VALIDATION_END

    def on_train_epoch_end(self, *_: Any) -> None:  # noqa: D102
        self._moment = EPOCH_END

    def on_train_end(self, *_: Any) -> None:  # noqa: D102
        self._moment = TRAIN_END

    def on_exception(self, *_: Any) -> None:  # noqa: D102
        self._crashed = True
        self._undo()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: D102
        self._undo()

    def _undo(self) -> None:
        self._loaded = None
        while self._pending:
            self._pending.pop()()

    def _own_state(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What this rank holds."""
        reset_next = logged_values.metrics_reset_after_validation(trainer) if self._moment == VALIDATION_END else ()
        return {
            "random": _random_state(trainer),
            "replica": replicas.replica_state(trainer),
            "gradients": self._gradients(trainer, pl_module),
            "metrics": metrics.metric_states(pl_module, skip=reset_next),
            "logged": logged_values.logged_values_state(trainer),
        }

    def _gradients(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        if self._moment not in (BATCH_END, VALIDATION_END):
            return {}
        if pl_module.automatic_optimization and not restart.is_accumulating(trainer):
            return {}
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            rank_zero_warn(
                f"ResumeState: {type(trainer.strategy).__name__} holds the gradients of the accumulation window; a"
                " checkpoint inside one is not exact."
            )
            return {}
        return {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}

    def _go_on(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the state back and finish what the checkpoint interrupted."""
        loaded = self._loaded
        assert loaded is not None
        self._undo()
        own, moment = loaded["own"], loaded["moment"]
        restart.load_loop_state(trainer, loaded["progress"], loaded["loops"])
        metrics.load_metric_states(pl_module, own["metrics"])
        logged_values.load_logged_values(
            trainer,
            move_data_to_device(own["logged"], trainer.strategy.root_device),
            epoch_ended=moment in (EPOCH_END, TRAIN_END),
        )
        replicas.load_replica_state(trainer, own["replica"])
        for name, parameter in pl_module.named_parameters():
            if name in own["gradients"]:
                parameter.grad = own["gradients"][name].to(parameter.device)
        if moment != TRAIN_END:
            trainer.should_stop = loaded["should_stop"]
        configured, current = loaded["accumulate_grad_batches"]
        if configured == self._accumulate:
            trainer.accumulate_grad_batches = current
        _set_random_state(trainer, own["random"])
        self._moment = moment  # a checkpoint may be written while the rest is done
        finish = {
            BATCH_END: restart.finish_batch,
            VALIDATION_END: restart.finish_validation,
            EPOCH_END: restart.finish_epoch,
            TRAIN_END: restart.leave_epoch,
        }
        finish[moment](trainer)


def _random_state(trainer: pl.Trainer) -> dict[str, Any]:
    version, words, gauss = random.getstate()
    legacy: dict[str, Any] = np.random.get_state(legacy=False)  # type: ignore[assignment]
    key = torch.from_numpy(legacy["state"]["key"].astype(np.int64))
    device = trainer.strategy.root_device.type
    return {
        "python": [version, torch.tensor(words), gauss],
        "numpy": {**legacy, "state": {**legacy["state"], "key": key}},
        "torch": torch.get_rng_state(),
        device: None if device == "cpu" else torch.get_device_module(device).get_rng_state(),
    }


def _set_random_state(trainer: pl.Trainer, state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    legacy = state["numpy"]
    key = legacy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**legacy, "state": {**legacy["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    device = trainer.strategy.root_device.type
    if state.get(device) is not None:
        torch.get_device_module(device).set_rng_state(state[device])


def _rewind_loaders(progress: dict[str, Any]) -> None:
    """Let the loaders yield the batch again that was fetched and not completed, as the loop will ask for it."""
    batches = progress["epoch_loop.batch_progress"]["current"]
    for loader in progress["state_dict"].get("combined_loader", []):
        if "batches" in loader:  # as ResumableLoader's
            loader["batches"] = max(loader["batches"] - (batches["ready"] - batches["completed"]), 0)


def _epoch_is_over(progress: dict[str, Any]) -> bool:
    return progress["epoch_loop.batch_progress"]["is_last_batch"]


def _cpu_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
