"""Stability readings over a run: when there is one, what is logged of it, and the picture."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_opt.curvature import NonFiniteCurvatureError

from ._loss_curvature import check_has_curvature
from ._report_curves import COLORS
from ._report_history import Curve
from ._report_panel import Panel
from ._stability_reading import Reading, Settings, read_stability

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = dict[str, tuple[list[float], list[float]]]


class StabilityMeter:
    """Reads the stability of a step, and keeps the curves.

    Args:
        settings: How to measure.

    Raises:
        ValueError: If a setting is out of its range.
    """

    def __init__(self, settings: Settings) -> None:
        settings.check()
        self.settings = settings
        self.begin()

    def begin(self) -> None:
        """Forget everything, for a new run."""
        self.curves: dict[str, Curve] = {}
        self.rejected = 0

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule, who: str) -> None:
        """Refuse what cannot be measured.

        Raises:
            MisconfigurationException: See :func:`check_has_curvature`; or if the network's outputs are unknown.
        """
        settings = self.settings
        computes = settings.loss_fn if settings.trace == "hutchinson" else settings.forward_fn or settings.loss_fn
        check_has_curvature(trainer, pl_module, who, computes)
        if settings.trace != "hutchinson" and settings.forward_fn is None and not is_overridden("forward", pl_module):
            raise MisconfigurationException(
                f"{who}(trace={settings.trace!r}) needs the outputs of the network: give {type(pl_module).__name__} a"
                " forward method, or give forward_fn=..., a function of the module and a batch."
            )

    def read(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: Optimizer,
        window: Sequence[Any],
        batch_idx: int,
    ) -> Reading | None:
        """Measure on the micro-batches of a step; None at Adam's first step, or if the curvature is not finite."""
        try:
            reading = read_stability(trainer, pl_module, optimizer, window, self.settings, batch_idx)
        except NonFiniteCurvatureError as error:
            self.rejected += 1
            if self.rejected == 1:
                rank_zero_warn(f"no stability is known at step {trainer.global_step}: {error}. Said once.")
            return None
        if reading is not None:
            self._keep(trainer.global_step, reading)
        return reading

    def row(self, reading: Reading, prefix: str = "stability") -> dict[str, float]:
        """What is logged of a reading."""
        s = reading.stability
        values = {
            "trace": s.trace,
            "trace_stderr": s.trace_stderr,
            "lambda_max": s.lambda_max,
            "lambda_error": reading.lambda_error,
            "rho_tr": s.rho_tr,
            "rho_tr_stderr": s.rho_tr_stderr,
            "rho_top": s.rho_top,
            "rho_mix": s.rho_mix,
            "lr_ceiling": s.lr_ceiling / reading.unit,
            "rejected": float(self.rejected),
            **{f"trace/{name}": value for name, value in reading.by_parameter.items()},
        }
        return {f"{prefix}/{name}": value for name, value in values.items()}

    def _keep(self, step: int, reading: Reading) -> None:
        s = reading.stability
        values = {"sharpness": s.lambda_max, "rho_tr": s.rho_tr, "rho_top": s.rho_top, "rho_mix": s.rho_mix}
        values["stderr"] = s.rho_tr_stderr
        if s.lr > 0:
            values["edge"] = 2 * (1 + s.momentum) / s.lr
        for name, value in values.items():
            self.curves.setdefault(name, Curve()).add(step, value)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and builtins."""
        return {
            "curves": {name: curve.state_dict() for name, curve in self.curves.items()},
            "rejected": self.rejected,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.curves = {name: Curve.from_state_dict(curve) for name, curve in state["curves"].items()}
        self.rejected = state["rejected"]

    def panels(self) -> list[Panel]:
        """Sharpness against the edge, and the shares of it."""
        if "edge" not in self.curves:
            return []
        points = {name: curve.points() for name, curve in self.curves.items()}
        return [
            Panel("Sharpness and the edge of stability", functools.partial(_draw_edge, points)),
            Panel("Shares of the edge", functools.partial(_draw_shares, points)),
        ]


def _draw_edge(points: Points, axes: "Axes") -> None:
    marker = "o" if len(points["sharpness"][0]) < 60 else ""
    axes.plot(*points["edge"], color=COLORS[1], linewidth=1.4, linestyle="--", label=r"edge, $2(1+\beta)/\eta$")
    axes.plot(*points["sharpness"], color=COLORS[0], linewidth=1.4, marker=marker, markersize=2.5, label="sharpness")
    largest = max(max(points["sharpness"][1]), max(points["edge"][1]))
    axes.set(xlabel="step", ylim=(0, 1.1 * min(largest, 3 * max(points["edge"][1]))))  # not a spike, the edge matters
    axes.legend(frameon=False)


def _draw_shares(points: Points, axes: "Axes") -> None:
    axes.axhline(1.0, color=COLORS[1], linewidth=1.0, linestyle="--")
    for number, name in enumerate(("rho_tr", "rho_top", "rho_mix")):
        axes.plot(*points[name], color=COLORS[(0, 2, 3)[number]], linewidth=1.4, label=name)
    steps, values = points["rho_tr"]
    errors = points["stderr"][1]
    low = [v - e for v, e in zip(values, errors, strict=True)]
    high = [v + e for v, e in zip(values, errors, strict=True)]
    axes.fill_between(steps, low, high, color=COLORS[0], alpha=0.2, linewidth=0)
    largest = max(max(points[name][1]) for name in ("rho_tr", "rho_top", "rho_mix"))
    axes.set(xlabel="step", ylim=(0, 1.1 * max(1.0, min(largest, 3.0))))
    axes.legend(frameon=False)
