from pathlib import Path
from typing import Any


def run_directory(trainer: Any) -> Path | None:
    """Where the first logger writes, agreed on by all ranks; None if nothing is to be written."""
    if trainer.fast_dev_run:
        return None
    logger = trainer.logger
    if logger is None:
        directory = trainer.default_root_dir
    elif getattr(logger, "log_dir", None):
        directory = str(logger.log_dir)
    else:  # a folder for each run, where checkpoints go too
        parts = [part for part in (logger.name, logger.version) if part not in (None, "")]
        directory = str(Path(logger.save_dir or trainer.default_root_dir, *map(str, parts)))
    return Path(trainer.strategy.broadcast(directory))
