"""Going on with the fit loop exactly where a checkpoint was written.

Lightning calls the hooks that write checkpoints before it is done with a batch, a validation or an epoch: values are
still to be logged, a validation is still to run, schedulers are still to be stepped. On a restart it skips those,
or counts them twice. Here they are done first.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loops.fetchers import _DataFetcher


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Whether gradients of an unfinished accumulation window are held behind the current batch."""
    return trainer.fit_loop._should_accumulate()


def loop_state(trainer: pl.Trainer) -> dict[str, Any]:
    """What Lightning counts and does not save."""
    val_loop = trainer.fit_loop.epoch_loop.val_loop
    return {
        "last_train_reload_epoch": trainer.fit_loop._last_train_dl_reload_epoch,
        "last_val_reload_epoch": val_loop._last_val_dl_reload_epoch,
        "val_batches_logged": dict(val_loop._seen_batches_per_dataloader),
    }


def load_loop_state(trainer: pl.Trainer, progress: dict[str, Any], state: dict[str, Any]) -> None:
    """Set all counters to what they were when the checkpoint was written.

    Args:
        trainer: In ``fit``, behind the ``on_train_start`` hooks.
        progress: ``checkpoint["loops"]["fit_loop"]``.
        state: What :func:`loop_state` returned.
    """
    fit_loop = trainer.fit_loop
    val_loop = fit_loop.epoch_loop.val_loop
    fit_loop.load_state_dict({**progress, "state_dict": {}})  # the loader's position is at work already
    fit_loop._last_train_dl_reload_epoch = state["last_train_reload_epoch"]
    if state["val_batches_logged"]:
        trainer.validating = True
        val_loop.setup_data()  # it would reset the two at its first call
        trainer.training = True
        val_loop._last_val_dl_reload_epoch = state["last_val_reload_epoch"]
        val_loop._seen_batches_per_dataloader.update(state["val_batches_logged"])


def forget_early_loader(trainer: pl.Trainer) -> None:
    """Have the training loader set up when the loop starts, with its position, even if it was set up before.

    ``trainer.estimated_stepping_batches`` sets it up as soon as ``configure_optimizers`` asks. Lightning reads its
    position from the checkpoint later, and then passes the loader over: the epoch would be replayed from its first
    batch, without a word.

    Args:
        trainer: In ``on_fit_start`` of a run that is resumed.
    """
    trainer.fit_loop._combined_loader = None


def at_first_advance(trainer: pl.Trainer, go_on: Callable[[], None]) -> Callable[[], None]:
    """Call ``go_on`` once, behind all ``on_train_start`` hooks and before the first batch is fetched.

    Lightning has no hook there: in the middle of an epoch the next one comes when a batch has been fetched.

    Args:
        trainer: In ``on_fit_start``.
        go_on: Brings the run to where the next batch or epoch starts.

    Returns:
        Takes the arrangement back if it is still pending.
    """
    fit_loop = trainer.fit_loop
    start = fit_loop.on_advance_start

    def first_start() -> None:
        cancel()
        go_on()
        if fit_loop.done:
            raise StopIteration  # ends the loop, which then calls on_train_end
        start()
        fit_loop._restarting = False  # or plateau schedulers are passed over when this epoch ends

    def cancel() -> None:
        vars(fit_loop).pop("on_advance_start", None)

    fit_loop.on_advance_start = first_start  # type: ignore[method-assign]
    return cancel


def lift_limits(trainer: pl.Trainer, progress: dict[str, Any], global_step: int) -> Callable[[], None]:
    """Let the loop start although the checkpoint is of its very last step or epoch, which is not finished yet.

    Args:
        trainer: In ``on_fit_start``.
        progress: ``checkpoint["loops"]["fit_loop"]``.
        global_step: ``checkpoint["global_step"]``.

    Returns:
        Puts the limits back.
    """
    fit_loop = trainer.fit_loop
    max_epochs, max_steps = fit_loop.max_epochs, fit_loop.epoch_loop.max_steps
    epochs = progress["epoch_progress"]["current"]
    trained = epochs["processed"] == epochs["ready"] or progress["epoch_loop.batch_progress"]["is_last_batch"]
    if max_epochs is not None and trained and epochs["ready"] == max_epochs:
        fit_loop.max_epochs = max_epochs + 1
    if global_step == max_steps:
        fit_loop.epoch_loop.max_steps = max_steps + 1

    def put_back() -> None:
        fit_loop.max_epochs, fit_loop.epoch_loop.max_steps = max_epochs, max_steps

    return put_back


def finish_batch(trainer: pl.Trainer) -> None:
    """What follows the ``on_train_batch_end`` hooks: log the step, validate if due, end the epoch if it is over."""
    epoch_loop = trainer.fit_loop.epoch_loop
    epoch_loop.restarting = False
    trainer._logger_connector.on_batch_end()
    epoch_loop.batch_progress.increment_completed()
    trainer._logger_connector.update_train_step_metrics()
    epoch_loop.on_advance_end(_fetcher(trainer))
    _leave_batch(trainer)


def finish_validation(trainer: pl.Trainer) -> None:
    """What follows the ``on_validation_end`` hooks: step plateau schedulers, end the epoch if it is over."""
    epoch_loop = trainer.fit_loop.epoch_loop
    epoch_loop.restarting = False
    epoch_loop._skip_next_val = True
    epoch_loop.on_advance_end(_fetcher(trainer))
    _leave_batch(trainer)


def finish_epoch(trainer: pl.Trainer) -> None:
    """What follows the ``on_train_epoch_end`` hooks: step plateau schedulers, log the epoch."""
    fit_loop, connector = trainer.fit_loop, trainer._logger_connector
    leave_epoch(trainer)
    connector.on_epoch_end()
    if fit_loop.epoch_loop._num_ready_batches_reached():
        fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
    fit_loop.epoch_loop._batches_that_stepped -= 1  # loggers expect the step of the last batch
    connector.update_train_epoch_metrics()
    fit_loop.epoch_loop._batches_that_stepped += 1
    fit_loop.epoch_progress.increment_completed()


def leave_epoch(trainer: pl.Trainer) -> None:
    """Let the next epoch start as any other, with an iterator of its own."""
    trainer.fit_loop.on_iteration_done()
    trainer.fit_loop.epoch_loop.restarting = False


def _leave_batch(trainer: pl.Trainer) -> None:
    fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    if epoch_loop.done:
        leave_epoch(trainer)
        fit_loop.on_advance_end()
        return

    def keep_progress() -> None:
        del epoch_loop.reset

    # its reset would take the epoch for a new one, or guess what is left to do in it; just once it does nothing
    epoch_loop.reset = keep_progress  # type: ignore[method-assign]


def _fetcher(trainer: pl.Trainer) -> _DataFetcher:
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return fetcher
