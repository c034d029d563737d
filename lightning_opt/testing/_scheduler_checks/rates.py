"""The rates: of every group, from the first step to behind the last."""

import math
import random
import warnings

import numpy as np
import torch
from torch.optim.lr_scheduler import ConstantLR, SequentialLR

from ..contract import require
from .subject import LR, STEPS, Subject, advance, check, current, make_optimizer, rates, require_rates


@check
def the_first_rate_is_set_at_once(subject: Subject) -> None:
    """The constructor sets the rate of the first step and keeps the base rate as ``initial_lr``."""
    optimizer = make_optimizer()
    scheduler = subject.build(optimizer)
    first = current(scheduler)
    initial = [group.get("initial_lr") for group in optimizer.param_groups]
    require(None not in initial, "initial_lr is not set")
    require(scheduler.last_epoch == 0, f"last_epoch is {scheduler.last_epoch}, not 0")
    rebuilt = make_optimizer()
    require_rates(rates(subject.build(rebuilt), 1), [first], "of a second scheduler")


@check
def no_step_is_wasted(subject: Subject) -> None:
    """Every rate of the run, the last one too, is positive and finite."""
    for step, (rate,) in enumerate(rates(subject.build())):
        require(math.isfinite(rate) and rate > 0, f"the rate of step {step} of {STEPS} is {rate}")


@check
def the_last_rates_are_those_of_the_groups(subject: Subject) -> None:
    """``get_last_lr`` returns what the groups have, one number a group."""
    scheduler = subject.build(make_optimizer(LR, LR / 2))
    for _ in range(3):
        last, have = scheduler.get_last_lr(), current(scheduler)
        require(list(map(float, last)) == have, f"get_last_lr is {last}, the groups have {have}")
        rates(scheduler, 1)


@check
def groups_keep_their_own_rates(subject: Subject) -> None:
    """Each group is scheduled as it would be in an optimizer of its own."""
    try:
        together = rates(subject.build(make_optimizer(LR, LR / 4)))
    except ValueError as error:
        require(False, f"two groups are refused: {error}")
    alone = [rates(subject.build(make_optimizer(rate))) for rate in (LR, LR / 4)]
    expected = [[first, second] for (first,), (second,) in zip(*alone, strict=True)]
    require_rates(together, expected, "two groups against each alone")


@check
def tensor_lr_equals_float_lr(subject: Subject) -> None:
    """A tensor as ``lr`` is changed in place, to the values that a number takes."""
    lr = torch.tensor(LR, dtype=torch.float64)
    optimizer = make_optimizer(lr)
    held = optimizer.param_groups[0]["lr"]
    scheduled = rates(subject.build(optimizer))
    require(optimizer.param_groups[0]["lr"] is held, "the tensor is replaced by another object")
    # a float factor and a float64 tensor differ in the order of a few roundings at most
    require_rates(scheduled, rates(subject.build()), "tensor lr against float lr", tolerance=1e-14)


@check
def depends_on_the_step_alone(subject: Subject) -> None:
    """Rates depend neither on gradients nor on global random state, and leave that as it is."""
    expected = rates(subject.build())
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    again = rates(subject.build(make_optimizer(gradient=-7.0)))
    require_rates(again, expected, "with another seed and other gradients")
    require(bool((torch.get_rng_state() == before[0]).all()), "torch's random state changed")
    require(np.random.get_state()[1].tolist() == before[1], "numpy's random state changed")  # type: ignore[index]
    require(random.getstate() == before[2], "python's random state changed")


@check
def steps_beyond_the_end_are_defined(subject: Subject) -> None:
    """A step beyond the end of the schedule raises an error that says so, or leaves a finite rate >= 0."""
    scheduler = subject.build()
    rates(scheduler)
    for _ in range(2 * STEPS):
        (rate,) = current(scheduler)
        require(math.isfinite(rate) and rate >= 0, f"the rate is {rate} at step {scheduler.last_epoch}")
        try:
            advance(scheduler)
        except (RuntimeError, ValueError) as error:
            said = str(STEPS) in str(error) or "total" in str(error)
            require(said, f"step {scheduler.last_epoch} raises {type(error).__name__}({str(error)!r})")
            return


@check
def works_in_a_sequence(subject: Subject) -> None:
    """Behind another schedule in a ``SequentialLR`` it runs its own course."""
    optimizer = make_optimizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR calls step(0), which torch itself deprecates
        first = ConstantLR(optimizer, factor=0.5, total_iters=100)
        sequence = SequentialLR(optimizer, [first, subject.build(optimizer)], milestones=[3])
        seen = rates(sequence, 3 + STEPS)
    require_rates(seen[:3], [[LR / 2]] * 3, "before its turn")
    require_rates(seen[3:], rates(subject.build()), "in its turn", tolerance=1e-12)
