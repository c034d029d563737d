import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from torch import Tensor

from lightning_opt._checks import check_interval

from .parametrization import wide


class SchedulePlace(SchedulerMixin, ConfigMixin):
    """The place of a scheduler in its schedule, which is followed by position: timesteps are floats and may repeat.

    A subclass calls :meth:`_no_schedule` in its constructor, :meth:`_take_schedule` in ``set_timesteps``, and
    :meth:`_place` and :meth:`_advance` at the ends of ``step``.
    """

    timesteps: Tensor
    sigmas: Tensor
    num_inference_steps: int | None

    def _no_schedule(self) -> None:
        self.num_inference_steps = None
        self.timesteps, self.sigmas = torch.empty(0), torch.empty(0)
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @property
    def step_index(self) -> int | None:
        """Position of the step that is due; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Position to begin at, set by :meth:`set_begin_index`."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin in the middle of the schedule, for instance with a noised image.

        Args:
            begin_index: Position in ``timesteps``.

        Raises:
            ValueError: If there is no such position.
        """
        if self.num_inference_steps is not None and not 0 <= begin_index < len(self._timestep_list):
            raise ValueError(f"begin_index must be in [0, {len(self._timestep_list) - 1}], got {begin_index}")
        self._begin_index = begin_index

    def _take_schedule(self, timesteps: Sequence[float], device: torch.device | str | None) -> None:
        """Take a schedule: the timesteps of all network calls."""
        on_host = torch.tensor(timesteps, dtype=torch.float32)
        self._timestep_list: list[float] = on_host.tolist()
        self.timesteps = on_host.to(device)
        self._first_address = self.timesteps.data_ptr()
        self.num_inference_steps = len(timesteps)
        self._step_index = self._begin_index = None
        self._totals: list[Tensor] = []

    def _due_index(self) -> int:
        return self._step_index if self._step_index is not None else self._begin_index or 0

    def _is_due(self, timestep: float | Tensor) -> bool:
        """Whether a timestep is the one at the current position.

        An entry of ``timesteps`` is known by its address, so that a GPU is not waited for.
        """
        index = self._due_index()
        if self.num_inference_steps is None or index >= len(self._timestep_list):
            return False
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1:
                return False
            if timestep.data_ptr() == self._first_address + 4 * index:
                return True
        return abs(float(timestep) - self._timestep_list[index]) <= 1e-5 + 1e-6 * abs(self._timestep_list[index])

    def _place(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor) -> int:
        """The position of the step, after checking the arguments of ``step``."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        index = self._due_index()
        if isinstance(timestep, Tensor) and timestep.numel() != 1:
            raise ValueError(f"a step has one timestep, got a tensor of shape {tuple(timestep.shape)}")
        if not self._is_due(timestep):
            raise ValueError(self._why_not_due(float(timestep), index))
        if model_output.shape != sample.shape:
            raise ValueError(
                f"the network's output must have the shape of the sample, {tuple(sample.shape)}, "
                f"got {tuple(model_output.shape)}"
            )
        return index

    def _why_not_due(self, timestep: float, index: int) -> str:
        count = len(self._timestep_list)
        if index >= count:
            return f"all {count} steps of the schedule are done; call set_timesteps to begin anew"
        due = f"step {index} of {count} has the timestep {self._timestep_list[index]}, got {timestep}"
        near = min(range(count), key=lambda i: abs(self._timestep_list[i] - timestep))
        if abs(self._timestep_list[near] - timestep) <= 1e-3:
            return f"{due}, which is step {near}: set_begin_index({near}) begins there"
        return f"{due}, which is not in the schedule; pass the entries of scheduler.timesteps in their order"

    def _advance(self, index: int, prev_sample: Tensor, model_output: Tensor, sample: Tensor) -> None:
        """Go to the next position, unless the sample is not finite.

        On a GPU the check is read once, behind the last step: reading it would make every step wait for the device.
        """
        self._step_index = index + 1
        total = prev_sample.sum(dtype=wide(prev_sample.dtype))
        if prev_sample.device.type == "cpu":
            totals = [total.item()]
        else:
            self._totals.append(total)
            if self._step_index < len(self._timestep_list):
                return
            totals = torch.stack(self._totals).tolist()
        for i, value in enumerate(totals, self._step_index - len(totals)):
            if not math.isfinite(value):
                raise ValueError(self._why_not_finite(i, prev_sample, model_output, sample))

    def _why_not_finite(self, index: int, prev_sample: Tensor, model_output: Tensor, sample: Tensor) -> str:
        bad = {
            name: int((~torch.isfinite(x)).sum())
            for name, x in (("sample", sample), ("network's output", model_output), ("next sample", prev_sample))
        }
        found = ", ".join(f"{count} of the {name}" for name, count in bad.items() if count)
        return (
            f"the sample is not finite at step {index} of {len(self._timestep_list)} "
            f"(timestep {self._timestep_list[index]:.6g}): {found or 'none'} of {sample.numel()} entries are not"
        )


def whole(name: str, value: Any) -> int:
    """Return a positive whole number."""
    check_interval(name, value, 1)
    if value != int(value):
        raise ValueError(f"{name} must be a whole number, got {value}")
    return int(value)
