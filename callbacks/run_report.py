import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_opt._lightning.log_rows import is_log_step, last_values, row_is_due
from lightning_opt.registry import register

from ._report_curves import better_is, curve_panels
from ._report_facts import config_text, duration, machine_facts, optimizer_facts, parameter_count, trainer_facts
from ._report_history import Curve
from ._report_page import Page, results
from ._report_panel import Panel
from ._report_render import render_png, render_svg
from ._run_directory import run_directory


@register("callback", summary="Writes one HTML page and one picture of the whole run", capabilities=("observer",))
class RunReport(pl.Callback):
    """Writes ``report.html``, one self-contained page, and ``report.png`` when ``fit`` ends, however it ends.

    They show the curves of everything logged (training and validation of one quantity share an axis) and the learning
    rate of every parameter group; the page also has last and best values, the optimizer, the configuration, versions,
    the machine and the wall time. They lie in the directory of the first logger, or in ``default_root_dir`` where
    there is none (``logger=False``). After an error or Ctrl-C they show the run so far. ``test`` in the same Trainer
    adds its results to the page. ``fast_dev_run`` writes nothing.

    Any callback, optimizer or LightningModule contributes pictures of its own by a method ``report_panels()`` that
    returns :class:`Panel` objects, or plain ``(title, draw)`` tuples. One that fails appears in the report as its
    error text.

    The curves are part of the callback's state, so the report of a resumed run shows all of it. A curve of more than
    4096 points is thinned to means of neighboring points; its last and extreme values stay exact.

    Cost: on logged steps a read of the values that the loggers read too, nothing on others; about 0.2 s a picture at
    the end; at most 64 KiB a curve in memory and in checkpoints.

    Attributes:
        path: The page that was written last, None before and on ranks other than zero. The picture lies beside it.

    Example:
        >>> import lightning.pytorch as pl
        >>> class Spectrum(pl.Callback):
        ...     def report_panels(self):
        ...         return [Panel("Spectrum", lambda axes: axes.plot([3.0, 1.0, 0.5]))]
        >>> trainer = pl.Trainer(callbacks=[RunReport(), Spectrum()], logger=False, enable_checkpointing=False)
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self._metrics: dict[str, Curve] = {}
        self._rates: dict[str, Curve] = {}
        self._seconds = 0.0  # until the present fit
        self._begin()

    def __repr__(self) -> str:
        return "RunReport()"

    def _begin(self) -> None:
        self._stage = "fit"
        self._directory: Path | None = None
        self._started: float | None = None
        self._seen: dict[str, Any] = {}
        self._used_rates: dict[str, float] = {}
        self._fresh = False  # whether nothing has been logged yet since training started
        self._due = False  # whether the Trainer holds values that are not in the curves yet
        self._page: Page | None = None

    # --- collect ---------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._begin()
            self._directory = run_directory(trainer)
        self._stage = stage

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if any(curve.last[0] > trainer.global_step for curve in [*self._metrics.values(), *self._rates.values()]):
            self._metrics, self._rates, self._seconds = {}, {}, 0.0  # of another run
        self._started = time.monotonic()
        self._fresh = True

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if is_log_step(trainer):
            self._used_rates = _learning_rates(trainer.optimizers)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if row_is_due(trainer):
            self._due = True  # to be read when every hook of this batch has logged
            for name, rate in self._used_rates.items():
                self._rates.setdefault(name, Curve()).add(trainer.global_step, rate)
        self._used_rates = {}

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._catch_up(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._stage == "fit" and not trainer.sanity_checking:
            self._catch_up(trainer)
            self._seen = last_values(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._stage == "fit" and not trainer.sanity_checking:
            self._read(trainer, last_values(trainer))

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._catch_up(trainer)
        self._seen = last_values(trainer)
        self._due = True  # the values of the epoch are still being logged

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._catch_up(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._catch_up(trainer)

    def _catch_up(self, trainer: pl.Trainer) -> None:
        if self._fresh:  # what the Trainer holds at the beginning was logged before, by the run that is resumed
            self._seen = last_values(trainer)
        elif self._due:
            self._read(trainer, last_values(trainer))
        self._fresh = self._due = False

    def _read(self, trainer: pl.Trainer, values: dict[str, Any]) -> None:
        """Append what is new since the last time: a new value is a new object."""
        for name, value in values.items():
            if self._seen.get(name) is not value and name not in ("epoch", "step"):
                self._metrics.setdefault(name, Curve()).add(trainer.global_step, float(value))
        self._seen = values

    # --- state -----------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "metrics": {name: curve.state_dict() for name, curve in self._metrics.items()},
            "rates": {name: curve.state_dict() for name, curve in self._rates.items()},
            "wall_time": self._wall_time(),
        }

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._due:  # the step that ends here is part of the checkpoint, so are its values
            self._read(trainer, dict(trainer.logged_metrics))
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (
            self._stage != "fit"
        ):  # validate and test restore callbacks too; the run to show stays the one that was fitted
            return
        self._metrics = {name: Curve.from_state_dict(curve) for name, curve in state_dict["metrics"].items()}
        self._rates = {name: Curve.from_state_dict(curve) for name, curve in state_dict["rates"].items()}
        self._seconds = state_dict["wall_time"]

    def _wall_time(self) -> float:
        return self._seconds + (0.0 if self._started is None else time.monotonic() - self._started)

    # --- write -----------------------------------------------------------------------------------------------------

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer, "finished")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._stage == "fit" and self._started is not None:
            self._catch_up(trainer)
            if isinstance(exception, KeyboardInterrupt):
                self._finish(trainer, "interrupted")
            else:
                self._finish(trainer, "stopped by an error", f"{type(exception).__name__}: {exception}")

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._page is not None and self._directory is not None:
            self._page.tests = {name: float(value) for name, value in last_values(trainer).items()}
            with _warning_if_it_fails(self._directory):
                self._write_page(self._page, self._directory)

    def _finish(self, trainer: pl.Trainer, outcome: str, cause: str = "") -> None:
        self._seconds, self._started, self._seen = self._wall_time(), None, {}
        if self._directory is None or not trainer.is_global_zero:
            return
        with _warning_if_it_fails(self._directory):
            rendered = [
                render_svg(panel) for panel in [*curve_panels(self._metrics, self._rates), *_contributed(trainer)]
            ]
            self._page = Page(
                title=_title(trainer),
                outcome=outcome,
                cause=cause,
                numbers=_numbers(trainer, self._metrics, self._seconds),
                pictures=[(panel.title, svg) for svg, panel in rendered],
                results=results(self._metrics),
                facts={
                    "Optimizer": optimizer_facts(trainer),
                    "Training": trainer_facts(trainer),
                    "Machine": machine_facts(trainer.strategy.root_device),
                },
                config=config_text(trainer, self._directory),
            )
            self._directory.mkdir(parents=True, exist_ok=True)
            subtitle = " · ".join(f"{name} {value}" for name, value in self._page.numbers)
            render_png([panel for _, panel in rendered], self._page.title, subtitle, self._directory / "report.png")
            self._write_page(self._page, self._directory)
            print(f"Run report: {self.path}")

    def _write_page(self, page: Page, directory: Path) -> None:
        path = directory / "report.html"
        path.write_text(page.html(), encoding="utf-8")
        self.path = path


@contextlib.contextmanager
def _warning_if_it_fails(directory: Path) -> Iterator[None]:
    """A run must not be lost because its report cannot be written."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"RunReport could not write the report to {directory}: {type(error).__name__}: {error}")


def _contributed(trainer: Any) -> Iterator[Panel]:
    """The panels of callbacks, optimizers and the module; an error becomes a panel that raises it."""
    for contributor in [*trainer.callbacks, *trainer.optimizers, trainer.lightning_module]:
        report_panels = getattr(contributor, "report_panels", None)
        if callable(report_panels):
            try:
                yield from [Panel(*panel) for panel in report_panels()]
            except Exception as error:
                yield Panel(type(contributor).__name__, _Raise(error))


class _Raise:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, axes: object) -> None:
        raise self.error


def _learning_rates(optimizers: list[Optimizer]) -> dict[str, float]:
    """Learning rate of every group, by the names that the groups or the optimizers have."""
    rates: dict[str, float] = {}
    for number, optimizer in enumerate(optimizers):
        prefix = f"{type(optimizer).__name__} {number}" if len(optimizers) > 1 else ""
        for index, group in enumerate(optimizer.param_groups):
            group_name = str(group.get("name", f"group {index}" if len(optimizer.param_groups) > 1 else ""))
            name = " ".join(filter(None, (prefix, group_name)))
            rates[name if name not in rates else f"{name} {index}"] = _rate(group["lr"])
    return rates


def _rate(value: float | torch.Tensor) -> float:
    return value.item() if isinstance(value, torch.Tensor) else float(value)


def _title(trainer: Any) -> str:
    parts = [trainer.lightning_module, *trainer.optimizers, trainer.datamodule]
    return " · ".join(type(part).__name__ for part in parts if part is not None)


def _numbers(trainer: pl.Trainer, metrics: dict[str, Curve], seconds: float) -> list[tuple[str, str]]:
    """The few figures at the top of the page."""
    numbers = [
        ("steps", f"{trainer.global_step:,}"),
        ("epochs", str(trainer.current_epoch)),
        ("wall time", duration(seconds)),
        ("parameters", parameter_count(trainer.lightning_module)),
    ]
    for name, curve in metrics.items():
        best = {"low": curve.lowest, "high": curve.highest}.get(better_is(name))
        if best and name.startswith("val"):
            numbers.append((f"best {name}", f"{best[1]:.4g}"))
    return numbers[:8]
