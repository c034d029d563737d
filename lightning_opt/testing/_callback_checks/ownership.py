"""What a callback sets, nobody else does, and it sets nothing else."""

import itertools
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_opt.callbacks._ownership import Owner, Possession

from ..contract import NotApplicable, require
from .subject import Outcome, Subject, baseline, check, require_equal, run


@check
def sets_only_what_it_owns(subject: Subject) -> None:
    """Learning rates are those of the schedule and batches those of the loader, unless it ``owns`` them."""
    expected = baseline(**subject.setting)
    pairs = zip(_rates(subject.outcome), _rates(expected), strict=False)  # there are fewer steps where batches grow
    if "learning rate" not in subject.owns:
        for step, (rate, scheduled) in enumerate(pairs):
            require_equal(rate, scheduled, f"the learning rates of step {step} with the callback against without")
    if "batch size" not in subject.owns:
        sizes = _batches(subject.outcome), _batches(expected)
        require(sizes[0] == sizes[1], f"its steps have {sizes[0]} batches, without the callback {sizes[1]}")


@check
def refuses_a_second_owner(subject: Subject) -> None:
    """A callback that ``owns`` something refuses, before the first step, another one that sets the same."""
    if not isinstance(subject.build(), Owner) or not subject.owns:
        raise NotApplicable(f"{subject.cls.__name__} owns nothing")
    for rival in (_Rival(subject.owns), subject.build()):
        module = subject.problem()
        try:
            run(subject.build(), rival, module=module)
        except MisconfigurationException:
            require(module.batches == 0, f"refused after {module.batches} batches only")
        except RuntimeError as error:  # Lightning's own, about two callbacks with one state_key
            require("state_key" in str(error) and type(rival) is subject.cls, f"raised {error!r}")
        else:
            require(False, f"it trains beside {type(rival).__name__}, which owns {', '.join(sorted(subject.owns))}")


@check
def does_not_overrule_a_schedule_silently(subject: Subject) -> None:
    """A callback that sets the learning rate refuses a schedule beside it before the first step, or follows it."""
    if "learning rate" not in subject.owns:
        raise NotApplicable(f"{subject.cls.__name__} does not own the learning rate")
    options: dict[str, Any] = {**subject.setting, "scheduled": True}
    module = subject.problem(scheduled=True)
    try:
        with_schedule = run(subject.build(), module=module)
    except MisconfigurationException:
        require(module.batches == 0, f"refused after {module.batches} batches only")
        return
    without = run(subject.build(), **{**options, "scheduled": False})
    require(_rates(with_schedule) != _rates(without), "the schedule has no effect on the learning rates")


class _Rival(pl.Callback):
    """Sets what another callback sets, or so it says."""

    owns: ClassVar[frozenset[Possession]]

    def __init__(self, owns: frozenset[Possession]) -> None:
        self.owns = owns  # type: ignore[misc]


def _rates(outcome: Outcome) -> list[list[float]]:
    """For each step the learning rate of each group."""
    return [[float(group["lr"]) for group in groups] for _, groups in outcome.module.steps]


def _batches(outcome: Outcome) -> list[int]:
    """For each step how many batches it is made of."""
    begun = [0, *(batches for batches, _ in outcome.module.steps)]
    return [after - before for before, after in itertools.pairwise(begun)]
