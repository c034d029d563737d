"""Deciding when the optimizer steps, while the Trainer's own ``accumulate_grad_batches`` stays 1.

Lightning steps where the number of batches is divisible by ``accumulate_grad_batches`` and divides every loss by it;
changed in mid-epoch that makes windows of the wrong length with the wrong weight. Here somebody else says where a
window begins and ends and what each micro-batch weighs; all that Lightning derives from the question whether it
accumulates (schedulers by step, logging, checkpoints, ``no_sync``, ``global_step``) follows.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from torch import Tensor
from torch.optim import Optimizer

from . import step_logs


class Piece(NamedTuple):
    """Part of a batch that runs forward and backward by itself.

    Attributes:
        batch: What ``training_step`` gets.
        samples: How many it holds.
        divisor: The loss is divided by this before ``backward``.
    """

    batch: Any
    samples: int
    divisor: float


class Cycle(Protocol):
    """Who decides; asked about the batch under way."""

    def starts(self) -> bool:
        """Whether it is the first of its window, so that gradients are zeroed."""

    def ends(self) -> bool:
        """Whether the optimizer steps behind it."""

    def pieces(self, batch: Any) -> Sequence[Piece]:
        """What runs forward and backward one after the other."""

    def backward(self, piece: Piece, *, last: bool) -> AbstractContextManager[None]:
        """Around the backward pass of a piece; ``last`` is the one before the step, in which ranks communicate."""

    def before_step(self) -> None:
        """Called when all gradients of the window are there, before they are unscaled or clipped."""

    def out_of_memory(self, batch: Any, error: torch.OutOfMemoryError, *, changed: bool) -> None:
        """Make the pieces smaller, or raise; ``changed`` says whether gradients of the window may be spoilt."""


def own_accumulation(trainer: pl.Trainer, cycle: Cycle) -> Callable[[], None]:
    """Let ``cycle`` decide when the optimizer steps.

    Args:
        trainer: In ``on_fit_start``, with automatic optimization and ``accumulate_grad_batches=1``.
        cycle: Who decides.

    Returns:
        Puts Lightning's own way back.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    automatic = epoch_loop.automatic_optimization
    plain_zero_grad_fn = automatic._make_zero_grad_fn

    def make_zero_grad_fn(batch_idx: int, optimizer: Optimizer) -> Callable[[], None] | None:
        return plain_zero_grad_fn(batch_idx, optimizer) if cycle.starts() else None

    def make_closure(kwargs: OrderedDict, optimizer: Optimizer, batch_idx: int) -> Closure:
        def step_fn(batch: Any) -> ClosureResult:
            return automatic._make_step_fn(OrderedDict(kwargs, batch=batch))()

        return _PiecewiseClosure(
            trainer,
            cycle,
            kwargs["batch"],
            step_fn,
            automatic._make_backward_fn(optimizer),
            make_zero_grad_fn(batch_idx, optimizer),
        )

    epoch_loop._accumulated_batches_reached = cycle.ends  # type: ignore[method-assign]
    automatic._make_closure = make_closure  # type: ignore[method-assign]

    def put_back() -> None:
        vars(epoch_loop).pop("_accumulated_batches_reached", None)
        vars(automatic).pop("_make_closure", None)

    return put_back


def steps_now(trainer: pl.Trainer) -> bool:
    """Whether the optimizer steps behind the batch under way."""
    return not trainer.fit_loop._should_accumulate()


class _PiecewiseClosure(Closure):
    """Forward and backward of one batch in pieces, whose gradients sum to that of the batch."""

    def __init__(
        self,
        trainer: pl.Trainer,
        cycle: Cycle,
        batch: Any,
        step_fn: Callable[[Any], ClosureResult],
        backward_fn: Callable[[Tensor], None] | None,
        zero_grad_fn: Callable[[], None] | None,
    ) -> None:
        super().__init__(lambda: step_fn(batch), backward_fn, zero_grad_fn)
        self.trainer, self.cycle, self.batch, self.step_on = trainer, cycle, batch, step_fn

    @torch.enable_grad()
    def closure(self, *args: Any, **kwargs: Any) -> ClosureResult:
        while True:
            self._in_backward = False
            try:
                result = self._run()
                break
            except torch.OutOfMemoryError as error:
                failure = error.with_traceback(None)  # the frames hold the tensors that did not fit
            changed = self._in_backward and self._zero_grad_fn is None
            self.cycle.out_of_memory(self.batch, failure, changed=changed)
            if changed:
                self._zero_grad_fn = self._fresh_zero_grad
        if steps_now(self.trainer):
            self.cycle.before_step()
        return result

    def _fresh_zero_grad(self) -> None:
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad()

    def _run(self) -> ClosureResult:
        pieces = self.cycle.pieces(self.batch)
        step_follows = steps_now(self.trainer)
        outputs: list[ClosureResult] = []
        logging = step_logs.in_pieces(self.trainer, self.batch) if len(pieces) > 1 else nullcontext()
        with logging as logs:
            for number, piece in enumerate(pieces):
                last = step_follows and number == len(pieces) - 1
                with _block_parallel_sync_behavior(self.trainer.strategy, block=not last):
                    if logs is not None:
                        logs.begin(piece.batch, piece.samples)
                    output = self.step_on(piece.batch)
                    if logs is not None:
                        logs.end()
                    outputs.append(output)
                    if output.closure_loss is None:
                        self.warning_cache.warn(
                            "`training_step` returned `None`. If this was on purpose, ignore this warning..."
                        )
                    if self._zero_grad_fn is not None and number == 0:
                        self._zero_grad_fn()
                    if self._backward_fn is not None and output.closure_loss is not None:
                        self._in_backward = True
                        loss = output.closure_loss
                        with self.cycle.backward(piece, last=last):
                            self._backward_fn(loss if piece.divisor == 1 else loss / piece.divisor)
        return outputs[0] if len(outputs) == 1 else _joined(outputs, [piece.samples for piece in pieces])


def _joined(outputs: Sequence[ClosureResult], samples: Sequence[int]) -> ClosureResult:
    """What ``training_step`` would have returned for the whole batch, as far as that can be told."""
    kept = [(output, n) for output, n in zip(outputs, samples, strict=True) if output.loss is not None]
    loss = _mean([output.loss for output, _ in kept], [n for _, n in kept]) if kept else None
    extra = {name: _join([output.extra[name] for output in outputs], samples) for name in outputs[-1].extra}
    return ClosureResult(loss, extra=extra)


def _join(values: Sequence[Any], samples: Sequence[int]) -> Any:
    if all(isinstance(value, Tensor) for value in values):
        if all(value.ndim and len(value) == n for value, n in zip(values, samples, strict=True)):
            return torch.cat(list(values))
        if all(value.ndim == 0 and value.is_floating_point() for value in values):
            return _mean(values, samples)
    return values[-1]


def _mean(values: Sequence[Any], samples: Sequence[int]) -> Tensor:
    weighted = [value.detach() * (n / sum(samples)) for value, n in zip(values, samples, strict=True)]
    return torch.stack(weighted).sum(0)
