from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

import lightning_opt
from lightning_opt._checks import check_choice, check_interval
from lightning_opt._lightning.log_rows import row_is_due, write_row
from lightning_opt.registry import register
from lightning_opt.schedules import NormRecord

from ._learning_rate import only_optimizer
from ._log_values import is_wanted, to_floats
from ._report_panel import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLUSH_AT = 1024  # norms that are kept on the device at most
DRAWN = 1000  # points of the picture


@register(
    "callback",
    summary="Records the gradient norm of every step, for refining the schedule of the next run",
    paper="2310.07831",
    card="lr-refinement",
    log_prefix="grad_norm",
    capabilities=("observer",),
)
class GradNormRecorder(pl.Callback):
    """Records one gradient norm an optimizer step, which ``lightning-opt refine`` makes the next run's schedule of.

    The norm is of all gradients together as the optimizer gets them: accumulated, averaged over ranks, unscaled, but
    before clipping (behind it, the record would be flat) and without decoupled weight decay. A step that mixed
    precision skips is not recorded. With a closure that is evaluated several times a step, the first counts.

    The record is written beside the checkpoints, at every checkpoint and when training ends, however it ends; it says
    of how many steps it is and of how many it was to be, so that a crashed or a shorter run is recognised. It is part
    of the callback's state: a resumed run continues it. A :class:`RunReport` shows it.

    Args:
        norm: ``"l2"`` for SGD and its like, ``"l1"`` for Adam and its like (arXiv:2310.07831, algorithms 1 and 2);
            ``"auto"`` takes l1 where the optimizer has ``betas``.
        dirpath: Where the record is written; None is the folder of the checkpoints, else that of the logger, else
            ``default_root_dir``.
        filename: Its name.
        every_n_steps: Record every so many optimizer steps.

    Raises:
        ValueError: If a value is out of range.
        MisconfigurationException: When fitting starts, for several optimizers or a strategy that distributes the
            gradients over the ranks (FSDP, DeepSpeed).

    Cost:
        One read of the gradients a step, in a few launches; nothing waits for the device but on logged steps, at
        checkpoints and once in 1024 steps; 8 bytes a step in memory and in checkpoints.

    Example:
        >>> GradNormRecorder(every_n_steps=10)
        GradNormRecorder(norm='auto', dirpath=None, filename='gradnorms.npz', every_n_steps=10)
    """

    needs_gradients: ClassVar[bool] = True  # strategies without them refuse it

    def __init__(
        self,
        norm: Literal["auto", "l1", "l2"] = "auto",
        dirpath: str | None = None,
        filename: str = "gradnorms.npz",
        every_n_steps: int = 1,
    ) -> None:
        check_choice("norm", norm, ["auto", "l1", "l2"])
        check_interval("every_n_steps", every_n_steps, 1)
        if not filename.endswith(".npz") or Path(filename).name != filename:
            raise ValueError(f"filename must be the name of a file that ends in .npz, got {filename!r}")
        self.norm, self.dirpath, self.filename, self.every_n_steps = norm, dirpath, filename, every_n_steps
        self._stage = "fit"
        self._forget()
        self._begin()

    def __repr__(self) -> str:
        return (
            f"GradNormRecorder(norm={self.norm!r}, dirpath={self.dirpath!r}, filename={self.filename!r},"
            f" every_n_steps={self.every_n_steps})"
        )

    def _forget(self) -> None:
        """The state of a run that begins."""
        self._norms = torch.zeros(0, dtype=torch.float64)
        self._steps = 0  # that the optimizer has taken
        self._skipped = 0  # that it was to take
        self._missed = 0  # of the run before the record began

    def _begin(self) -> None:
        """What belongs to one fit."""
        self._fresh: list[Tensor] = []  # norms that are still on the device
        self._pending: Tensor | None = None  # of the step under way
        self._last: Tensor | None = None
        self._total = -1
        self._path: Path | None = None
        self._about: dict[str, Any] = {}
        self._hook: Any = None

    # --- a fit -----------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stage = stage
        if stage == "fit":
            self._begin()
            if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
                raise MisconfigurationException(
                    f"GradNormRecorder does not support {type(trainer.strategy).__name__}, where no rank holds the"
                    " whole gradient; use DDP or one device."
                )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        only_optimizer(trainer, self)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector of Lightning's
            self._path = self._directory(trainer) / self.filename

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self._forget()
        elif self._steps == 0:
            self._missed = trainer.global_step
            rank_zero_warn(
                f"GradNormRecorder was not there from the beginning: the record lacks the first {trainer.global_step}"
                " steps"
            )
        (optimizer,) = trainer.optimizers
        self._total = _planned_steps(trainer)
        self._about = {
            "norm": ("l1" if "betas" in optimizer.defaults else "l2") if self.norm == "auto" else self.norm,
            "optimizer": type(optimizer).__name__,
            "lr": float(optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"])),
            "every_n_steps": self.every_n_steps,
            "batch_size": getattr(trainer.train_dataloader, "batch_size", None) or -1,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "world_size": trainer.world_size,
            "version": lightning_opt.__version__,
        }
        self._hook = optimizer.register_step_post_hook(self._after_step)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._drop_pending()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._pending is None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if gradients:
                due = self._steps % self.every_n_steps == 0
                self._pending = gradient_norm(gradients, self._about["norm"]) if due else gradients[0].new_empty(0)

    def _after_step(self, *_: Any) -> None:
        """Called by the optimizer, so not for a step that mixed precision skips."""
        if self._pending is None:  # nothing had a gradient
            self._skipped += 1
            return
        self._steps += 1
        if self._pending.ndim == 0:
            self._fresh.append(self._pending)
            self._last = self._pending
            if len(self._fresh) >= FLUSH_AT:
                self._flush()
        self._pending = None

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._drop_pending()
        if self._last is not None and row_is_due(trainer) and is_wanted(trainer):
            write_row(trainer, to_floats({f"grad_norm/{self._about['norm']}": self._last}))
            self._last = None

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._write(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.should_stop or self._total < 0:
            self._total = self._missed + self._steps + self._skipped  # all, however many they turned out to be
        self._write(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._write(trainer)
        self._remove_hook()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._remove_hook()

    @override
    def state_dict(self) -> dict[str, Any]:
        self._flush()
        return {"norms": self._norms, "steps": self._steps, "skipped": self._skipped, "missed": self._missed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage == "fit":  # validate and test restore callbacks too
            self._norms = state_dict["norms"].clone()
            self._steps, self._skipped = state_dict["steps"], state_dict["skipped"]
            self._missed = state_dict.get("missed", 0)

    def report_panels(self) -> list[Panel]:
        """The norms, for :class:`RunReport`."""
        self._flush()
        finite = self._norms.isfinite() & (self._norms > 0)
        if not finite.any():
            return []
        places = finite.nonzero().squeeze(1)
        places = places[:: max(1, len(places) // DRAWN)]
        return [
            Panel(
                "Gradient norm",
                _Curve((places * self.every_n_steps).tolist(), self._norms[places].tolist(), self._about["norm"]),
            )
        ]

    # --- helpers ---------------------------------------------------------------------------------------------------

    def _drop_pending(self) -> None:
        if self._pending is not None:  # of a step that was skipped
            self._skipped += 1
            self._pending = None

    def _flush(self) -> None:
        """Bring the norms to the host, waiting for the device once."""
        if self._fresh:
            self._norms = torch.cat([self._norms, torch.stack(self._fresh).to("cpu", torch.float64)])
            self._fresh = []

    def _write(self, trainer: pl.Trainer) -> None:
        self._flush()
        if self._path is None or not trainer.is_global_zero or not len(self._norms) or not self._about:
            return  # or the run has ended before its training began
        self._path.parent.mkdir(parents=True, exist_ok=True)
        done = self._steps + self._skipped
        NormRecord(norms=self._norms, total_steps=self._total, steps=done, **self._about).save(self._path)

    def _directory(self, trainer: pl.Trainer) -> Path:
        if self.dirpath is not None:
            return Path(self.dirpath)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath and "://" not in str(callback.dirpath):
                return Path(callback.dirpath)
        logged = trainer.loggers[0].log_dir if trainer.loggers and hasattr(trainer.loggers[0], "log_dir") else None
        return Path(logged or trainer.default_root_dir)

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


@torch.no_grad()
def gradient_norm(gradients: list[Tensor], norm: Literal["l1", "l2"]) -> Tensor:
    """The norm of several tensors taken as one vector.

    Args:
        gradients: On any devices, of any floating-point dtypes; sparse ones count with their sum.
        norm: Which one.

    Returns:
        A 0-dim tensor on the first one's device, computed in float32 at least and summed over tensors in float64;
        nothing waits for the device.

    Example:
        >>> gradient_norm([torch.tensor([3.0]), torch.tensor([[-4.0]])], "l2")
        tensor(5., dtype=torch.float64)
    """
    order = 1 if norm == "l1" else 2
    device = gradients[0].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    kinds: dict[tuple[Any, ...], list[Tensor]] = {}
    for g in gradients:
        g = g.coalesce().values() if g.is_sparse else g
        kinds.setdefault((g.device, g.dtype), []).append(g)
    parts = []
    for (place, dtype), tensors in kinds.items():
        low = dtype in (torch.float16, torch.bfloat16)
        if order == 1 and place.type == "cpu":  # torch's own 1-norm is three times slower there
            norms = [t.abs().sum(dtype=torch.float32 if low else None) for t in tensors]
        elif low:
            norms = list(torch._foreach_norm(tensors, order, dtype=torch.float32))
        else:
            norms = list(torch._foreach_norm(tensors, order))
        parts.append(torch.linalg.vector_norm(torch.stack(norms), order, dtype=wide).to(device))
    return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), order)


def _planned_steps(trainer: pl.Trainer) -> int:
    try:
        total = trainer.estimated_stepping_batches
    except MisconfigurationException:  # where a GradientAccumulationScheduler changes it
        return -1
    return int(total) if total not in (float("inf"), -1) else -1


class _Curve:
    """Draws norms over steps."""

    def __init__(self, steps: list[int], norms: list[float], norm: str) -> None:
        self.steps, self.norms, self.norm = steps, norms, norm

    def __call__(self, axes: "Axes") -> None:
        axes.plot(self.steps, self.norms, color="#4269d0", linewidth=1.0)
        axes.set_yscale("log")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(f"{self.norm} norm of the gradient")
