from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_opt.registry import register
from lightning_opt.schedules import horizon
from lightning_opt.schedules._base import StepSchedule


@register(
    "callback",
    summary="Warns when a run and its learning-rate schedule end at different steps",
    capabilities=("observer",),
)
class ScheduleCheck(pl.Callback):
    """Warns when a run ends before its learning-rate schedule does, or goes on behind it.

    When training begins, the length of every schedule is compared with the run's: a schedule in steps that is stepped
    every epoch, the most common of such mistakes, shows at once. When training ends earlier than planned (early
    stopping, ``max_time``, ``max_steps``), a schedule that was still under way is reported with the share of the rate
    that was left: the gain of a decay lies in its end. A schedule of this package without an end, such as
    ``SampleBasedLR``, is reported if it is stepped every epoch. The others of this package have a length, and those of
    torch that end in a final rate; ``fast_dev_run`` is not checked. The ``lightning-opt`` command adds this callback
    itself.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[ScheduleCheck()], logger=False, enable_checkpointing=False)
    """

    def __init__(self) -> None:
        self._known: set[int] = set()  # schedulers of which the user has heard already

    def __repr__(self) -> str:
        return "ScheduleCheck()"

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._known = set()
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector of Lightning's
            return
        for number, config in enumerate(trainer.lr_scheduler_configs):
            end, planned = horizon(config.scheduler), _planned(trainer, config)
            if end is None and isinstance(config.scheduler, StepSchedule) and config.interval == "epoch":
                rank_zero_warn(
                    f"{type(config.scheduler).__name__} counts optimizer steps and is stepped every {_unit(config)}; is"
                    " interval='step' meant (--lr_scheduler_interval=step)?"
                )
            if end is None or planned is None:
                continue
            (argument, length), name = end, type(config.scheduler).__name__
            if planned < length:
                self._known.add(number)
                hint = (
                    "; is interval='step' meant (--lr_scheduler_interval=step)?" if config.interval == "epoch" else ""
                )
                rank_zero_warn(
                    f"{name} has {argument}={length} and is stepped every {_unit(config)}, but the run will have"
                    f" {planned}: it ends before its schedule does{hint}"
                )
            elif planned > length and isinstance(config.scheduler, StepSchedule):
                self._known.add(number)
                rank_zero_warn(
                    f"{name} has {argument}={length} and is stepped every {_unit(config)}, but the run will have"
                    f" {planned}: its schedule ends before the run does"
                )

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector of Lightning's
            return
        for number, config in enumerate(trainer.lr_scheduler_configs):
            end = horizon(config.scheduler)
            if end is None or number in self._known:
                continue
            done = config.scheduler.last_epoch
            group = config.scheduler.optimizer.param_groups[0]
            base = float(group["initial_lr"])
            if done >= end[1] or base == 0:
                continue
            left = float(group["lr"]) / base
            rank_zero_warn(
                f"the run ended behind {done} {_unit(config)}s, before its schedule"
                f" {type(config.scheduler).__name__} with {end[0]}={end[1]}: the learning rate is still {left:.0%} of"
                " its base value, and the gain of the final decay is not taken"
            )


def _planned(trainer: pl.Trainer, config: Any) -> int | None:
    """How often the scheduler will be stepped in the whole run, or None where that is not known."""
    total = trainer.estimated_stepping_batches if config.interval == "step" else trainer.max_epochs
    known = total is not None and 0 <= total < float("inf")
    return int(total) // config.frequency if known else None  # type: ignore[arg-type]


def _unit(config: Any) -> str:
    unit = "optimizer step" if config.interval == "step" else "epoch"
    return unit if config.frequency == 1 else f"{config.frequency} {unit}s"
