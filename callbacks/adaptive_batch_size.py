"""A batch size that grows as the noise of the gradient demands (arXiv:2402.11215)."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer
from typing_extensions import override

from lightning_opt._checks import check_choice, check_interval
from lightning_opt._lightning import accumulation, epoch_length, loader_source
from lightning_opt._lightning.log_rows import row_is_due, write_row
from lightning_opt.data import ResumableLoader
from lightning_opt.gradient_noise import BatchTest, next_batch_size
from lightning_opt.gradient_noise.batch_tests import check_thresholds
from lightning_opt.registry import register
from lightning_opt.schedules import SampleBasedLR

from ._arguments import described_by_arguments
from ._batch_curves import BatchCurves
from ._batch_cycle import BatchCycle, Estimator, Grouping
from ._batch_decision import BatchDecision, NoiseSettings
from ._batch_requirements import check_model, check_trainer, first_batch, largest_batch, limit_epoch
from ._learning_rate import multiply_lr, schedulers
from ._log_values import is_wanted
from ._ownership import Possession, check_no_scheduler, check_sole_owner
from ._report_panel import Panel
from ._step_statistics import step_statistics
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

    With ``drop_last`` an epoch lacks what does not fill a micro-batch of the size then in force.

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
    needs_gradients: ClassVar[bool] = True  # strategies without them refuse it

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
        estimator: Estimator = "micro",
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
        if lr_scale != "none":
            self.owns = frozenset({"batch size", "learning rate"})  # type: ignore[misc]
        self._undo: list[Callable[[], None]] = []  # what is arranged with a Trainer
        self._begin()

    def __repr__(self) -> str:
        return described_by_arguments(self)

    def _begin(self) -> None:
        """Everything that belongs to one fit."""
        self._decision = BatchDecision(NoiseSettings(**{name: getattr(self, name) for name in NoiseSettings._fields}))
        self._cycle = BatchCycle(Grouping(self.test, self.estimator, self.groups), self.max_micro, self._test_is_due)
        self._curves = BatchCurves()
        self._samples = 0
        self._loaded_groups: list[Any] | None = None  # of every rank
        self._release()

    def _release(self) -> None:
        """Drop what belongs to a Trainer."""
        self._cycle.release()
        self._tested: dict[str, float] | None = None  # what the test of the step under way asks for
        self._b_max = 0
        self._epoch_batches = 0  # of the size at the start
        self._refusal: MisconfigurationException | None = None
        self._crashed = False
        while self._undo:
            self._undo.pop()()

    @property
    def batch_size(self) -> int:
        """Samples of a step on all ranks; 0 before training has started."""
        return self._cycle.batch

    @property
    def samples(self) -> int:
        """Samples processed, on all ranks."""
        return self._samples

    @property
    def skipped_tests(self) -> int:
        """Tests without a decision, since a number was not finite."""
        return self._decision.skipped

    # --- before training ---------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._release()
            self._begin()
            check_sole_owner(trainer, self)
            check_trainer(trainer, pl_module, self.estimator)
            self._undo.append(loader_source.replace_train_loader(trainer, self._resumable))

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.lr_scale != "none":
            check_no_scheduler(trainer, self)
        check_model(trainer, pl_module, self.estimator)
        self._cycle.attach(trainer)
        self._undo.append(accumulation.own_accumulation(trainer, self._cycle))
        self._undo.append(epoch_length.own_validation_interval(trainer, self._validation_is_due))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take_loader(trainer)
        loaded, self._loaded_groups = self._loaded_groups, None
        fits = loaded is not None and len(loaded) == trainer.world_size
        self._cycle.go_on(loaded[trainer.global_rank] if fits and loaded is not None else None)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take_loader(trainer)  # it may have been made anew

    def _resumable(self, loader: Any) -> Any:
        try:
            return as_resumable(loader, type(self).__name__, self.seed)
        except MisconfigurationException as error:
            self._refusal = error  # raised here it would leave torch's classes as Lightning has patched them just now
            return loader

    def _take_loader(self, trainer: pl.Trainer) -> None:
        """Take hold of the loader, and give it the present batch size."""
        if self._refusal is not None:
            raise self._refusal
        loader = trainer.train_dataloader
        if not isinstance(loader, ResumableLoader) or not epoch_length.batches_fetched_at_once(trainer):
            raise MisconfigurationException(
                "AdaptiveBatchSize needs the training batches of one lightning_opt.data.ResumableLoader, got"
                f" {type(loader).__name__}."
            )
        if loader is not self._cycle.loader:
            self._cycle.loader = loader
            self._epoch_batches = limit_epoch(loader, trainer.limit_train_batches)
            self._b_max = largest_batch(trainer, loader, self.b_max)
            if not self._cycle.batch:  # a new run
                self._cycle.split(first_batch(self.b0, self.b_max, loader.initial_batch_size * trainer.world_size))
                self._decision.start = self._cycle.batch
        self._cycle.resize()

    # --- during training ---------------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._cycle.take(batch)

    def _test_is_due(self) -> bool:
        """Whether the step that begins is to be tested."""
        decision = self._decision
        return decision.settings.can_fail and decision.is_due() and self._cycle.batch < self._b_max

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        window = self._cycle.window
        for scheduler in schedulers(trainer):
            if isinstance(scheduler, SampleBasedLR):
                scheduler.batch_size = window.planned
        if window.tests:
            statistics = step_statistics(trainer, pl_module, self._cycle, self.chunk_size)
            self._tested = None if statistics is None else self._decision.decide(statistics)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not accumulation.steps_now(trainer):
            return
        cycle, (tested, self._tested) = self._cycle, (self._tested, None)
        used = cycle.batch
        self._samples += cycle.samples()
        self._decision.count(used, tested=cycle.window.tests)
        if (tested or row_is_due(trainer)) and is_wanted(trainer):
            sizes = {"global": used, "micro": cycle.micro, "accum": cycle.accum, "samples": self._samples}
            row = {**sizes, **(tested or {})}
            write_row(trainer, {f"batch_size/{name}": float(value) for name, value in row.items()})
        requested = tested["requested"] if tested else None
        if requested is not None:
            self._grow(trainer, requested)
        self._curves.add(self._samples, used, cycle.batch, requested)
        cycle.close()

    def _grow(self, trainer: pl.Trainer, requested: float) -> None:
        cycle, before = self._cycle, self._cycle.batch
        wanted = next_batch_size(before, requested, self._b_max, self.growth_cap)
        if wanted == before:
            return
        cycle.split(wanted)
        cycle.resize()
        if cycle.batch >= self._b_max:
            rank_zero_info(f"AdaptiveBatchSize: the batch has reached b_max={self._b_max}; testing stops.")
        if self.lr_scale != "none":
            factor = (cycle.batch / before) ** (0.5 if self.lr_scale == "sqrt" else 1.0)
            for optimizer in trainer.optimizers:
                multiply_lr(optimizer, factor)

    def _validation_is_due(self) -> bool:
        """Whether a multiple of the interval lies in the batch that is done, counted in samples of a rank."""
        trainer, loader = self._cycle.running()
        size, interval = loader.initial_batch_size, trainer.val_check_interval
        epoch = self._epoch_batches * size
        every = interval * size if isinstance(interval, int) else max(int(self._epoch_batches * interval), 1) * size
        number = self._cycle.number()
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
        if self._cycle.loader is not None:
            gathered = self._cycle.gathered()
            groups = None if gathered is None else [gathered]
        return {
            **self._cycle.state_dict(),
            **self._decision.state_dict(),
            "samples": self._samples,
            "groups": groups,
            "curves": self._curves.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._cycle.load_state_dict(state_dict)
        self._decision.load_state_dict(state_dict)
        self._samples, self._loaded_groups = state_dict["samples"], state_dict["groups"]
        self._curves.load_state_dict(state_dict["curves"])

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

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._crashed = True

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()

    def report_panels(self) -> list[Panel]:
        """Batch size, and what the tests asked for, over samples."""
        return self._curves.panels()
