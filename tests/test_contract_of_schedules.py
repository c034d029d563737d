"""Every check of the schedulers' contract over every registered schedule, and over three of torch's.

The settings to check with stand in the ``settings`` of each schedule's own test file, for runs of 12 steps.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR

from lightning_opt import registry
from lightning_opt.testing import scheduler_checks
from tests.collected import collect_settings
from tests.contract_case import Case

registry.load_all()


SCHEDULES = {entry.name: entry for entry in registry.entries("schedule")}
SETTINGS = collect_settings(Path(__file__).parent / "schedules")
TORCH_FAILURES = {
    "repr_names_the_arguments": "object at 0x",
    "says_its_interval": "interval is None",
    "refuses_a_wrong_last_epoch": "last_epoch=-2 is accepted",
}
CASES = {
    **{
        f"{name}-{i}": Case(SCHEDULES[name].target, kwargs)  # type: ignore[arg-type]
        for name, several in SETTINGS.items()
        for i, kwargs in enumerate(several)
        if name in SCHEDULES
    },
    "torch-StepLR": Case(StepLR, {"step_size": 4}, frozenset({"refuses_wrong_numbers_of_steps"}), TORCH_FAILURES),
    "torch-CosineAnnealingLR": Case(
        CosineAnnealingLR,
        {"T_max": 12},
        failures={**TORCH_FAILURES, "refuses_wrong_numbers_of_steps": "T_max=-1 is accepted"},
    ),
    "torch-OneCycleLR": Case(
        OneCycleLR,
        {"max_lr": 0.1, "total_steps": 12},
        failures={
            **TORCH_FAILURES,
            "refuses_a_wrong_last_epoch": "last_epoch=-2 raises KeyError",
            "works_in_a_sequence": "before its turn: the rates of step 0",  # it writes initial_lr, the base of others
        },
    ),
}
CHECKS = [name for name, _ in scheduler_checks(StepLR, step_size=4)]


@functools.cache
def checks_of(label: str) -> dict[str, Callable[[], None]]:
    return dict(scheduler_checks(CASES[label].cls, **CASES[label].kwargs))


@pytest.mark.parametrize("label", CASES)
@pytest.mark.parametrize("check", CHECKS)
def test_contract(label: str, check: str) -> None:
    CASES[label].expect(check, checks_of(label)[check])


def test_every_schedule_has_settings() -> None:
    assert set(SETTINGS) == set(SCHEDULES)
