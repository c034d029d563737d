"""A batch size that grows as the noise of the gradient demands (arXiv:2402.11215)."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from typing_extensions import override

from lightning_opt._checks import check_choice, check_interval
from lightning_opt._lightning import accumulation, epoch_length, loader_source
from lightning_opt._lightning.accumulation import Piece
from lightning_opt._lightning.log_rows import row_is_due, write_row
from lightning_opt._lightning.probe import check_can_probe
from lightning_opt.data import ResumableLoader
from lightning_opt.gradient_noise import (
    BatchTest,
    GradientStatistics,
    next_batch_size,
    required_batch_size,
    split_batch,
)
from lightning_opt.gradient_noise.batch_tests import check_thresholds
from lightning_opt.registry import register
from lightning_opt.schedules import SampleBasedLR

from ._batch_pieces import split_samples
from ._batch_window import Window, even_sizes
from ._group_gradients import GroupGradients
from ._log_values import is_wanted
from ._ownership import Possession, check_no_scheduler, check_sole_owner
from ._per_sample_sums import per_sample_sums
from ._report_history import Curve
from ._report_panel import Panel
from ._train_loader import as_resumable


@register(
    "callback",
    summary="Grows the batch during training as the noise of its own gradients demands",
    paper="2402.11215",
    card="adaptive-batch-size",
    log_prefix="batch_size",
)
class AdaptiveBatchSize(pl.Callback):
    r"""Grows the batch during training, just enough that the noise of the mean gradient stays a share of its norm.

    Every ``test_interval`` steps of the size at the start the variance S of per-sample gradients is estimated; if
    :math:`S / b > \eta^2 \lVert \bar g \rVert^2` (the norm test;
    :func:`lightning_opt.gradient_noise.required_batch_size` has all four), the batch grows to what the test asks, from
    the next step on. It never shrinks. A run with ``eta=inf`` is bit for bit the run without the callback.

    Any optimizer of torch or of this package serves. The batch grows by a larger batch of the loader, up to
    ``max_micro`` samples on a rank, and then by accumulation, in the middle of the epoch: every sample of an epoch is
    read once, ``num_training_batches`` and the progress bar stay true, one logical step is one ``global_step``. Every
    micro-batch weighs as many samples as it holds, also the last ones of an epoch. ``val_check_interval`` and
    ``limit_train_batches`` count batches of the size that the run begins with, that is samples.

    Read the training data with :class:`lightning_opt.data.ResumableLoader`; a plain DataLoader is replaced by one, and
    said so. ``training_step`` must return the mean over the samples of its batch.

    Args:
        test: ``"norm"``, ``"inner_product"``, ``"augmented_inner_product"`` or ``"coordinate"``.
        eta: Noise that the norm and coordinate tests accept, relative to the gradient; smaller means larger batches.
        theta: The same of the inner product tests.
        nu: The same orthogonal to the gradient.
        quantile: Share of coordinates that must pass the coordinate test.
        b0: Samples of the first step, on all ranks; None for the loader's batch size.
        b_max: The largest batch; None for all samples of an epoch. Once reached, testing stops and its cost with it.
            The batch is rounded up to a multiple of ranks times micro-batches.
        max_micro: The most samples of a micro-batch on a rank. None lets it grow until memory is full: on one device a
            batch that does not fit is halved and trained on in parts, and ``max_micro`` lowered.
        test_interval: Test every so many steps of the batch that the run begins with, that is every so many samples: in
            steps more often as the batch grows, and a test then costs a smaller share of its step. 1 tests every step.
        estimator: Where the variance comes from. ``"micro"``: mean gradients of the micro-batches, as differences of
            ``p.grad``, without a further pass; where they are fewer than ``groups``, those of a step that tests run in
            several pieces. ``"worker"``: the mean gradients of the ranks, one group a rank. ``"per_sample"``:
            gradients of all samples by ``torch.func.vmap``, a further pass and more.
        groups: How many mean gradients ``"micro"`` compares at least, all ranks together.
        ema: Average S and the squared norm over tests with this decay, in [0, 1).
        debias: Subtract :math:`S / b` from :math:`\lVert \bar g \rVert^2`, which is too large by it; the authors do
            not.
        growth_cap: Grow at most by this factor at once; None for any. With few groups or a small batch the estimate is
            wild, and as the batch never shrinks one outlier stays: 2 is a good choice then.
        lr_scale: Multiply the learning rates by the growth of the batch (``"linear"``, for SGD), its square root
            (``"sqrt"``, for Adam; arXiv:2006.09092), or leave them. The callback then owns the learning rate.
        chunk_size: Samples at once for ``"per_sample"``.
        seed: Of the order of the samples, where a plain DataLoader is replaced.

    Logs, on steps that are logged or tested: ``batch_size/global``, ``batch_size/micro`` and ``batch_size/accum`` of
    the step, ``batch_size/samples`` processed, and of a test ``batch_size/requested``, ``batch_size/var_trace`` (S),
    ``batch_size/grad_norm_sq``, and ``batch_size/ratio`` (requested over present batch). The run report shows the batch
    size over samples.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: Before the first step, with manual optimization, ``accumulate_grad_batches`` other
            than 1, a strategy that is neither of one device nor DDP, LBFGS, data without length, a sampler or batch
            sampler of the user's own, several loaders, ``"worker"`` on one rank, ``"per_sample"`` with BatchNorm,
            another callback that sets the batch size, or ``lr_scale`` beside a scheduler. In the first test, if the
            batch cannot be divided along the first dimension of its tensors.

    Where pieces of a batch run one after the other BatchNorm sees the pieces, as with any accumulation. A test that
    meets a number that is not finite decides nothing, and says so once.

    Cost:
        ``"micro"``: on steps that are tested, one copy of the gradients and three passes over them a group (for the
        inner product tests ``groups`` copies, for the coordinate test two), and what it costs to run the batch in
        pieces; one small all-reduce on several ranks. Nothing on other steps.

    Example:
        >>> AdaptiveBatchSize(eta=1.0, b_max=4096, max_micro=256, growth_cap=2.0).test
        'norm'
    """

    owns: ClassVar[frozenset[Possession]] = frozenset({"batch size"})

    def __init__(
        self,
        test: BatchTest = "norm",
        eta: float = 0.5,
        theta: float = 0.9,
        nu: float = 5.84,
        quantile: float = 0.95,
        b0: int | None = None,
        b_max: int | None = None,
        max_micro: int | None = None,
        test_interval: int = 40,
        estimator: Literal["micro", "per_sample", "worker"] = "micro",
        groups: int = 8,
        ema: float = 0.0,
        debias: bool = False,
        growth_cap: float | None = None,
        lr_scale: Literal["none", "sqrt", "linear"] = "none",
        chunk_size: int = 32,
        seed: int = 0,
    ) -> None:
        check_thresholds(test, eta=eta, theta=theta, nu=nu, quantile=quantile)
        counts: dict[str, tuple[int | None, int]] = {
            "b0": (b0, 2),
            "b_max": (b_max, max(b0 or 0, 2)),
            "max_micro": (max_micro, 1),
            "test_interval": (test_interval, 1),
            "groups": (groups, 2),
            "chunk_size": (chunk_size, 1),
            "seed": (seed, 0),
        }
        for name, (value, low) in counts.items():
            if value is not None:
                check_interval(name, value, low)
                if not isinstance(value, int):
                    raise ValueError(f"{name} must be an integer, got {value!r}")
        check_choice("estimator", estimator, ["micro", "per_sample", "worker"])
        check_choice("lr_scale", lr_scale, ["none", "sqrt", "linear"])
        check_interval("ema", ema, 0.0, 1.0, closed="[)")
        if growth_cap is not None:
            check_interval("growth_cap", growth_cap, 1.0, closed="(]")
        if ema and test == "coordinate":
            raise ValueError(f"ema must be 0 with test='coordinate', which keeps no averages of coordinates; got {ema}")
        self.test: BatchTest = test
        self.eta, self.theta, self.nu, self.quantile = eta, theta, nu, quantile
        self.b0, self.b_max, self.max_micro = b0, b_max, max_micro
        self.test_interval, self.estimator, self.groups = test_interval, estimator, groups
        self.ema, self.debias, self.growth_cap = ema, debias, growth_cap
        self.lr_scale, self.chunk_size, self.seed = lr_scale, chunk_size, seed
        self._undo: list[Callable[[], None]] = []  # what is arranged with a Trainer
        if lr_scale != "none":
            self.owns = frozenset({"batch size", "learning rate"})  # type: ignore[misc]
        self._begin()

    def __repr__(self) -> str:
        names = inspect.signature(type(self)).parameters
        return f"AdaptiveBatchSize({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def _begin(self) -> None:
        self._batch = self._micro = self._accum = 0  # of the steps to come; 0 before training has started
        self._start = 0  # of the first step
        self._untested = -1  # samples of the steps since the last test, if there was one
        self._limit_micro = self.max_micro  # lowered where memory is full
        self._samples = 0
        self._skipped = 0  # tests that met a number that is not finite
        self._means: list[float] = []  # moving averages: their weight, S, squared norm, V
        self._decision: dict[str, float] | None = None  # of the step under way
        self._window = Window()
        self._curves = {"batch": Curve(), "requested": Curve()}
        self._loaded_groups: Any = None
        self._release()

    def _release(self) -> None:
        """Drop what belongs to a Trainer."""
        self._trainer: pl.Trainer | None = None
        self._loader: ResumableLoader | None = None
        self._collector: GroupGradients | None = None
        self._batches: list[tuple[Any, int]] = []  # of the window, for per_sample
        self._largest_piece = 0
        self._mixes_samples = False  # BatchNorm, which takes two samples at least
        self._crashed = False
        self._refusal: MisconfigurationException | None = None
        self._epoch_batches = 0  # of the size at the start
        self._b_max = 0
        while self._undo:
            self._undo.pop()()

    # --- the batch size ----------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Samples of a step on all ranks; 0 before training has started."""
        return self._batch

    @property
    def samples(self) -> int:
        """Samples processed, on all ranks."""
        return self._samples

    @property
    def skipped_tests(self) -> int:
        """Tests without a decision, since a number was not finite."""
        return self._skipped

    # --- before training ---------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._release()
        self._begin()
        check_sole_owner(trainer, self)
        _check_trainer(trainer, pl_module)
        if self.estimator == "worker" and trainer.world_size == 1:
            raise MisconfigurationException(
                "AdaptiveBatchSize(estimator='worker') compares the gradients of ranks, and there is one; use 'micro'."
            )
        if self.estimator == "per_sample":
            check_can_probe(trainer, pl_module, "AdaptiveBatchSize(estimator='per_sample')")
        self._undo.append(loader_source.replace_train_loader(trainer, self._resumable))

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.lr_scale != "none":
            check_no_scheduler(trainer, self)
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
            raise MisconfigurationException(
                "AdaptiveBatchSize accumulates over several batches, which LBFGS would evaluate again; use another"
                " optimizer."
            )
        self._mixes_samples = any(isinstance(m, _BatchNorm) for m in pl_module.modules())
        if self.estimator == "per_sample" and self._mixes_samples:
            raise MisconfigurationException(
                "AdaptiveBatchSize(estimator='per_sample') needs gradients of single samples, which BatchNorm mixes;"
                " use estimator='micro'."
            )
        self._trainer = trainer
        self._undo.append(accumulation.own_accumulation(trainer, self))
        self._undo.append(epoch_length.own_validation_interval(trainer, self._validation_is_due))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attach(trainer)
        if self._window.tests and not self._ended():
            self._collector = self._collect(pl_module)
            self._take_loaded(trainer, pl_module)
        self._loaded_groups = None

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attach(trainer)  # it may have been made anew

    def _resumable(self, loader: Any) -> Any:
        try:
            return as_resumable(loader, type(self).__name__, self.seed)
        except MisconfigurationException as error:
            self._refusal = error  # raised here it would leave torch's classes as Lightning has patched them just now
            return loader

    def _attach(self, trainer: pl.Trainer) -> None:
        """Take hold of the loader, and give it the present batch size."""
        if self._refusal is not None:
            raise self._refusal
        loader = trainer.train_dataloader
        if not isinstance(loader, ResumableLoader) or not epoch_length.batches_fetched_at_once(trainer):
            raise MisconfigurationException(
                "AdaptiveBatchSize needs the training batches of one lightning_opt.data.ResumableLoader, got"
                f" {type(loader).__name__}."
            )
        if loader is not self._loader:
            self._loader = loader
            self._epoch_batches = _limit(loader, trainer.limit_train_batches)
            self._check_bounds(trainer, loader)
        self._resize(trainer)

    def _check_bounds(self, trainer: pl.Trainer, loader: ResumableLoader) -> None:
        world, epoch = trainer.world_size, _samples_of_epoch(loader)
        start = self._batch or self.b0 or loader.initial_batch_size * world
        self._b_max = epoch if self.b_max is None else self.b_max
        if self._b_max > epoch:
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector of Lightning's
                rank_zero_warn(
                    f"AdaptiveBatchSize(b_max={self._b_max}) is more than the {epoch} samples of an epoch, which bound"
                    " it."
                )
            self._b_max = epoch
        if not self._batch:
            if start < 2:
                raise MisconfigurationException(
                    "AdaptiveBatchSize compares samples of a batch, and the loader's holds one; set b0=2 or more."
                )
            if start > (self.b_max or start):
                raise MisconfigurationException(
                    f"AdaptiveBatchSize(b_max={self.b_max}) is below the loader's {start} samples a step; lower its"
                    " batch_size or raise b_max."
                )
            self._split(start, world)
            self._start = self._batch

    def _split(self, batch: int, world_size: int) -> None:
        self._micro, self._accum = split_batch(batch, self._limit_micro, world_size)
        self._batch = self._micro * self._accum * world_size

    def _resize(self, trainer: pl.Trainer) -> None:
        assert self._loader is not None
        self._loader.set_batch_size(self._micro)
        epoch_length.set_epoch_length(trainer, len(self._loader))

    # --- the cycle: what lightning_opt._lightning.accumulation asks --------------------------------------------------

    def starts(self) -> bool:
        """Whether the batch under way is the first of its window."""
        self._roll()
        return self._number() <= self._window.first

    def ends(self) -> bool:
        """Whether the optimizer steps behind the batch under way."""
        self._roll()
        return self._ended()

    def pieces(self, batch: Any) -> Sequence[Piece]:
        """The batch, or its pieces where a test or full memory needs them."""
        trainer, loader = self._running()
        n, window = loader.place(self._number()).samples, self._window
        parts = self._parts(n) if self._collector is not None else 1
        if self._limit_micro is not None:
            parts = max(parts, -(-n // self._limit_micro))
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
        whole = window.planned / trainer.world_size
        return [Piece(part, size, whole / size) for part, size in zip(batches, sizes, strict=True)]

    def backward(self, piece: Piece, *, last: bool) -> AbstractContextManager[None]:
        """Around the backward pass of a piece."""
        trainer, _ = self._running()
        self._window.seen += piece.samples
        if self._collector is None:
            return nullcontext()
        communicates = last and trainer.world_size > 1
        return self._collector.backward(piece.samples, piece.divisor, communicates=communicates)

    def before_step(self) -> None:
        """Weigh the gradients by the samples that there were, where they are not as many as planned."""
        trainer, loader = self._running()
        window = self._window
        actual = window.seen if trainer.world_size == 1 else window.samples(loader, self._number())
        if actual not in (window.planned, 0):
            for p in trainer.lightning_module.parameters():
                if p.grad is not None:
                    p.grad.mul_(window.planned / actual)
            window.tests, self._collector = False, None  # its groups weigh as planned

    def out_of_memory(self, batch: Any, error: torch.OutOfMemoryError, *, changed: bool) -> None:
        """Halve the pieces, and batches to come."""
        trainer, loader = self._running()
        size = self._largest_piece
        if trainer.world_size > 1:
            raise torch.OutOfMemoryError(
                f"A micro-batch of {size} samples does not fit, and other ranks wait: start again from the last"
                f" checkpoint with AdaptiveBatchSize(max_micro={max(size // 2, 1)}). {error}"
            ) from error
        if size == 1:
            raise error
        number, window, lost = self._number(), self._window, 0
        self._limit_micro = size // 2
        self._split(self._batch, 1)
        self._resize(trainer)
        if changed:
            lost = window.samples(loader, number - 1) if number > window.first else 0
            self._window = Window.at(loader, number, window.target, 1)
        else:
            window.seen = window.samples(loader, number - 1) if number > window.first else 0
        self._window.tests, self._collector = False, None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rank_zero_warn(
            f"AdaptiveBatchSize: {size} samples did not fit into memory; micro-batches have at most {self._limit_micro}"
            " from now on, and this one runs in parts."
            + (f" The gradients of {lost} samples of this step were lost." if lost else "")
        )

    def _running(self) -> tuple[pl.Trainer, ResumableLoader]:
        assert self._trainer is not None
        assert self._loader is not None
        return self._trainer, self._loader

    def _number(self) -> int:
        """Of the batch under way, in its epoch."""
        return -1 if self._loader is None else self._loader.batches_handed_out - 1

    def _ended(self) -> bool:
        number = self._number()
        if self._loader is None or number < self._window.first or self._window.epoch < 0:
            return True
        assert self._trainer is not None
        return self._window.ends_with(self._loader, number, self._trainer.world_size)

    def _parts(self, samples: int) -> int:
        """Into how many pieces a micro-batch is divided in a step that tests."""
        if self.estimator != "micro":
            return 1
        trainer, loader = self._running()
        together = len(self._window.micro_batches(loader, trainer.world_size)) * trainer.world_size
        least = 2 if self._mixes_samples else 1
        return max(min(-(-self.groups // together), samples // least), 1)

    def _collect(self, pl_module: pl.LightningModule) -> GroupGradients | None:
        """For the window that begins."""
        if self.estimator == "per_sample":
            return None
        trainer, loader = self._running()
        parts = sum(self._parts(n) for n in self._window.micro_batches(loader, trainer.world_size))
        groups = 1 if self.estimator == "worker" else -(-self.groups // trainer.world_size)
        if min(groups, parts) * trainer.world_size < 2:
            return None
        return GroupGradients(
            [p for p in pl_module.parameters() if p.requires_grad],
            parts,
            groups,
            keep="inner_product" in self.test,
            coordinates=self.test == "coordinate",
        )

    # --- during training ---------------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._roll()
        _, loader = self._running()
        if self._window.tests and self.estimator == "per_sample":
            self._batches.append((batch, loader.place(self._number()).samples))

    def _roll(self) -> None:
        """Begin a window if the batch under way is beyond the last one."""
        loader, trainer, number, window = self._loader, self._trainer, self._number(), self._window
        if loader is None or trainer is None or number < 0:
            return
        same_epoch = window.epoch == loader.sampler.epoch  # type: ignore[attr-defined]
        if same_epoch and (number <= window.first or not window.ends_with(loader, number - 1, trainer.world_size)):
            return
        self._window = Window.at(loader, number, self._batch, trainer.world_size)
        self._window.tests = self._is_due()
        self._batches, self._decision = [], None
        self._collector = self._collect(trainer.lightning_module) if self._window.tests else None

    def _is_due(self) -> bool:
        thresholds = {
            "norm": (self.eta,),
            "coordinate": (self.eta,),
            "inner_product": (self.theta,),
            "augmented_inner_product": (self.theta, self.nu),
        }[self.test]
        can_fail = min(thresholds) < math.inf
        waited = self._untested < 0 or self._untested >= self.test_interval * self._start
        return can_fail and waited and self._batch < self._b_max

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, SampleBasedLR):
                config.scheduler.batch_size = self._window.planned
        if self._window.tests:
            self._decide(self._statistics(trainer, pl_module))

    @torch.no_grad()
    def _statistics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> GradientStatistics | None:
        """Of the step under way; the same on every rank."""
        parameters = [p for p in pl_module.parameters() if p.requires_grad]
        mean = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        squares: Tensor | None = None
        coordinates = self.test == "coordinate"
        if self._collector is not None:
            scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
            scale = 1.0 if scaler is None else float(scaler.get_scale())
            sums = self._collector.sums(mean, scale)
            squares = self._collector.sum_of_squares(scale) if coordinates else None
        elif self.estimator == "per_sample":
            sums, squares = per_sample_sums(
                trainer, pl_module, self._batches, mean, self.chunk_size, coordinates=coordinates
            )
        else:
            return None
        # of rank 0 alone, so that all ranks have the same to the last bit
        norm_sq = torch.stack([g.double().square().sum() for g in mean]).sum() if trainer.is_global_zero else 0.0
        sums = torch.cat([sums, torch.as_tensor([norm_sq]).to(sums)])
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums, reduce_op="sum")  # type: ignore[assignment]
            squares = squares if squares is None else trainer.strategy.reduce(squares, reduce_op="sum")  # type: ignore[assignment]
        groups, sum_sq, sum_dot_sq, grad_norm_sq = sums.tolist()
        if groups < 2:
            return None
        return GradientStatistics.from_sums(
            samples=self._window.planned,
            groups=int(groups),
            grad_norm_sq=grad_norm_sq,
            sum_sq=sum_sq,
            sum_dot_sq=sum_dot_sq if "inner_product" in self.test else None,
            mean=torch.cat([g.reshape(-1) for g in mean]) if coordinates else None,
            sum_of_squares=squares,
        )

    def _decide(self, statistics: GradientStatistics | None) -> None:
        if statistics is None:
            return
        values = (statistics.var_trace, statistics.grad_norm_sq, statistics.var_along or 0.0)
        requested = math.nan
        if all(map(math.isfinite, values)):
            statistics = self._averaged(statistics)
            requested = required_batch_size(
                statistics,
                self.test,
                eta=self.eta,
                theta=self.theta,
                nu=self.nu,
                quantile=self.quantile,
                debias=self.debias,
            )
        if math.isnan(requested):
            self._skipped += 1
            if self._skipped == 1:
                rank_zero_warn("AdaptiveBatchSize: a gradient is not finite; such tests decide nothing.")
            return
        self._decision = {
            "requested": requested,
            "var_trace": statistics.var_trace,
            "grad_norm_sq": statistics.grad_norm_sq,
            "ratio": requested / statistics.samples,
        }

    def _averaged(self, statistics: GradientStatistics) -> GradientStatistics:
        """Moving averages, corrected for their start; in float32, where a resumed run has the same digits."""
        along = statistics.var_along
        new = [1.0, statistics.var_trace, statistics.grad_norm_sq, along or 0.0]
        old = self._means or [0.0] * len(new)
        means = [self.ema * a + (1 - self.ema) * b for a, b in zip(old, new, strict=True)]
        self._means = torch.tensor(means).tolist()
        weight, trace, norm_sq, mean_along = self._means
        return dataclasses.replace(
            statistics,
            var_trace=trace / weight,
            grad_norm_sq=norm_sq / weight,
            var_along=None if along is None else mean_along / weight,
        )

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not accumulation.steps_now(trainer):
            return
        _, loader = self._running()
        self._samples += self._window.samples(loader, self._number())
        tested = self._window.tests
        self._untested = self._batch if tested else self._untested + self._batch if self._untested >= 0 else -1
        values: dict[str, float] = {
            "global": self._batch,
            "micro": self._micro,
            "accum": self._accum,
            "samples": self._samples,
            **(self._decision or {}),
        }
        if (self._decision or row_is_due(trainer)) and is_wanted(trainer):
            write_row(trainer, {f"batch_size/{name}": float(value) for name, value in values.items()})
        if not self._curves["batch"].recent:
            self._curves["batch"].add(0, self._batch)
        if self._decision:
            if math.isfinite(self._decision["requested"]):
                self._curves["requested"].add(self._samples, self._decision["requested"])
            self._grow(trainer, self._decision["requested"])
        self._curves["batch"].add(self._samples, self._batch)
        self._collector, self._batches, self._decision = None, [], None

    def _grow(self, trainer: pl.Trainer, requested: float) -> None:
        before = self._batch
        wanted = next_batch_size(before, requested, self._b_max, self.growth_cap)
        if wanted == before:
            return
        self._split(wanted, trainer.world_size)
        self._batch = max(self._batch, before)
        self._resize(trainer)
        if self._batch >= self._b_max:
            rank_zero_info(f"AdaptiveBatchSize: the batch has reached b_max={self._b_max}; testing stops.")
        if self.lr_scale != "none":
            factor = (self._batch / before) ** (0.5 if self.lr_scale == "sqrt" else 1.0)
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    if isinstance(group["lr"], Tensor):
                        group["lr"].mul_(factor)
                    else:
                        group["lr"] *= factor

    def _validation_is_due(self) -> bool:
        """Whether a multiple of the interval lies in the batch that is done, counted in samples of a rank."""
        trainer, loader = self._running()
        size, interval = loader.initial_batch_size, trainer.val_check_interval
        epoch = self._epoch_batches * size
        every = interval * size if isinstance(interval, int) else max(int(self._epoch_batches * interval), 1) * size
        number = self._number()
        start, drawn, _, _ = loader.place(number)
        end = epoch if number + 1 >= len(loader) else min(start + drawn, epoch)
        before = 0
        if trainer.check_val_every_n_epoch is None:
            before = loader.sampler.epoch * epoch  # type: ignore[attr-defined]
        return (before + end) // every > (before + start) // every

    # --- state -------------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        groups = self._loaded_groups
        if self._loader is not None:
            groups = None if self._ended() or not self._window.tests else [self._own_groups()]
        return {
            "batch": self._batch,
            "micro": self._micro,
            "accum": self._accum,
            "limit_micro": self._limit_micro,
            "start": self._start,
            "untested": self._untested,
            "samples": self._samples,
            "skipped": self._skipped,
            "means": list(self._means),
            "window": self._window.state_dict(),
            "groups": groups,
            "curves": {name: curve.state_dict() for name, curve in self._curves.items() if curve.recent},
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._batch, self._micro, self._accum = state_dict["batch"], state_dict["micro"], state_dict["accum"]
        self._limit_micro, self._samples = state_dict["limit_micro"], state_dict["samples"]
        self._start, self._untested = state_dict["start"], state_dict["untested"]
        self._skipped, self._means = state_dict["skipped"], list(state_dict["means"])
        self._window = Window(**state_dict["window"])
        self._loaded_groups = state_dict["groups"]
        for name, curve in state_dict["curves"].items():
            self._curves[name] = Curve.from_state_dict(curve)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Every rank has groups of its own."""
        state = checkpoint["callbacks"].get(self.state_key)
        if trainer.world_size == 1 or self._crashed or state is None or state["groups"] is None:
            return
        gathered: list[Any] = [None] * trainer.world_size
        dist.gather_object(state["groups"][0], gathered if trainer.is_global_zero else None)
        state["groups"] = gathered

    def _own_groups(self) -> dict[str, Any]:
        collected = None if self._collector is None else _cpu(self._collector.state_dict())
        return {"collected": collected, "batches": _cpu(self._batches)}

    def _take_loaded(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loaded = self._loaded_groups
        if loaded is None or len(loaded) != trainer.world_size:
            self._window.tests, self._collector = False, None
            return
        own, device = loaded[trainer.global_rank], pl_module.device
        if self._collector is not None and own["collected"] is not None:
            self._collector.load_state_dict(own["collected"], device)
        self._batches = [(trainer.strategy.batch_to_device(batch, device), n) for batch, n in own["batches"]]

    # --- the end -----------------------------------------------------------------------------------------------------

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._crashed = True

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()

    def report_panels(self) -> list[Panel]:
        """Batch size, and what the tests asked for, over samples."""
        curves = {name: curve.points() for name, curve in self._curves.items() if curve.recent}
        return [Panel("Batch size over samples", _Picture(curves))] if curves else []


class _Picture:
    """Draws the batch size and the requests."""

    def __init__(self, curves: dict[str, tuple[list[float], list[float]]]) -> None:
        self.curves = curves

    def __call__(self, axes: Any) -> None:
        if "requested" in self.curves:
            axes.plot(*self.curves["requested"], ".", markersize=3, color="#98a1ae", label="requested by a test")
        axes.plot(*self.curves["batch"], drawstyle="steps-post", color="#4269d0", label="used")
        axes.set_yscale("log", base=2)
        axes.set_xlabel("samples")
        axes.set_ylabel("samples a step")
        axes.legend()


def _check_trainer(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    who = "AdaptiveBatchSize decides itself when the optimizer steps"
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{who}, and {type(pl_module).__name__} optimizes by hand; use automatic optimization with one optimizer."
        )
    if trainer.accumulate_grad_batches != 1:
        raise MisconfigurationException(
            f"{who}; leave accumulate_grad_batches at 1 (it is {trainer.accumulate_grad_batches}), and set b0 and"
            " max_micro instead."
        )
    if trainer.strategy.handles_gradient_accumulation or not isinstance(
        trainer.strategy, SingleDeviceStrategy | DDPStrategy
    ):
        raise MisconfigurationException(
            f"{who}, from whole gradients, and {type(trainer.strategy).__name__} accumulates or shards them; use a"
            " single device or DDP."
        )
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            f"{who}, batch by batch, and the training_step takes dataloader_iter; let it take the batch."
        )


def _limit(loader: ResumableLoader, limit: int | float | None) -> int:
    """Let an epoch hold as many samples as the limit's batches of the loader's own size; return their number."""
    loader.limit = None
    size = loader.initial_batch_size
    whole = len(loader.sampler) // size if loader.drop_last else -(-len(loader.sampler) // size)  # type: ignore[arg-type]
    batches = int(whole * limit) if isinstance(limit, float) else min(whole, limit or whole)
    if batches < whole:
        loader.limit = batches * size
    return batches


def _samples_of_epoch(loader: ResumableLoader) -> int:
    order: Any = loader.sampler
    return sum(order.end(0, 1, rank) for rank in range(order.num_replicas))


def _cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _cpu(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cpu(entry) for entry in value]
    return value
