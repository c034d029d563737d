"""Where the Trainer gets its training loader from."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl


def replace_train_loader(trainer: pl.Trainer, replace: Callable[[Any], Any]) -> Callable[[], None]:
    """Hand every training loader that the Trainer asks for through ``replace``, before the Trainer looks at it.

    Args:
        trainer: In ``setup`` of a fit.
        replace: From what the user gave, in ``fit`` or a ``train_dataloader`` hook, to what is to be used.

    Returns:
        Puts the source back.
    """
    source = trainer.fit_loop._data_source
    plain = source.dataloader
    source.dataloader = lambda: replace(plain())  # type: ignore[method-assign]

    def put_back() -> None:
        vars(source).pop("dataloader", None)

    return put_back


def train_loader(trainer: pl.Trainer) -> Any:
    """The training loader that the Trainer will ask for: what was given to ``fit``, or what a hook makes.

    A data module makes a new one; it must not be iterated over where that one was given, since it has a position.

    Args:
        trainer: In ``setup`` of a fit or later, with its data module set up.
    """
    return trainer.fit_loop._data_source.dataloader()
