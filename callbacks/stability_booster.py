from collections.abc import Callable
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

from ._learning_rate import largest_lr, only_optimizer, scale_lr
from ._loss_curvature import Products, completes_step, reduction
from ._ownership import Possession, check_no_scheduler, check_sole_owner
from ._report_panel import Panel
from ._stability_meter import StabilityMeter
from ._stability_reading import Settings, Trace
from ._step_probe import StepProbe


@register(
    "callback",
    summary="Raises the learning rate towards the edge of stability while the loss falls",
    paper="2305.17490",
    card="dynamical-stability",
    log_prefix="stability_booster",
)
class StabilityBooster(StepProbe):
    r"""Keeps the learning rate near the edge of stability, where only flat minima can be kept.

    A larger stable rate forces a smaller trace of the curvature (Wu and Su, arXiv:2305.17490), and that bounds the
    complexity of what is learned. At each measurement, the rate is multiplied by ``shrink`` if the quantity is above 1;
    by ``growth`` if it is below ``target`` and the mean training loss since the last measurement is lower than that
    before; and stays otherwise. What is measured, and how, is as for :class:`StabilityMonitor`.

    Logs at each measurement what the monitor logs, under ``stability_booster/``, and ``stability_booster/lr``. A
    :class:`RunReport` shows sharpness against the edge.

    Args:
        target: Of the quantity, in (0, 1].
        growth: Factor of the rate below the target, above 1.
        shrink: Factor above the edge, in (0, 1).
        quantity: ``"rho_mix"``, ``"rho_tr"`` or ``"rho_top"``.
        lr_max: Largest rate; None for no limit.
        every_n_steps: Optimizer steps between measurements.
        trace: As for :class:`StabilityMonitor`, and all that follow.
        num_probes: See there.
        lambda_max_steps: See there.
        products: See there.
        batch_size: See there.
        dataset_size: See there.
        mse_factor: See there.
        on_scheduler: ``"error"`` refuses a scheduler, ``"rebase"`` scales what it starts from.
        loss_fn: See there.
        forward_fn: See there.
        seed: See there.

    Raises:
        ValueError: If a value is out of its range.
        MisconfigurationException: Before the first step: as :class:`StabilityMonitor`; with manual optimization; with a
            scheduler or another callback that sets the rate.

    A reading that is not finite changes nothing, is counted in ``stability_booster/rejected``, and warned about once.

    Cost: that of :class:`StabilityMonitor`, and one addition a step on the device.

    Example:
        >>> import lightning.pytorch as pl
        >>> booster = StabilityBooster(target=0.7, every_n_steps=100)
        >>> trainer = pl.Trainer(callbacks=[booster], logger=False, enable_checkpointing=False)
    """

    owns: ClassVar[frozenset[Possession]] = frozenset({"learning rate"})
    needs_gradients: ClassVar[bool] = True  # strategies without them refuse it

    def __init__(
        self,
        *,
        target: float = 0.8,
        growth: float = 1.05,
        shrink: float = 0.7,
        quantity: Literal["rho_mix", "rho_tr", "rho_top"] = "rho_mix",
        lr_max: float | None = None,
        every_n_steps: int = 200,
        trace: Trace = "hutchinson",
        num_probes: int = 16,
        lambda_max_steps: int = 10,
        products: Products = "autograd",
        batch_size: int | None = None,
        dataset_size: int | Literal["auto", "infinite"] = "auto",
        mse_factor: float = 1.0,
        on_scheduler: Literal["error", "rebase"] = "error",
        loss_fn: Callable[[pl.LightningModule, Any], Tensor] | None = None,
        forward_fn: Callable[[pl.LightningModule, Any], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_interval("target", target, 0, 1, closed="(]")
        check_interval("growth", growth, 1, closed="()")
        check_interval("shrink", shrink, 0, 1, closed="()")
        check_choice("quantity", quantity, ("rho_mix", "rho_tr", "rho_top"))
        if lr_max is not None:
            check_interval("lr_max", lr_max, 0, closed="()")
        check_interval("every_n_steps", every_n_steps, 1)
        check_choice("on_scheduler", on_scheduler, ("error", "rebase"))
        self.target = target
        self.growth = growth
        self.shrink = shrink
        self.quantity = quantity
        self.lr_max = lr_max
        self.every_n_steps = every_n_steps
        self.trace = trace
        self.num_probes = num_probes
        self.lambda_max_steps = lambda_max_steps
        self.products = products
        self.batch_size = batch_size
        self.dataset_size = dataset_size
        self.mse_factor = mse_factor
        self.on_scheduler = on_scheduler
        self.loss_fn = loss_fn
        self.forward_fn = forward_fn
        self.seed = seed
        self._meter = StabilityMeter(Settings.of(self))
        self._begin()

    def _begin(self) -> None:
        self._let_go()
        self._meter.begin()
        self._losses: Tensor | None = None  # their sum since the last measurement, and their number
        self._of_step: Tensor | None = None  # likewise, of the step under way
        self._previous: float | None = None  # mean loss between the two measurements before

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            check_sole_owner(trainer, self)
            if not pl_module.automatic_optimization:
                raise MisconfigurationException(
                    "StabilityBooster follows the loss that training_step returns, so it needs automatic optimization."
                )
            self._meter.check(trainer, pl_module, type(self).__name__)
            self._begin()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._optimizer = only_optimizer(trainer, self)
        if self.on_scheduler == "error":
            check_no_scheduler(trainer, self)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        device = pl_module.device  # a loaded state is on the CPU
        self._losses = None if self._losses is None else self._losses.to(device)
        self._of_step = None if self._of_step is None else self._of_step.to(device)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps:
            return
        window = self._gather(trainer, pl_module, batch)
        if window is None:
            return
        assert self._optimizer is not None
        reading = self._meter.read(trainer, pl_module, self._optimizer, window, batch_idx)
        if reading is None:
            return
        falls = self._loss_falls(trainer)
        share = getattr(reading.stability, self.quantity)
        factor = self.shrink if share > 1 else self.growth if share < self.target and falls else 1.0
        lr = largest_lr(self._optimizer)
        if self.lr_max is not None and factor > 1 and lr > 0:
            factor = max(1.0, min(factor, self.lr_max / lr))
        if factor != 1:
            scale_lr(trainer, self._optimizer, factor)
        self._row = self._meter.row(reading, "stability_booster")
        self._row["stability_booster/lr"] = largest_lr(self._optimizer)

    def _loss_falls(self, trainer: pl.Trainer) -> bool:
        """Whether the mean loss since the last measurement is below that before it, over all ranks."""
        if self._losses is None:
            return False
        reduce = reduction(trainer)
        total, count = (self._losses if reduce is None else reduce(self._losses)).tolist()
        mean = total / count
        falls = self._previous is not None and mean < self._previous
        self._previous, self._losses = mean, None
        return falls

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(outputs, dict) and outputs.get("loss") is not None:
            loss = outputs["loss"].detach().double() * trainer.accumulate_grad_batches  # Lightning divided it
            pair = torch.stack([loss, torch.ones_like(loss)])
            self._of_step = pair if self._of_step is None else self._of_step + pair
        if self._of_step is not None and completes_step(trainer, pl_module):
            self._losses = self._of_step if self._losses is None else self._losses + self._of_step
            self._of_step = None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def state_dict(self) -> dict[str, Any]:
        losses = {"losses": self._losses, "of_step": self._of_step, "previous": self._previous}
        return {"meter": self._meter.state_dict(), **losses}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._meter.load_state_dict(state_dict["meter"])
        self._losses, self._of_step = state_dict["losses"], state_dict["of_step"]
        self._previous = state_dict["previous"]

    def report_panels(self) -> list[Panel]:
        """Sharpness against the edge, and the shares of it, for :class:`RunReport`."""
        return self._meter.panels()
