"""What the regularizers of neural differential equations share: finding blocks, the term in the loss, logs, panels."""

import inspect
import math
from collections.abc import Iterator
from types import CodeType
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_opt._checks import check_interval
from lightning_opt._lightning.log_rows import row_is_due, write_row
from lightning_opt._lightning.probe import is_probed
from lightning_opt.ode.coefficient import Decay, check_coefficient, coefficient

from ._arguments import described_by_arguments
from ._log_values import is_wanted, to_floats
from ._ode_blocks import find_blocks
from ._ode_panels import solve_panels
from ._report_history import Curve
from ._report_panel import Panel
from ._training_terms import add_term, remove_term

_OF_A_STEP = ("_seen", "_called", "_ever_solved", "_row", "_skipped")
COUNTS = ("nfe_forward", "nfe_backward", "accepted", "rejected")


class ODERegularizer(pl.Callback):
    """Adds ``coefficient * sum of value_of(block)`` to the loss; a subclass says what the value of a block is.

    Args:
        block: As :func:`find_blocks` takes it.
        coeff: First coefficient.
        coeff_end: Last one.
        decay: Between them.
        decay_steps: Optimizer steps until the last one; None takes the length of training.
        every_n_steps: Add the term in every so many steps.
        seed: Of the random draws.
    """

    prefix: ClassVar[str]
    needs_graph: ClassVar[bool] = False
    """Whether it differentiates through the solve."""
    needs_gradients: ClassVar[bool] = True  # strategies without them refuse it

    def __init__(
        self,
        block: str | nn.Module | None,
        coeff: float,
        coeff_end: float,
        decay: Decay,
        decay_steps: int | None,
        every_n_steps: int,
        seed: int,
    ) -> None:
        check_coefficient(coeff, coeff_end, decay)
        if decay_steps is not None:
            check_interval("decay_steps", decay_steps, 1)
        check_interval("every_n_steps", every_n_steps, 1)
        check_interval("seed", seed, 0)
        self.block, self.coeff, self.coeff_end, self.decay = block, coeff, coeff_end, decay
        self.decay_steps, self.every_n_steps, self.seed = decay_steps, every_n_steps, seed
        self._forget()
        self._begin()

    def __repr__(self) -> str:
        return described_by_arguments(self)

    # --- what a subclass says --------------------------------------------------------------------------------------

    def check_block(self, block: Any) -> None:
        """Raise ``ValueError`` for a block that cannot be regularized so."""
        raise NotImplementedError

    def value_of(self, block: Any, draw: float, generator: torch.Generator) -> Tensor:
        """The regularizer of a block whose last solve is that of this step.

        Args:
            block: Of the module.
            draw: Uniform in [0, 1), of this batch and rank.
            generator: Likewise, for more.
        """
        raise NotImplementedError

    # --- a fit -----------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """The state of a run that begins."""
        self._batches = 0
        self._skipped = 0  # terms that were not finite
        self._curves: dict[str, Curve] = {}

    def _begin(self) -> None:
        """What belongs to one fit."""
        self._blocks: dict[str, Any] = {}
        self._trainer: pl.Trainer | None = None
        self._total = 1
        self._seen: list[Any] = []
        self._due = False  # whether the step under way has the term
        self._called = False  # the function for manual optimization, within the step under way
        self._ever_solved = False
        self._row: dict[str, Tensor | float] = {}
        self._before_probe: dict[str, Any] | None = None  # what the probe under way will put back

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._forget()
            self._begin()
            if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
                raise MisconfigurationException(
                    f"{type(self).__name__} evaluates the dynamics by themselves, and {type(trainer.strategy).__name__}"
                    " may hold parts of them; use a single device or DDP."
                )
            if not pl_module.automatic_optimization and not _refers_to(type(pl_module), ode_regularization.__name__):
                raise MisconfigurationException(
                    f"{type(self).__name__} cannot add its term to a loss that {type(pl_module).__name__} optimizes by"
                    " hand: add lightning_opt.callbacks.ode_regularization(self) to the loss in training_step, behind"
                    " the forward pass"
                )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        who = type(self).__name__
        self._blocks = find_blocks(pl_module, self.block, who)
        for name, block in self._blocks.items():
            try:
                self.check_block(block)
            except ValueError as error:
                raise MisconfigurationException(f"{who}, block {name!r}: {error}") from error
        total = self.decay_steps or (trainer.estimated_stepping_batches if self.decay == "exponential" else 1)
        if not math.isfinite(total):
            raise MisconfigurationException(
                f"{who} lets its coefficient decay over training, whose length is not known: give decay_steps, or"
                " decay='constant'"
            )
        self._total, self._trainer = int(total), trainer
        for block in self._blocks.values() if self.needs_graph else ():
            block.keep_graph = True
        add_term(pl_module, self)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        self._due = trainer.global_step % self.every_n_steps == 0

    def before_step(self) -> None:
        """Called before ``training_step``."""
        self._before_probe = None
        if is_probed(self._module()):
            self._before_probe = {name: vars(self)[name] for name in _OF_A_STEP}
        self._seen = [block.last_solve for block in self._blocks.values()]
        self._called = False

    def after_step(self) -> Tensor | None:
        """The term for the loss that ``training_step`` returned; None where it is not wanted.

        Another plugin's probe gets it too, unless it evaluates in evaluation mode, and leaves no trace here.
        """
        if self._before_probe is not None:
            term = self.term() if self._module().training else None
            vars(self).update(self._before_probe)
            self._before_probe = None
            return term
        if self._module().automatic_optimization:
            return self.term()
        if not self._called:
            raise MisconfigurationException(
                f"{type(self).__name__}: training_step did not call lightning_opt.callbacks.ode_regularization(self)"
            )
        return None

    def term(self) -> Tensor | None:
        """The coefficient times the regularizers of the blocks that were solved in this step."""
        assert self._trainer is not None
        self._called = True
        solved = {
            name: (i, block)
            for i, (name, block) in enumerate(self._blocks.items())
            if block.last_solve is not self._seen[i]
        }
        weight = coefficient(self._trainer.global_step, self._total, self.coeff, self.coeff_end, self.decay)
        looks = row_is_due(self._trainer) and is_wanted(self._trainer)
        self._ever_solved |= bool(solved)
        self._row = {"coeff": weight}
        if not self._due or not solved or not (weight or looks):
            return None
        total: Tensor | None = None
        with torch.set_grad_enabled(weight > 0):
            for name, (i, block) in solved.items():
                value = self._value(block, i)
                self._row[f"value{self._suffix(name)}"] = value.detach()
                if weight == 0:
                    continue
                if not math.isfinite(value.item()):
                    self._skip()
                    continue
                total = weight * value if total is None else total + weight * value.to(total.device)
        return total

    def _module(self) -> pl.LightningModule:
        assert self._trainer is not None
        return self._trainer.lightning_module

    def _value(self, block: Any, index: int) -> Tensor:
        """With draws that only depend on seed, batch, rank and block, so that a resumed run has the same."""
        assert self._trainer is not None
        device = block.last_solve.states[0].device if block.last_solve.states else torch.device("cpu")
        words = np.random.SeedSequence([self.seed, self._batches, self._rank(), index]).generate_state(2)
        generator = torch.Generator(device).manual_seed(int(words[1]))
        return self.value_of(block, int(words[0]) / 2**32, generator)

    def _rank(self) -> int:
        """Whose draws to take."""
        assert self._trainer is not None
        return self._trainer.global_rank

    def _skip(self) -> None:
        if not self._skipped:
            rank_zero_warn(f"{type(self).__name__}: a term is not finite, and is left out of the loss")
        self._skipped += 1

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._ever_solved and self._batches == 1:
            rank_zero_warn(f"{type(self).__name__}: training_step solved none of {', '.join(map(repr, self._blocks))}")
        row = dict(self._row)
        for i, (name, block) in enumerate(self._blocks.items()):
            record = block.last_solve
            if record is not None and (not self._seen or record is not self._seen[i]):
                row.update({f"{count}{self._suffix(name)}": float(getattr(record, count)) for count in COUNTS})
                record.forget_states()
        if row_is_due(trainer) and is_wanted(trainer):
            self._write(trainer, row)
        self._row, self._seen = {}, []

    def _write(self, trainer: pl.Trainer, row: dict[str, Tensor | float]) -> None:
        values = {name: value for name, value in row.items() if isinstance(value, float)}
        values |= to_floats({name: value for name, value in row.items() if isinstance(value, Tensor)})
        if self._skipped:
            values["skipped"] = float(self._skipped)
        write_row(trainer, {f"{self.prefix}/{name}": value for name, value in values.items()})
        for count in COUNTS:
            parts = [value for name, value in values.items() if name.split("/")[0] == count]
            if parts:
                self._curves.setdefault(count, Curve()).add(trainer.global_step, sum(parts))

    def _suffix(self, name: str) -> str:
        return f"/{name}" if len(self._blocks) > 1 else ""

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._let_go(pl_module)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._let_go(pl_module)

    def _let_go(self, pl_module: pl.LightningModule) -> None:
        remove_term(pl_module, self)
        for block in self._blocks.values() if self.needs_graph else ():
            block.keep_graph = False
        self._begin()

    @override
    def state_dict(self) -> dict[str, Any]:
        curves = {name: curve.state_dict() for name, curve in self._curves.items()}
        return {"batches": self._batches, "skipped": self._skipped, "curves": curves}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._batches, self._skipped = state_dict["batches"], state_dict["skipped"]
        self._curves = {name: Curve.from_state_dict(state) for name, state in state_dict["curves"].items()}

    def report_panels(self) -> list[Panel]:
        """Evaluations and steps over training, for :class:`RunReport`."""
        return solve_panels(self._curves)


def ode_regularization(pl_module: pl.LightningModule) -> Tensor:
    """The terms that the Trainer's callbacks would add to the loss, for a module that optimizes by hand.

    To be added to the loss once in ``training_step``, behind the forward pass::

        loss = cross_entropy(self(x), y) + ode_regularization(self)
        self.manual_backward(loss)

    Args:
        pl_module: The module, in its ``training_step``.

    Returns:
        A 0-dim tensor: the sum over :class:`LocalODERegularization`, :class:`GlobalODERegularization` and
        :class:`TayNODE`, coefficients included; 0 where there is none of them.
    """
    total = torch.zeros((), device=pl_module.device)
    for callback in pl_module.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ODERegularizer):
            term = callback.term()
            total = total if term is None else total + term.to(total.device)
    return total


def _refers_to(cls: type, name: str) -> bool:
    """Whether a method of the class names a function."""
    methods = (f for _, f in inspect.getmembers(cls, inspect.isfunction))
    return any(name in code.co_names for method in methods for code in _codes(method.__code__))


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
