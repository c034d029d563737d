from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar


def side_bar(trainer: Any, description: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """A progress bar for work beside the training, in the manner of the Trainer's own.

    Args:
        trainer: Fitting.
        description: Shown before the bar.

    Returns:
        Wraps what is iterated over; it shows nothing where the Trainer shows no bar.
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        from tqdm import tqdm  # type: ignore[import-untyped]

        return lambda steps: tqdm(steps, desc=description, leave=False)
    if isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        return lambda steps: _with_task(bar.progress, steps, description)
    return iter


def _with_task(progress: Any, steps: Iterable[Any], description: str) -> Iterator[Any]:
    """Lightning keeps one display of rich, in which a second one would not be seen."""
    task = progress.add_task(description, total=len(steps) if isinstance(steps, Sized) else float("inf"))
    try:
        for step in steps:
            yield step
            progress.update(task, advance=1)
    finally:
        progress.remove_task(task)
