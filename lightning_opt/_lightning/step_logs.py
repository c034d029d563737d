"""Values that ``training_step`` logs when it runs several times, on pieces of one batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch


@contextmanager
def in_pieces(trainer: pl.Trainer, batch: Any) -> Iterator["PieceLogs"]:
    """Let values logged by pieces of a batch count as those of the batch.

    What is gathered over an epoch weighs every piece by its samples by itself, once Lightning knows them; a value of
    the step would be that of the last piece, and becomes the mean over the pieces (or sum, maximum, minimum, as it was
    logged). A torchmetrics object logged by step shows its last piece.

    Args:
        trainer: A Trainer within a training batch.
        batch: The whole batch.
    """
    logs = PieceLogs(trainer)
    yield logs
    logs.close(batch)


class PieceLogs:
    """Collects what each piece logs."""

    def __init__(self, trainer: pl.Trainer) -> None:
        results = trainer._results
        assert results is not None
        self._results = results
        self._samples = 0
        self._seen: dict[str, list[tuple[torch.Tensor, int]]] = {}

    def begin(self, batch: Any, samples: int) -> None:
        """Before ``training_step`` of a piece."""
        self._results.batch, self._results.batch_size = batch, None
        self._samples = samples
        for metric in self._of_step():
            metric._forward_cache = None

    def end(self) -> None:
        """After it."""
        for metric in self._of_step():
            if metric._forward_cache is not None:
                self._seen.setdefault(metric.meta.name, []).append((metric._forward_cache, self._samples))

    def close(self, batch: Any) -> None:
        """After the last piece."""
        self._results.batch, self._results.batch_size = batch, None
        for metric in self._of_step():
            seen = self._seen.get(metric.meta.name)
            if not seen:
                continue
            values = torch.stack([value.float() for value, _ in seen])
            if metric.meta.is_mean_reduction:
                weights = torch.tensor([float(n) for _, n in seen], device=values.device)
                value = (values * (weights / weights.sum())).sum()
            elif metric.meta.is_sum_reduction:
                value = values.sum()
            elif metric.meta.is_max_reduction:
                value = values.max()
            else:
                value = values.min() if metric.meta.is_min_reduction else values[-1]
            metric._forward_cache = value.to(seen[-1][0].dtype)
            if not metric.meta.on_epoch:
                metric.value = metric._forward_cache

    def _of_step(self) -> list[Any]:
        return [
            metric
            for metric in self._results.values()
            if metric.is_tensor and metric.meta.fx == "training_step" and metric.meta.on_step
        ]
