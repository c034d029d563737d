from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

from ._learning_rate import only_optimizer, scale_lr
from ._log_values import is_wanted
from ._loss_curvature import Products
from ._ownership import Possession, check_no_scheduler, check_sole_owner
from ._report_panel import Panel
from ._stability_meter import StabilityMeter
from ._stability_reading import Reading, Settings, Trace
from ._step_probe import StepProbe


@register(
    "callback",
    summary="Watches how far training is from the edge of stability, for any batch size",
    paper="2305.17490",
    card="dynamical-stability",
    log_prefix="stability",
    capabilities=("observer",),
)
class StabilityMonitor(StepProbe):
    r"""Measures trace and largest eigenvalue of the curvature, and relates them to learning rate and batch size.

    Stochastic gradient descent can stay at a minimum that fits every sample only if
    :math:`\operatorname{tr} G \le 2 B / \eta` and :math:`\lambda_{\max} \le 2 / \eta` (Wu and Su, arXiv:2305.17490, for
    batches of one; see :func:`lightning_opt.curvature.stability` for the exact statements). At the first
    optimizer step and every ``every_n_steps``, on the batch that is about to be trained on, it logs

    - ``stability/trace`` with ``/trace_stderr``, and ``/lambda_max`` (an eigenvalue lies within ``/lambda_error``);
    - ``stability/rho_tr`` with ``/rho_tr_stderr``, ``/rho_top``, ``/rho_mix``: shares of the edge, above 1 unstable;
    - ``stability/lr_ceiling``: the rate at which ``rho_mix`` is 1;
    - with ``per_layer``, ``stability/trace/<parameter>``.

    The batch size is that of the whole step, over micro-batches and ranks; momentum and rate are those of the
    optimizer, the largest of its groups. With Adam's family the curvature is the preconditioned one
    (arXiv:2207.14484). Before a run fits its data, sharpness may exceed the edge for a while (progressive sharpening):
    look at the loss beside it, and act on several readings only.

    A :class:`RunReport` shows sharpness against :math:`2 (1 + \beta) / \eta`, and the three shares, over training.

    It only watches, and training is bit for bit the same with it and without, unless ``on_violation="scale_lr"``. It
    costs nothing where nobody looks (``logger=False`` without a :class:`RunReport`).

    Args:
        every_n_steps: Optimizer steps between measurements.
        trace: ``"hutchinson"``: of the Hessian of the training loss, from random signs. ``"fisher_mc"``: of the
            Gauss-Newton matrix for cross-entropy, from labels drawn from the prediction; one backward pass a probe.
            ``"exact_mse"``: of the Gauss-Newton matrix for squared errors, exactly; one backward pass an output and
            sample. The largest eigenvalue is of the same matrix.
        num_probes: Of the two estimators, at least 2, so that there is a standard error.
        lambda_max_steps: Lanczos steps.
        products: ``"autograd"``, or ``"finite_difference"`` for losses that cannot be differentiated twice.
        batch_size: Of a step; None counts the samples of the batch.
        dataset_size: ``"auto"`` asks the loader, since an epoch draws without replacement, which is less noisy; a
            number; or ``"infinite"`` for samples drawn independently.
        mse_factor: For ``"exact_mse"``: the loss over half the squared error, summed over outputs, mean over samples.
            It is 2 / outputs for torch's ``mse_loss``.
        on_violation: When ``rho_mix`` exceeded the ceiling ``patience`` times in a row: ``"log"`` does nothing,
            ``"warn"`` warns once, ``"scale_lr"`` lowers the rate to where ``rho_mix`` is the ceiling.
        ceiling: Of ``rho_mix``.
        patience: Readings in a row.
        on_scheduler: With ``"scale_lr"``: ``"error"`` refuses a scheduler, ``"rebase"`` scales what it starts from.
        per_layer: Log the trace of each parameter.
        loss_fn: Computes the loss from module and batch, in the place of ``training_step``.
        forward_fn: Computes the outputs ``[samples, outputs]`` from module and batch, for ``"fisher_mc"`` and
            ``"exact_mse"``; default: the module called on the first part of the batch.
        seed: Of the random vectors.

    Raises:
        ValueError: If a value is out of its range.
        MisconfigurationException: Before the first step, with several optimizers, a strategy that shards the module,
            manual optimization without ``loss_fn``, parameters of 16 bits; with ``"scale_lr"`` also where something
            else sets the rate.

    A reading that is not finite is left out, counted in ``stability/rejected``, and warned about once.

    Cost: a measurement is one forward and backward pass with its graph, and ``lambda_max_steps + num_probes`` passes of
        about two backward passes each. Nothing in between.

    Example:
        >>> import lightning.pytorch as pl
        >>> monitor = StabilityMonitor(every_n_steps=500, trace="fisher_mc")
        >>> trainer = pl.Trainer(callbacks=[monitor], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 200,
        trace: Trace = "hutchinson",
        num_probes: int = 16,
        lambda_max_steps: int = 10,
        products: Products = "autograd",
        batch_size: int | None = None,
        dataset_size: int | Literal["auto", "infinite"] = "auto",
        mse_factor: float = 1.0,
        on_violation: Literal["log", "warn", "scale_lr"] = "log",
        ceiling: float = 1.0,
        patience: int = 3,
        on_scheduler: Literal["error", "rebase"] = "error",
        per_layer: bool = False,
        loss_fn: Callable[[pl.LightningModule, Any], Tensor] | None = None,
        forward_fn: Callable[[pl.LightningModule, Any], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_interval("every_n_steps", every_n_steps, 1)
        check_choice("on_violation", on_violation, ("log", "warn", "scale_lr"))
        check_interval("ceiling", ceiling, 0, closed="()")
        check_interval("patience", patience, 1)
        check_choice("on_scheduler", on_scheduler, ("error", "rebase"))
        self.every_n_steps = every_n_steps
        self.trace = trace
        self.num_probes = num_probes
        self.lambda_max_steps = lambda_max_steps
        self.products = products
        self.batch_size = batch_size
        self.dataset_size = dataset_size
        self.mse_factor = mse_factor
        self.on_violation = on_violation
        self.ceiling = ceiling
        self.patience = patience
        self.on_scheduler = on_scheduler
        self.per_layer = per_layer
        self.loss_fn = loss_fn
        self.forward_fn = forward_fn
        self.seed = seed
        self.owns: frozenset[Possession] = frozenset({"learning rate"} if on_violation == "scale_lr" else ())
        self._meter = StabilityMeter(Settings.of(self))
        self._begin()

    def _begin(self) -> None:
        self._let_go()
        self._meter.begin()
        self._violations = 0  # in a row
        self._warned = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            check_sole_owner(trainer, self)
            self._meter.check(trainer, pl_module, type(self).__name__)
            self._begin()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._optimizer = only_optimizer(trainer, self)
        if self.owns and self.on_scheduler == "error":
            check_no_scheduler(trainer, self)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps or not (self.on_violation != "log" or is_wanted(trainer)):
            return
        window = self._gather(trainer, pl_module, batch)
        if window is None:
            return
        assert self._optimizer is not None
        reading = self._meter.read(trainer, pl_module, self._optimizer, window, batch_idx)
        if reading is not None:
            self._row = self._meter.row(reading)
            self._answer(trainer, reading)

    def _answer(self, trainer: pl.Trainer, reading: Reading) -> None:
        """Do what a violation asks for, if there were enough of them."""
        rho = reading.stability.rho_mix
        self._violations = self._violations + 1 if rho > self.ceiling else 0
        if self._violations < self.patience:
            return
        if self.on_violation == "scale_lr":
            assert self._optimizer is not None
            scale_lr(trainer, self._optimizer, self.ceiling / rho)
            self._violations = 0
        elif self.on_violation == "warn" and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"StabilityMonitor: rho_mix is {rho:.3g} at step {trainer.global_step}, above {self.ceiling:g} for the"
                f" {self._violations}. time in a row: a minimum that fits the data is not stable at this learning rate."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"meter": self._meter.state_dict(), "violations": self._violations, "warned": self._warned}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._meter.load_state_dict(state_dict["meter"])
        self._violations, self._warned = state_dict["violations"], state_dict["warned"]

    def report_panels(self) -> list[Panel]:
        """Sharpness against the edge, and the shares of it, for :class:`RunReport`."""
        return self._meter.panels()
