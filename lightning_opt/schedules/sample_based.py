"""A learning rate that is a function of the samples processed, not of the steps (arXiv:2402.11215, experiments)."""

import math
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register


@register(
    "schedule",
    summary="Warm-up and decay by samples processed, for batches that change",
    paper="2402.11215",
    card="adaptive-batch-size",
)
class SampleBasedLR(LRScheduler):
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
        batch_size: Samples of an optimizer step on all ranks, at the beginning.
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

    interval: ClassVar[Literal["step"]] = "step"

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
        check_interval("batch_size", batch_size, 1)
        check_interval("warmup_samples", warmup_samples, 0)
        check_interval("min_factor", min_factor, 0.0, 1.0)
        if decay != "constant":
            if lr_decay_samples is None:
                raise ValueError(f"lr_decay_samples must be given for decay={decay!r}: samples of the whole run")
            if not lr_decay_samples > warmup_samples:
                raise ValueError(
                    f"lr_decay_samples must be above warmup_samples={warmup_samples}, got {lr_decay_samples}"
                )
        self.batch_size, self.lr_decay_samples, self.warmup_samples = batch_size, lr_decay_samples, warmup_samples
        self.decay, self.min_factor = decay, min_factor
        self.samples = 0
        self._started = False
        super().__init__(optimizer, last_epoch)

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
        if self._started:  # torch calls it once when the scheduler is made
            self.samples += self.batch_size
        self._started = True
        super().step()

    @override
    def get_lr(self) -> list[float | Tensor]:
        factor = self.factor(self.samples, self.batch_size)
        return [base * factor for base in self.base_lrs]
