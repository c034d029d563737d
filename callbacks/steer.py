from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from typing_extensions import override

from lightning_opt._checks import check_interval
from lightning_opt._lightning.log_rows import row_is_due, write_row
from lightning_opt.ode.steer import steer_end
from lightning_opt.registry import register

from ._arguments import described_by_arguments
from ._log_values import is_wanted
from ._ode_blocks import find_blocks


@register(
    "callback",
    summary="STEER: neural ODEs trained with a random end of their time span",
    paper="2006.10711",
    card="local-ode-regularization",
    log_prefix="steer",
    capabilities=("ode",),
)
class STEER(pl.Callback):
    """Trains the blocks that solve a differential equation with a random end time, ``t1`` plus or minus ``b``.

    A baseline of :class:`LocalODERegularization`. The end is drawn anew for every batch, the same for all blocks, and
    logged as ``steer/shift``. Where a block is asked for several times, the last one moves. Evaluation has the end that
    was asked for. For counts of evaluations add :class:`LocalODERegularization` with ``coeff=0``.

    Args:
        block: As for :class:`LocalODERegularization`.
        b: Half the width, below the length of the time span.
        seed: Of the random ends.

    Raises:
        ValueError: If ``b`` is negative; in the forward pass, where the end comes before another time.
        MisconfigurationException: When fitting starts, without a block, or where ``b`` is not below its time span.

    Cost: none.

    Example:
        >>> STEER(b=0.5)
        STEER(block=None, b=0.5, seed=0)
    """

    def __init__(self, block: str | nn.Module | None = None, *, b: float = 0.5, seed: int = 0) -> None:
        check_interval("b", b, 0)
        check_interval("seed", seed, 0)
        self.block, self.b, self.seed = block, b, seed
        self._batches = 0
        self._blocks: dict[str, Any] = {}

    def __repr__(self) -> str:
        return described_by_arguments(self)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._batches = 0

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._blocks = find_blocks(pl_module, self.block, "STEER")
        for name, block in self._blocks.items():
            if not hasattr(block, "end_shift"):
                raise MisconfigurationException(f"STEER, block {name!r}: {type(block).__name__} has no end to move")
            try:
                steer_end(block.t_span[0], block.t_span[1], self.b, _generator(0, 0, 0))
            except ValueError as error:
                raise MisconfigurationException(f"STEER, block {name!r}: {error}") from error

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        shift = steer_end(-self.b - 1.0, 0.0, self.b, _generator(self.seed, self._batches, trainer.global_rank))
        for block in self._blocks.values():
            block.end_shift = shift

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if row_is_due(trainer) and is_wanted(trainer):
            write_row(trainer, {"steer/shift": next(iter(self._blocks.values())).end_shift})
        self._put_back()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._let_go()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._let_go()

    def _put_back(self) -> None:
        for block in self._blocks.values():
            block.end_shift = 0.0

    def _let_go(self) -> None:
        self._put_back()
        self._blocks = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._batches}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._batches = state_dict["batches"]


def _generator(seed: int, batch: int, rank: int) -> torch.Generator:
    """Of one batch on one rank, so that a resumed run draws the same."""
    word = np.random.SeedSequence([seed, batch, rank]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(word))
