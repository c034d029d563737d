from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_opt._checks import check_interval
from lightning_opt._lightning.log_rows import is_log_step, write_row
from lightning_opt.registry import register

from ._log_values import is_wanted, to_floats


@register(
    "callback",
    summary="Logs what an optimizer does: its own statistics, update size, gradient norm",
    log_prefix="opt",
    capabilities=("observer",),
)
class OptimizerMonitor(pl.Callback):
    r"""Logs what every optimizer of the run does, under ``opt/``, and warns when a method has degenerated.

    For any optimizer:

    - ``opt/grad_norm``: 2-norm of all gradients;
    - ``opt/nonfinite_gradients``: how many of their elements are NaN or infinite (the first time, with a warning);
    - ``opt/update_ratio``: :math:`\lVert \theta_{t+1} - \theta_t \rVert / \lVert \theta_t \rVert` over all parameters.

    Optimizers of this package add their own ``statistics()``, for example ``opt/floor_fraction`` of AdaBelief or
    ``opt/xi_mean`` of DiffGrad, and their own warnings. With several optimizers the class name comes between:
    ``opt/Lion/grad_norm``, a second Lion being ``opt/Lion-1``.

    Gradients are those that the update uses: accumulated, averaged over ranks, unscaled, clipped. Optimizers of other
    packages offer no place to read those; for them gradients are read before clipping.

    Any optimizer takes part by these optional methods:

    - ``statistics(loss=None) -> dict[str, Tensor]``: 0-dim tensors, on the device, from parameters, gradients and
      state just before an update. ``loss`` is the loss of the step;
    - ``register_update_pre_hook(hook)``: calls ``hook(optimizer)`` in ``step`` when gradients are final, and returns a
      function that removes the hook;
    - ``diagnose(statistics: dict[str, float], step: int) -> str | None``: a warning, given on each logged step what was
      logged; each text is shown once;
    - ``check_clipping(algorithm: str) -> str | None``: a warning if clipping gradients by ``"norm"`` or ``"value"``
      harms the method.

    Nothing is computed, and nothing waits for the device, on steps that are not logged, or where nobody looks
    (``logger=False`` without a :class:`RunReport`).

    Args:
        every_n_steps: Log every so many optimizer steps; None takes the Trainer's ``log_every_n_steps``.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.

    Cost: on a logged step one copy of the parameters in memory, a few passes over parameters and gradients, and what
    ``statistics()`` of the optimizer costs.

    Example:
        >>> OptimizerMonitor(every_n_steps=100)
        OptimizerMonitor(every_n_steps=100)
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None:
            check_interval("every_n_steps", every_n_steps, 1)
        self.every_n_steps = every_n_steps
        self._warned: set[str] = set()
        self._readings: dict[str, _Reading] = {}  # of the step under way, if it is logged

    def __repr__(self) -> str:
        return f"OptimizerMonitor(every_n_steps={self.every_n_steps})"

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.gradient_clip_val:
            algorithm = GradClipAlgorithmType(trainer.gradient_clip_algorithm or "norm").value
            for optimizer in trainer.optimizers:
                if hasattr(optimizer, "check_clipping"):
                    self._warn_once(optimizer.check_clipping(algorithm))

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not is_log_step(trainer, self.every_n_steps):
            self._end_readings()  # of a step that was skipped
        elif not self._readings and is_wanted(trainer):
            names = _names(trainer.optimizers)
            self._readings = {name: _Reading(o) for name, o in zip(names, trainer.optimizers, strict=True)}

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._readings:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            unscaled = loss.detach() / (scaler.get_scale() if scaler is not None else 1.0)
            for reading in self._readings.values():  # each accumulated batch gives its share of the mean
                reading.loss = unscaled if reading.loss is None else reading.loss + unscaled

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        for reading in self._readings.values():
            if reading.optimizer is optimizer and not reading.hooked:
                reading.before_update(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        readings = {name: reading for name, reading in self._readings.items() if reading.values}
        if not readings:
            return  # still accumulating
        self._end_readings()
        prefixes = {name: f"opt/{name}/" if len(trainer.optimizers) > 1 else "opt/" for name in readings}
        logged = to_floats({prefixes[name] + key: v for name, r in readings.items() for key, v in r.values.items()})
        write_row(trainer, logged)
        for name, reading in readings.items():
            self._warn(reading, {key: logged[prefixes[name] + key] for key in reading.values}, trainer.global_step)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._end_readings()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end_readings()

    def _end_readings(self) -> None:
        for reading in self._readings.values():
            reading.end()
        self._readings = {}

    def _warn(self, reading: "_Reading", values: dict[str, float], step: int) -> None:
        name = type(reading.optimizer).__name__
        if values["nonfinite_gradients"] and name not in self._warned:
            self._warned.add(name)
            rank_zero_warn(
                f"{values['nonfinite_gradients']:.0f} gradient elements of {name} are not finite at step {step}"
            )
        if hasattr(reading.optimizer, "diagnose"):
            self._warn_once(reading.optimizer.diagnose(values, step))

    def _warn_once(self, text: str | None) -> None:
        if text is not None and text not in self._warned:
            self._warned.add(text)
            rank_zero_warn(text)


class _Reading:
    """What one optimizer does in one logged step; its values stay on the device."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.loss: Tensor | None = None
        self.values: dict[str, Tensor] = {}
        self.hooked = hasattr(optimizer, "register_update_pre_hook")
        self._parameters: list[Tensor] = []
        self._old: list[Tensor] = []
        self._removers: list[Callable[[], Any]] = [optimizer.register_step_post_hook(self.after_update).remove]
        if self.hooked:
            self._removers.append(optimizer.register_update_pre_hook(self.before_update))

    @torch.no_grad()
    def before_update(self, optimizer: Any) -> None:
        if self.values:  # the first of several steps of a batch, or evaluations of a step
            return
        self._parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not self._parameters:
            return
        self._old = [p.detach().clone() for p in self._parameters]
        gradients = [_dense(p.grad) for p in self._parameters if p.grad is not None]
        device = gradients[0].device
        self.values = {
            "grad_norm": _norm(gradients),
            "nonfinite_gradients": torch.stack([(~g.isfinite()).sum().to(device) for g in gradients]).sum(),
        }
        if hasattr(optimizer, "statistics"):
            self.values.update(optimizer.statistics(loss=self.loss))

    @torch.no_grad()
    def after_update(self, *_: Any) -> None:
        if self._old:
            change = _norm([p - old for p, old in zip(self._parameters, self._old, strict=True)])
            size = _norm(self._old)
            self.values["update_ratio"] = change / size.clamp_min(torch.finfo(size.dtype).tiny)
            self._old = []

    def end(self) -> None:
        for remove in self._removers:
            remove()
        self._removers, self._parameters, self._old = [], [], []


def _names(optimizers: list[Optimizer]) -> list[str]:
    """Class names, those of the second and later of a class with their number."""
    classes = [type(optimizer).__name__ for optimizer in optimizers]
    numbers = [classes[:index].count(name) for index, name in enumerate(classes)]
    return [f"{name}-{number}" if number else name for name, number in zip(classes, numbers, strict=True)]


def _dense(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _norm(tensors: list[Tensor]) -> Tensor:
    """2-norm of all elements, in float32 at least."""
    real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    dtype = torch.promote_types(torch.float32, real[0].dtype)
    device = real[0].device
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t, dtype=dtype).to(device) for t in real]))
