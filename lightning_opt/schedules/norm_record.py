"""The gradient norms of a run, in a file that says what they are the norms of."""

import dataclasses
import os
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class NormRecord:
    """What ``GradNormRecorder`` writes and ``lightning-opt refine`` reads.

    Attributes:
        norms: One norm for every ``every_n_steps``-th optimizer step, float64, in order.
        norm: Which norm.
        optimizer: Class name of the optimizer.
        lr: Its learning rate at the beginning, of its first group.
        total_steps: Optimizer steps that the run was to have, or -1 if that was not known; once it has ended, that it
            had.
        steps: Optimizer steps that are recorded: those that it had when the record was written, if it is recorded from
            the beginning.
        every_n_steps: Steps between two norms.
        batch_size: Samples of a micro-batch on one rank, or -1 if that was not known.
        accumulate_grad_batches: Micro-batches of a step.
        world_size: Ranks.
        version: Of lightning-opt.

    Example:
        >>> record = NormRecord(torch.ones(10), "l2", "SGD", 0.1, total_steps=20, steps=10)
        >>> record.complete
        False
    """

    norms: Tensor
    norm: Literal["l1", "l2"]
    optimizer: str
    lr: float
    total_steps: int
    steps: int
    every_n_steps: int = 1
    batch_size: int = -1
    accumulate_grad_batches: int = 1
    world_size: int = 1
    version: str = ""

    @property
    def complete(self) -> bool:
        """Whether the run had all its steps, and all of them are recorded."""
        return 0 <= self.total_steps <= self.steps

    def save(self, path: str | Path) -> None:
        """Write the record; a reader finds the old file or the new one, never a part."""
        path = Path(path)
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["norms"] = self.norms.detach().cpu().double().numpy()
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                np.savez(file, **values)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "NormRecord":
        """Read a record.

        Raises:
            FileNotFoundError: If there is no file.
            ValueError: If it holds no record.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                values: dict[str, Any] = {
                    field.name: file[field.name] if field.name == "norms" else file[field.name].item()
                    for field in dataclasses.fields(cls)
                }
        except FileNotFoundError:
            raise
        except (KeyError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} holds no record of gradient norms") from error
        if values["norm"] not in ("l1", "l2"):
            raise ValueError(f"{path} holds norms of a kind that is not known: {values['norm']!r}")
        return cls(**{**values, "norms": torch.from_numpy(values["norms"])})
