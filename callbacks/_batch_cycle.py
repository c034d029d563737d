"""Which micro-batches make an optimizer step, and in what pieces they run, while the batch size changes."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_opt._lightning import epoch_length
from lightning_opt._lightning.accumulation import Piece
from lightning_opt.data import ResumableLoader
from lightning_opt.data.resumable_loader import Place
from lightning_opt.gradient_noise import BatchTest, split_batch

from ._batch_pieces import split_samples
from ._batch_window import Window, even_sizes
from ._group_gradients import GroupGradients

Estimator = Literal["micro", "per_sample", "worker"]


class Grouping(NamedTuple):
    """What a test compares; the arguments of :class:`AdaptiveBatchSize` of these names."""

    test: BatchTest
    estimator: Estimator
    groups: int


class BatchCycle:
    """The windows of a run, one an optimizer step: answers :class:`lightning_opt._lightning.accumulation.Cycle`.

    A window begins with the first batch behind the last one. In a window that is tested, a collector takes the
    gradients of its groups; where there are fewer micro-batches than groups, micro-batches run in several pieces.

    Args:
        grouping: What a test compares.
        max_micro: The most samples of a micro-batch on a rank, or None.
        is_due: Whether the window that begins is to be tested.

    Attributes:
        batch: Samples of the steps to come, on all ranks; 0 before training has started.
        micro: Samples of their micro-batches on a rank.
        accum: Micro-batches of each.
        limit_micro: ``max_micro``, lowered where memory is full.
        window: The one under way.
        collector: Of the gradients of a window that is tested; None for ``"per_sample"`` and where it is not tested.
        batches: Those of a window that is tested, each with its samples, for ``"per_sample"``.
    """

    def __init__(self, grouping: Grouping, max_micro: int | None, is_due: Callable[[], bool]) -> None:
        self.grouping, self._is_due = grouping, is_due
        self.batch = self.micro = self.accum = 0
        self.limit_micro = max_micro
        self.window = Window()
        self.release()

    def release(self) -> None:
        """Drop what belongs to a Trainer."""
        self.trainer: pl.Trainer | None = None
        self.loader: ResumableLoader | None = None
        self.collector: GroupGradients | None = None
        self.batches: list[tuple[Any, int]] = []
        self._mixes_samples = False  # BatchNorm, which takes two samples at least
        self._largest_piece = 0
        self._places: list[Place] = []  # of the window's micro-batches, once asked for
        self._rolled: tuple[int, int] | None = None  # epoch and number of the batch that was last rolled to

    def attach(self, trainer: pl.Trainer) -> None:
        """Serve a Trainer, in ``on_fit_start``."""
        self.trainer = trainer
        self._mixes_samples = any(isinstance(m, _BatchNorm) for m in trainer.lightning_module.modules())

    def split(self, batch: int) -> None:
        """Let steps hold so many samples, or a few more where micro-batches do not divide them."""
        assert self.trainer is not None
        self.micro, self.accum = split_batch(batch, self.limit_micro, self.trainer.world_size)
        self.batch = self.micro * self.accum * self.trainer.world_size

    def resize(self) -> None:
        """Let the loader draw micro-batches of the present size."""
        trainer, loader = self.running()
        loader.set_batch_size(self.micro)
        epoch_length.set_epoch_length(trainer, len(loader))
        self._places = []

    def running(self) -> tuple[pl.Trainer, ResumableLoader]:
        """The Trainer and its loader."""
        assert self.trainer is not None
        assert self.loader is not None
        return self.trainer, self.loader

    def number(self) -> int:
        """Of the batch under way, in its epoch."""
        return -1 if self.loader is None else self.loader.batches_handed_out - 1

    def samples(self) -> int:
        """Samples of the window so far, on all ranks."""
        return sum(place.samples_of_all for place in self._reached(self.number()))

    def take(self, batch: Any) -> None:
        """Begin with a batch that was handed out."""
        self.roll()
        if self.window.tests and self.grouping.estimator == "per_sample":
            self.batches.append((batch, self._reached(self.number())[-1].samples))

    def close(self) -> None:
        """Drop what was gathered, behind the optimizer step."""
        self.collector, self.batches = None, []

    # --- what the accumulation asks ----------------------------------------------------------------------------------

    def starts(self) -> bool:
        """Whether the batch under way is the first of its window."""
        self.roll()
        return self.number() <= self.window.first

    def ends(self) -> bool:
        """Whether the optimizer steps behind the batch under way."""
        self.roll()
        return self.ended()

    def pieces(self, batch: Any) -> Sequence[Piece]:
        """The batch, or its pieces where a test or full memory needs them."""
        trainer, _ = self.running()
        n = self._reached(self.number())[-1].samples
        parts = self._parts(n) if self.collector is not None else 1
        if self.limit_micro is not None:
            parts = max(parts, -(-n // self.limit_micro))
        sizes = even_sizes(n, min(parts, n))
        self._largest_piece = sizes[0]
        batches = [batch]
        if len(sizes) > 1:
            try:
                batches = split_samples(batch, n, sizes)
            except ValueError as error:
                raise MisconfigurationException(
                    f"AdaptiveBatchSize cannot divide the training batch: {error}. It divides nested dicts, lists and"
                    " tuples of tensors along dimension 0; give such batches, or use estimator='worker' on several"
                    " ranks."
                ) from error
        whole = self.window.planned / trainer.world_size
        return [Piece(part, size, whole / size) for part, size in zip(batches, sizes, strict=True)]

    def backward(self, piece: Piece, *, last: bool) -> AbstractContextManager[None]:
        """Around the backward pass of a piece."""
        trainer, _ = self.running()
        self.window.seen += piece.samples
        if self.collector is None:
            return nullcontext()
        communicates = last and trainer.world_size > 1
        return self.collector.backward(piece.samples, piece.divisor, communicates=communicates)

    def before_step(self) -> None:
        """Weigh the gradients by the samples that there were, where they are not as many as planned."""
        trainer, _ = self.running()
        window = self.window
        actual = window.seen if trainer.world_size == 1 else self.samples()
        if actual not in (window.planned, 0):
            for p in trainer.lightning_module.parameters():
                if p.grad is not None:
                    p.grad.mul_(window.planned / actual)
            window.tests, self.collector = False, None  # its groups weigh as planned

    def out_of_memory(self, batch: Any, error: torch.OutOfMemoryError, *, changed: bool) -> None:
        """Halve the pieces, and batches to come."""
        trainer, _ = self.running()
        size = self._largest_piece
        if trainer.world_size > 1:
            raise torch.OutOfMemoryError(
                f"A micro-batch of {size} samples does not fit, and other ranks wait: start again from the last"
                f" checkpoint with AdaptiveBatchSize(max_micro={max(size // 2, 1)}). {error}"
            ) from error
        if size == 1:
            raise error
        self.limit_micro = size // 2
        number, target = self.number(), self.window.target
        done = sum(place.samples for place in self._reached(number - 1))
        self.split(self.batch)
        self.resize()
        if changed:
            self._begin_window(number, target)
        else:
            self.window.seen = done
        self.window.tests, self.collector = False, None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rank_zero_warn(
            f"AdaptiveBatchSize: {size} samples did not fit into memory; micro-batches have at most {self.limit_micro}"
            " from now on, and this one runs in parts."
            + (f" The gradients of {done} samples of this step were lost." if changed and done else "")
        )

    # --- windows -----------------------------------------------------------------------------------------------------

    def roll(self) -> None:
        """Begin a window if the batch under way is beyond the last one."""
        loader, number = self.loader, self.number()
        if loader is None or self.trainer is None or number < 0:
            return
        place = (loader.sampler.epoch, number)  # type: ignore[attr-defined]
        if place == self._rolled:  # Lightning asks several times a batch
            return
        self._rolled = place
        if self.window.epoch != place[0] or number > self._last:
            self._begin_window(number, self.batch)
            self.window.tests = self._is_due()
            self.batches = []
            self.collector = self._new_collector() if self.window.tests else None

    def ended(self) -> bool:
        """Whether no window is under way behind the batch under way."""
        number = self.number()
        if self.loader is None or number < self.window.first or self.window.epoch < 0:
            return True
        return number >= self._last

    def _begin_window(self, number: int, target: int) -> None:
        _, loader = self.running()
        self.window, self._places = Window(loader.sampler.epoch, number, target), []  # type: ignore[attr-defined]
        self.window.planned = sum(place.samples_of_all for place in self._window_places())

    def _window_places(self) -> list[Place]:
        """Of all micro-batches of the window."""
        if not self._places:
            trainer, loader = self.running()
            self._places = self.window.places(loader, trainer.world_size)
        return self._places

    @property
    def _last(self) -> int:
        """Number of the last batch of the window."""
        return self.window.first + len(self._window_places()) - 1

    def _reached(self, number: int) -> list[Place]:
        """Of the window's micro-batches up to the batch of this number."""
        return self._window_places()[: number + 1 - self.window.first]

    def _parts(self, samples: int) -> int:
        """Into how many pieces a micro-batch is divided in a step that tests."""
        if self.grouping.estimator != "micro":
            return 1
        trainer, _ = self.running()
        together = len(self._window_places()) * trainer.world_size
        least = 2 if self._mixes_samples else 1
        return max(min(-(-self.grouping.groups // together), samples // least), 1)

    def _new_collector(self) -> GroupGradients | None:
        """For the window that begins."""
        test, estimator, groups = self.grouping
        if estimator == "per_sample":
            return None
        trainer, _ = self.running()
        parts = sum(self._parts(place.samples) for place in self._window_places())
        groups = 1 if estimator == "worker" else -(-groups // trainer.world_size)
        if min(groups, parts) * trainer.world_size < 2:
            return None
        return GroupGradients(
            [p for p in trainer.lightning_module.parameters() if p.requires_grad],
            parts,
            groups,
            keep="inner_product" in test,
            coordinates=test == "coordinate",
        )

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Builtins: sizes and place of the window, without what it has gathered."""
        return {
            "batch": self.batch,
            "micro": self.micro,
            "accum": self.accum,
            "limit_micro": self.limit_micro,
            "window": self.window.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned; other entries are left alone."""
        self.batch, self.micro, self.accum = state["batch"], state["micro"], state["accum"]
        self.limit_micro = state["limit_micro"]
        self.window, self._places = Window(**state["window"]), []

    def gathered(self) -> dict[str, Any] | None:
        """What the window under way has gathered for its test on this rank; None where there is none."""
        if self.ended() or not self.window.tests:
            return None
        collected = None if self.collector is None else _cpu(self.collector.state_dict())
        return {"collected": collected, "batches": _cpu(self.batches)}

    def go_on(self, gathered: dict[str, Any] | None) -> None:
        """Continue a window from a checkpoint; without a test where what was gathered for it is not at hand."""
        trainer, _ = self.running()
        if not self.window.tests or self.ended():
            return
        if gathered is None:
            self.window.tests = False
            return
        self.collector = self._new_collector()
        device = trainer.lightning_module.device
        if self.collector is not None and gathered["collected"] is not None:
            self.collector.load_state_dict(gathered["collected"], device)
        self.batches = [(trainer.strategy.batch_to_device(batch, device), n) for batch, n in gathered["batches"]]


def _cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _cpu(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cpu(entry) for entry in value]
    return value
