"""A learning rate that is a function of the samples processed, not of the steps (arXiv:2402.11215, experiments)."""

import math
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

from ._base import StepSchedule, check_steps


@register(
    "schedule",
    summary="Warm-up and decay by samples processed, for batches that change",
    paper="2402.11215",
    card="adaptive-batch-size",
)
class SampleBasedLR(StepSchedule):
    r"""Warms up linearly, then decays, by the number of samples processed.

    With :math:`s` samples processed *with* the step that is made, warm-up :math:`W` and decay :math:`D`, the base rate
    is multiplied by

    .. math::
        \frac{s}{W} \;\text{ for } s < W, \qquad
        m + (1 - m)\, f\!\left(\min\left(\frac{s' - W}{D - W}, 1\right)\right) \;\text{ from there on,}

    :math:`s'` being the samples before the step, and f half a cosine, a line, or 1. So a batch that grows leaves the
    curve over samples as it is, where a schedule in steps would stretch it.

    ``step()`` counts ``batch_size`` samples. :class:`lightning_opt.callbacks.AdaptiveBatchSize` sets ``batch_size`` to
    the true number of samples before every step.

    Args:
        optimizer: Its groups' ``lr`` are the peak rates.
        batch_size: Samples of an optimizer step on all ranks, at the beginning; an attribute that may be set.
        lr_decay_samples: Samples at which the decay ends; not needed for ``"constant"``.
        warmup_samples: Samples of the warm-up.
        decay: ``"cosine"``, ``"linear"`` or ``"constant"``.
        min_factor: Factor m at the end of the decay, in [0, 1].
        last_epoch: As everywhere in torch.

    Raises:
        ValueError: If a value is out of range, or the decay ends before the warm-up.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = SampleBasedLR(optimizer, batch_size=10, warmup_samples=20, lr_decay_samples=60, decay="linear")
        >>> for scheduler.batch_size in (10, 10, 20, 20):
        ...     print(scheduler.get_last_lr())
        ...     optimizer.step()
        ...     scheduler.step()
        [0.5]
        [1.0]
        [1.0]
        [0.5]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        batch_size: int,
        lr_decay_samples: int | None = None,
        warmup_samples: int = 0,
        decay: Literal["cosine", "linear", "constant"] = "cosine",
        min_factor: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        check_choice("decay", decay, ["cosine", "linear", "constant"])
        self.batch_size = check_steps("batch_size", batch_size, 1)
        self.warmup_samples = check_steps("warmup_samples", warmup_samples, 0)
        check_interval("min_factor", min_factor, 0.0, 1.0)
        if lr_decay_samples is not None:
            lr_decay_samples = check_steps("lr_decay_samples", lr_decay_samples, 1)
        if decay != "constant":
            if lr_decay_samples is None:
                raise ValueError(f"lr_decay_samples must be given for decay={decay!r}: samples of the whole run")
            if lr_decay_samples <= warmup_samples:
                raise ValueError(
                    f"lr_decay_samples must be above warmup_samples={warmup_samples}, got {lr_decay_samples}"
                )
        self.lr_decay_samples, self.decay, self.min_factor = lr_decay_samples, decay, min_factor
        self.samples = 0  # processed
        self._started = False
        if isinstance(last_epoch, int) and last_epoch >= 0:  # in the middle of a run
            self.samples = (last_epoch + 1) * self.batch_size
        super().__init__(optimizer, None, "hold", last_epoch)

    def factor(self, samples: int, batch_size: int) -> float:
        """What the peak rate is multiplied by in a step of ``batch_size`` samples behind ``samples`` others."""
        if samples + batch_size < self.warmup_samples:
            return (samples + batch_size) / self.warmup_samples
        if self.decay == "constant":
            return 1.0
        assert self.lr_decay_samples is not None
        done = (samples - self.warmup_samples) / (self.lr_decay_samples - self.warmup_samples)
        done = min(max(done, 0.0), 1.0)
        shape = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.min_factor + (1 - self.min_factor) * shape

    @override
    def step(self, epoch: Any = None) -> None:
        """Count the samples of the step that was made."""
        if (
            self._started and self.last_epoch >= 0
        ):  # torch calls it when the scheduler is made, and put in a SequentialLR
            self.samples += self.batch_size
        self._started = True
        super().step()

    @override
    def rate(self, step: int, base: float | Tensor, group: dict[str, Any]) -> float | Tensor:
        return base * self.factor(self.samples, self.batch_size)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the saved schedule, with the batch size that it had come to."""
        self.batch_size = state_dict.get("batch_size", self.batch_size)
        super().load_state_dict(state_dict)
