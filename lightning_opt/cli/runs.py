"""Run folders: where a fit writes, and where the newest checkpoint is.

Every fit has its own folder ``<root>/<name>/version_<N>``, which holds ``config.yaml``, ``checkpoints/`` and what the
default logger and the report write.
"""

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_only

from .errors import UserError, import_class


def new_run_folder(root: str, name: str) -> Path:
    """Make the next free run folder, also when two fits start at once.

    Args:
        root: The Trainer's ``default_root_dir``.
        name: Name of the run; may hold slashes.

    Returns:
        The folder; only rank 0 makes it.

    Raises:
        UserError: If it cannot be made.
    """
    parent = Path(root) / name
    if "://" in root:
        raise UserError(f"trainer.default_root_dir must be a local folder, got {root!r}.")
    numbers = [number for number, _ in _run_folders(parent)]
    if getattr(rank_zero_only, "rank", 0) != 0:  # rank 0 made the folder before it started the others
        return parent / f"version_{max(numbers, default=0)}"
    number = max(numbers, default=-1) + 1
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                (folder := parent / f"version_{number}").mkdir()
                return folder
            except FileExistsError:
                number += 1
    except OSError as error:
        raise UserError(
            f"cannot write to {parent} ({error.strerror}); choose another folder with --trainer.default_root_dir."
        ) from error


def newest_checkpoint(root: str, name: str) -> Path:
    """The checkpoint to resume from: the furthest of the newest run folder that holds a readable one.

    A file that a killed run left half-written is skipped with a warning in favor of the one before it. (Lightning
    writes to a temporary file and moves it into place, which is atomic only within one file system.)

    Args:
        root: The Trainer's ``default_root_dir``.
        name: Name of the run.

    Returns:
        Path of the checkpoint.

    Raises:
        UserError: If there is none.
    """
    parent = Path(root) / name
    for _, folder in sorted(_run_folders(parent), reverse=True):
        if (path := _furthest(folder)) is not None:
            return path
    raise UserError(
        f"--ckpt_path=last: no checkpoint in {parent}/version_*/checkpoints. Start without --ckpt_path, or give the"
        " path of a checkpoint."
    )


def checkpoint_of(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the furthest of a run folder or of the newest run of a name.

    Args:
        path: A checkpoint, a run folder, or the folder of a name.

    Raises:
        UserError: If there is none, or it is cut off.
    """
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{path}: no such file.")
        if not _is_complete(path):
            raise UserError(
                f"{path}: not a complete checkpoint (cut off while it was written, or no checkpoint at all)."
            )
        return path
    for folder in (path, *(folder for _, folder in sorted(_run_folders(path), reverse=True))):
        if (found := _furthest(folder)) is not None:
            return found
    raise UserError(f"{path} holds no checkpoint, neither in checkpoints nor in version_*/checkpoints.")


def check_checkpoint(path: Path) -> None:
    """Raise unless a checkpoint file exists and can be read.

    Raises:
        UserError: If not; says where the run folders are.
    """
    if not path.exists():
        raise UserError(f"--ckpt_path={path}: no such file. --ckpt_path=last takes the newest of the run folders.")
    if path.is_file() and not _is_complete(path):
        raise UserError(
            f"--ckpt_path={path}: not a complete checkpoint (cut off while it was written, or no checkpoint at all)."
            " --ckpt_path=last takes the newest that is complete."
        )


def check_same_optimizer(path: Path, class_path: str) -> None:
    """Raise if the config beside a checkpoint names another optimizer, whose state would not fit.

    Raises:
        UserError: If it does; names the newest of the other runs beside it that fits, if there is one.
    """
    run_folder = path.resolve().parent.parent
    written_by = _optimizer_of(run_folder)
    if written_by is None or _is_same(written_by, class_path):
        return
    others = [folder for _, folder in sorted(_run_folders(run_folder.parent), reverse=True) if folder != run_folder]
    fitting = next(
        (
            checkpoint
            for folder in others
            if (other := _optimizer_of(folder)) is not None and _is_same(other, class_path)
            for checkpoint in _checkpoints(folder)
            if _is_complete(checkpoint)
        ),
        None,
    )
    mine, theirs = class_path.rpartition(".")[2], written_by.rpartition(".")[2]
    mismatch = f"{shown_path(path)} was written with the optimizer {theirs}, this run uses {mine}"
    found = (
        f". The newest run with {mine} goes on with --ckpt_path={shown_path(fitting)}; or"
        if fitting is not None
        else f", as no run in {shown_path(run_folder.parent)} did:"
    )
    raise UserError(f"{mismatch}{found} resume with {theirs}, or start a new run without --ckpt_path.")


def shown_path(path: str | Path) -> Path:
    """A path as messages show it: relative where it is below the working folder."""
    path = Path(path).resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _optimizer_of(run_folder: Path) -> str | None:
    """The class path of the optimizer in a run's config, if it names one."""
    try:
        config: Any = yaml.safe_load((run_folder / "config.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return None
    return ((config or {}).get("optimizer") or {}).get("class_path")


def _is_same(class_path: str, other: str) -> bool:
    try:
        return class_path == other or import_class(class_path) is import_class(other)
    except (ImportError, AttributeError):  # of an older run, whose module is no longer there
        return False


def _checkpoints(run_folder: Path) -> list[Path]:
    """Those of a run, the furthest first."""
    files = {path.resolve() for path in (run_folder / "checkpoints").glob("*.ckpt") if path.is_file()}
    return sorted(files, key=_progress, reverse=True)


def _is_complete(path: Path) -> bool:
    return zipfile.is_zipfile(path)  # its directory is at the end: a truncated file has none


def _furthest(folder: Path) -> Path | None:
    """The furthest checkpoint of a run folder that can be read."""
    for path in _checkpoints(folder):
        if _is_complete(path):
            return path
        warnings.warn(f"{path} is not a complete checkpoint; trying the one before it.", stacklevel=3)
    return None


def _run_folders(parent: Path) -> list[tuple[int, Path]]:
    return [
        (int(match[1]), path)
        for path in parent.glob("version_*")
        if (match := re.fullmatch(r"version_(\d+)", path.name))
    ]


def _progress(path: Path) -> tuple[int, int]:
    """The step in a checkpoint's name, then its age: what Lightning names the files by."""
    match = re.search(r"step=(\d+)", path.name)
    return int(match[1]) if match else -1, path.stat().st_mtime_ns
