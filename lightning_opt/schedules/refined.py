"""A schedule given by its values, such as one refined from the gradient norms of an earlier run."""

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_opt.registry import register

from ._base import StepSchedule, check_steps
from .linear_decay import check_warmup, warmup


@register(
    "schedule",
    summary="A schedule refined from the gradient norms of an earlier run",
    paper="2310.07831",
    card="lr-refinement",
)
class RefinedLR(StepSchedule):
    r"""Follows a schedule given by its values, at any length of the run.

    The schedule is a function on the run, from its first value where the run begins to its last value where it ends;
    between, it is interpolated linearly. Step :math:`s = 0, 1, \dots` of :math:`T` takes its value at :math:`s / T`. So
    the final 0 of a refined schedule is reached behind the last step and wastes none, and the schedule refined from
    constant norms is exactly :class:`LinearDecayLR`.

    Only the shape is refined: tune the peak rate again, on a coarse grid, for the new schedule.

    Args:
        optimizer: Its groups' ``lr`` are multiplied by the schedule.
        schedule: Path of a file that ``lightning-opt refine`` or :func:`save_schedule` wrote, or the values: at least
            two, none negative, not all zero.
        total_steps: Optimizer steps of the run; None takes as many as the schedule has values (the ``lightning-opt``
            command takes the run's).
        warmup_steps: Steps in which the schedule is multiplied by a linear warm-up, fewer than ``total_steps``; or, as
            a float below 1, their share of ``total_steps``.
        extend: What a step beyond ``total_steps`` does: raise RuntimeError, or hold the final rate.
        last_epoch: Index of the last step done; -1 to begin.

    Raises:
        ValueError: If a value is out of range or the file holds no schedule; in ``load_state_dict``, if the state was
            saved with another schedule.
        RuntimeError: In ``step``, beyond ``total_steps``.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> scheduler = RefinedLR(optimizer, schedule=[0.5, 1.0, 0.0], total_steps=4)
        >>> for _ in range(4):
        ...     print(scheduler.get_last_lr()[0])
        ...     optimizer.step()
        ...     scheduler.step()
        0.25
        0.375
        0.5
        0.25
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: str | list[float] | Tensor,
        total_steps: int | None = None,
        warmup_steps: int | float = 0,
        extend: Literal["raise", "hold"] = "raise",
        last_epoch: int = -1,
    ) -> None:
        values = load_schedule(schedule) if isinstance(schedule, (str, Path)) else schedule
        self.schedule = check_schedule(values)
        self.schedule_sha256 = hashlib.sha256(self.schedule.numpy().astype("<f8").tobytes()).hexdigest()
        steps = check_steps("total_steps", len(self.schedule) if total_steps is None else total_steps, 1)
        self.warmup_steps = check_warmup(warmup_steps, steps)
        super().__init__(optimizer, steps, extend, last_epoch)

    @override
    def rate(self, step: int, base: float | Tensor, group: dict[str, Any]) -> float | Tensor:
        assert self.total_steps is not None
        return base * (interpolate(self.schedule, step, self.total_steps) * warmup(step, self.warmup_steps))

    @override
    def state_dict(self) -> dict[str, Any]:
        """The state, with the hash of the schedule in its place."""
        return {name: value for name, value in super().state_dict().items() if name != "schedule"}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at a saved step.

        Raises:
            ValueError: If the state was saved with another schedule.
        """
        if state_dict["schedule_sha256"] != self.schedule_sha256:
            raise ValueError(
                "the state was saved with another schedule: its SHA-256 is"
                f" {state_dict['schedule_sha256'][:12]}..., that of this one {self.schedule_sha256[:12]}...; give the"
                " schedule that the run was begun with"
            )
        super().load_state_dict(state_dict)

    def __repr__(self) -> str:
        shown = f"<{len(self.schedule)} values, SHA-256 {self.schedule_sha256[:12]}>"
        rest = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._arguments() if name != "schedule")
        return f"RefinedLR(schedule={shown}, {rest})"


def interpolate(schedule: Tensor, step: int, total_steps: int) -> float:
    """The value of a schedule at ``step / total_steps`` of the run, linear between its entries."""
    place, rest = divmod(step * (len(schedule) - 1), total_steps)
    low = schedule[place].item()
    if rest == 0:
        return low
    share = rest / total_steps
    return (1 - share) * low + share * schedule[place + 1].item()


def resample(schedule: Tensor, length: int) -> Tensor:
    """A schedule with another number of values, by linear interpolation; first and last stay.

    Args:
        schedule: At least two values.
        length: At least 2.

    Returns:
        ``length`` values in float64.

    Raises:
        ValueError: If ``length`` is below 2 or the schedule is none.

    Example:
        >>> resample(torch.tensor([0.0, 1.0, 0.0]), 5)
        tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    length = check_steps("length", length, 2)
    schedule = check_schedule(schedule)
    places = torch.arange(length) * (len(schedule) - 1)
    low, share = places // (length - 1), (places % (length - 1)).double() / (length - 1)
    return (1 - share) * schedule[low] + share * schedule[(low + 1).clamp_max(len(schedule) - 1)]


def check_schedule(values: Tensor | Sequence[float]) -> Tensor:
    """A copy of the values of a schedule in float64, on the CPU.

    Raises:
        ValueError: If there are fewer than two, or one is negative, infinite or NaN, or all are zero.
    """
    schedule = torch.as_tensor(values, dtype=torch.float64).detach().cpu().clone()
    if schedule.ndim != 1 or len(schedule) < 2:
        raise ValueError(f"schedule must hold at least two numbers in one dimension, got shape {tuple(schedule.shape)}")
    wrong = schedule[~(schedule >= 0) | schedule.isinf()]
    if len(wrong):
        raise ValueError(f"schedule must hold numbers >= 0 and finite, got {wrong[0].item()}")
    if not schedule.any():
        raise ValueError("schedule must hold a number > 0, got zeros only")
    return schedule


def save_schedule(path: str | Path, schedule: Tensor) -> None:
    """Write a schedule to an npz file that :class:`RefinedLR` reads."""
    with Path(path).open("wb") as file:
        np.savez(file, schedule=check_schedule(schedule).numpy())


def load_schedule(path: str | Path) -> Tensor:
    """Read a schedule from an npz file.

    Raises:
        ValueError: If there is no such file or it holds no schedule.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return torch.from_numpy(file["schedule"].astype(np.float64))
    except FileNotFoundError as error:
        raise ValueError(f"schedule must be a file that `lightning-opt refine` wrote; there is no {path}") from error
    except (KeyError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"schedule must be a file that `lightning-opt refine` wrote; {path} holds none") from error
