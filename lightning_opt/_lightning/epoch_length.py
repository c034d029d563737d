"""The number of training batches of an epoch, where it changes while the epoch runs."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher


def set_epoch_length(trainer: pl.Trainer, batches: int) -> None:
    """Make ``num_training_batches``, ``is_last_batch`` and the progress bar know how many batches the epoch has.

    Args:
        trainer: In ``fit``, its training loader set up.
        batches: Of the whole epoch, those included that are done.
    """
    fit_loop = trainer.fit_loop
    loader, fetcher = fit_loop._combined_loader, fit_loop._data_fetcher
    if loader is None or fetcher is None:
        return
    loader.limits = [float("inf")]  # the epochs to come; the loader's own length is right
    fit_loop.max_batches = batches
    if fetcher.length is not None:
        fetcher.length = batches
    bar: Any = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar):
        if bar.progress is not None and bar.train_progress_bar_id is not None:
            bar.progress.update(bar.train_progress_bar_id, total=batches)
    elif getattr(bar, "_train_progress_bar", None) is not None:
        bar.train_progress_bar.total = batches


def batches_fetched_at_once(trainer: pl.Trainer) -> bool:
    """Whether ``training_step`` gets batches, and not an iterator of which it fetches as it likes."""
    return isinstance(trainer.fit_loop._data_fetcher, _DataFetcher) and not isinstance(
        trainer.fit_loop._data_fetcher, _DataLoaderIterDataFetcher
    )


def own_validation_interval(trainer: pl.Trainer, is_due: Callable[[], bool]) -> Callable[[], None]:
    """Let ``is_due`` decide behind which batches to validate, where ``val_check_interval`` counts batches.

    Args:
        trainer: In ``on_fit_start``.
        is_due: Asked when a batch is done.

    Returns:
        Puts Lightning's own way back.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    plain = epoch_loop._should_check_val_fx

    def should_check(data_fetcher: _DataFetcher) -> bool:
        if not epoch_loop._should_check_val_epoch():  # whatever the batch
            return False
        if trainer.val_check_batch is not None and trainer.val_check_batch != float("inf"):
            by_run = trainer.check_val_every_n_epoch is None
            done = (epoch_loop.total_batch_idx if by_run else epoch_loop.batch_idx) + 1
            trainer.val_check_batch = done if is_due() else done + 1  # Lightning asks whether it divides `done`
        return plain(data_fetcher)

    epoch_loop._should_check_val_fx = should_check  # type: ignore[method-assign]

    def put_back() -> None:
        vars(epoch_loop).pop("_should_check_val_fx", None)

    return put_back
