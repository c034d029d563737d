"""A genome on disk: a JSON of a few kilobytes that rebuilds a network, and knows whether it did."""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .genome import Genome, Init, decode

_FORMAT = 1


def save_genome(path: str | Path, genome: Genome, weights: Tensor) -> None:
    """Write a genome with what its bits depend on.

    Args:
        path: A JSON file.
        genome: What is written.
        weights: Its decoded weights ``[P]``; their number, dtype and hash are written, so that a reader can tell
            whether it rebuilt the same network.

    Example:
        >>> import tempfile
        >>> genome = Genome((1,), (0.1,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "genome.json")
        ...     save_genome(path, genome, decode(genome, torch.zeros(4)))
        ...     load_genome(path) == genome, load_weights(path, torch.zeros(4)).shape
        (True, torch.Size([4]))
    """
    record = {
        "format": _FORMAT,
        "seeds": list(genome.seeds),
        "powers": list(genome.powers),
        "noise": "torch.randn on the CPU",
        **_versions(),
        "device": weights.device.type,
        "dtype": str(weights.dtype).removeprefix("torch."),
        "n_params": weights.numel(),
        "weights_sha256": _digest(weights),
    }
    Path(path).write_text(json.dumps(record, indent=1) + "\n")


def load_genome(path: str | Path) -> Genome:
    """Read a genome.

    Raises:
        ValueError: If the file holds none.
    """
    return _genome(_read(path), path)


def load_weights(path: str | Path, init: Init) -> Tensor:
    """Read a genome and decode it.

    Args:
        path: What :func:`save_genome` wrote.
        init: As for :func:`decode`: the initial weights, or the function that draws them.

    Returns:
        The weights ``[P]``.

    Raises:
        ValueError: If the file holds no genome, or one of another number of weights.

    Warns:
        UserWarning: If the weights are not, bit for bit, those that were written: another version of torch, another
            processor, or other initial weights.
    """
    record = _read(path)
    weights = decode(_genome(record, path), init)
    if weights.numel() != record["n_params"]:
        raise ValueError(f"{path} is the genome of {record['n_params']} weights, init has {weights.numel()}")
    if _digest(weights) != record["weights_sha256"]:
        here = {**_versions(), "dtype": str(weights.dtype).removeprefix("torch.")}
        other = [f"{name} {record.get(name)} there, {value} here" for name, value in here.items()]
        warnings.warn(
            f"{path}: the decoded weights are not those that were saved ({'; '.join(other)}; or the initial weights"
            " differ)",
            stacklevel=2,
        )
    return weights


def _versions() -> dict[str, str]:
    return {"torch": str(torch.__version__), "instructions": torch.backends.cpu.get_cpu_capability()}


def _read(path: str | Path) -> dict[str, Any]:
    try:
        record = json.loads(Path(path).read_text())
        known = isinstance(record, dict) and record.get("format") == _FORMAT
    except (UnicodeDecodeError, json.JSONDecodeError):
        known = False
    if not known:
        raise ValueError(f"{path} is no genome of format {_FORMAT}")
    return record


def _genome(record: dict[str, Any], path: str | Path) -> Genome:
    try:
        return Genome(tuple(record["seeds"]), tuple(record["powers"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no genome ({error})") from error


def _digest(weights: Tensor) -> str:
    return hashlib.sha256(weights.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
