"""Linear decay to zero, the best schedule where only a bound of the gradients is known (arXiv:2310.07831)."""

from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_opt._checks import check_interval
from lightning_opt.registry import register

from ._base import StepSchedule, check_steps


def linear_decay(step: int, total_steps: int) -> float:
    """The share of the run that is left, ``(total_steps - step) / total_steps``.

    Args:
        step: Optimizer steps done, from 0 to ``total_steps``.
        total_steps: Optimizer steps of the run.

    Example:
        >>> [linear_decay(step, 4) for step in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return (total_steps - step) / total_steps


@register(
    "schedule",
    summary="Linear decay to zero at the run's true last step, with warm-up",
    paper="2310.07831",
    card="lr-refinement",
)
class LinearDecayLR(StepSchedule):
    r"""Decays the learning rate linearly, to zero behind the last step of the run.

    With warm-up :math:`W` and total :math:`T`, step :math:`s = 0, \dots, T - 1` is made with the base rate times

    .. math::
        \frac{s + 1}{W + 1} \;\text{ for } s < W, \qquad
        m + (1 - m) \left(1 - \frac{s - W}{T - W}\right)^q \;\text{ from there on.}

    The paper's index gives the last step the rate 0, which wastes it; here the last step is made with :math:`1 / (T -
    W)` and 0 is reached behind it. Linear decay is worst-case optimal for the last iterate among the schedules that
    know a bound of the gradients only (arXiv:2310.07831, corollary of theorem 1; arXiv:2312.08531).

    Args:
        optimizer: Its groups' ``lr`` are the peak rates.
        total_steps: Optimizer steps of the run, such as ``self.trainer.estimated_stepping_batches`` in
            ``configure_optimizers``; None is for the ``lightning-opt`` command, which finds it out.
        warmup_steps: Steps before the peak, fewer than ``total_steps``; or, as a float below 1, their share of
            ``total_steps``, rounded to whole steps: it fits a run of any length, also that of ``fast_dev_run``.
        min_factor: Factor :math:`m` that is reached behind the last step.
        power: Exponent :math:`q`; 1 is linear.
        extend: What a step beyond ``total_steps`` does: raise RuntimeError, or hold the final rate.
        last_epoch: Index of the last step done; -1 to begin.

    Raises:
        ValueError: If a value is out of range, or ``total_steps`` is None or infinite.
        RuntimeError: In ``step``, beyond ``total_steps``.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> scheduler = LinearDecayLR(optimizer, total_steps=4, warmup_steps=1)
        >>> for _ in range(4):
        ...     print(f"{scheduler.get_last_lr()[0]:.3f}")
        ...     optimizer.step()
        ...     scheduler.step()
        0.250
        0.500
        0.333
        0.167
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        warmup_steps: int | float = 0,
        min_factor: float = 0.0,
        power: float = 1.0,
        extend: Literal["raise", "hold"] = "raise",
        last_epoch: int = -1,
    ) -> None:
        steps = check_steps("total_steps", total_steps, 1)
        self.warmup_steps = check_warmup(warmup_steps, steps)
        check_interval("min_factor", min_factor, 0.0, 1.0)
        check_interval("power", power, 0.0, closed="(]")
        self.min_factor, self.power = min_factor, power
        super().__init__(optimizer, steps, extend, last_epoch)

    @override
    def rate(self, step: int, base: float | Tensor, group: dict[str, Any]) -> float | Tensor:
        if step < self.warmup_steps:
            return base * warmup(step, self.warmup_steps)
        assert self.total_steps is not None
        left = linear_decay(step - self.warmup_steps, self.total_steps - self.warmup_steps)
        return base * (self.min_factor + (1 - self.min_factor) * left**self.power)


def warmup(step: int, warmup_steps: int) -> float:
    """Rises by equal amounts from ``1 / (warmup_steps + 1)`` at the first step to 1 at step ``warmup_steps``."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def check_warmup(warmup_steps: Any, total_steps: int) -> int:
    """Return ``warmup_steps``, which may be a share of ``total_steps``, as a number of steps.

    Raises:
        ValueError: If it is neither an integer from 0 to ``total_steps - 1`` nor a float in [0, 1).

    Example:
        >>> check_warmup(10, 100), check_warmup(0.1, 100), check_warmup(0.1, 1)
        (10, 10, 0)
    """
    if isinstance(warmup_steps, float):
        if not 0 <= warmup_steps < 1:
            raise ValueError(
                "warmup_steps must be an integer (steps) or a float in [0, 1) (a share of total_steps), got"
                f" {warmup_steps}"
            )
        return min(round(warmup_steps * total_steps), total_steps - 1)  # one step is left for the peak
    steps = check_steps("warmup_steps", warmup_steps, 0)
    if steps >= total_steps:
        raise ValueError(
            f"warmup_steps must be below total_steps={total_steps}, got {steps}; a float is a share of total_steps"
        )
    return steps
