"""Every check of the callbacks' contract over every registered callback, and over three of Lightning's own.

The settings to check with stand in the ``settings`` of each callback's own test file: a dict from registered names to
the constructor's arguments, or to a list of them.
"""

import functools
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, LearningRateMonitor

from lightning_opt import registry
from lightning_opt.callbacks._ownership import Owner
from lightning_opt.testing import ContractError, callback_checks, check_callbacks_ddp
from tests.collected import collect_settings
from tests.contract_case import Case

registry.load_all()


OBSERVERS_ONLY = {"leaves_no_trace", "waits_for_nothing_between_logged_steps"}
OWNERS_ONLY = {"refuses_a_second_owner", "does_not_overrule_a_schedule_silently"}

# What a callback does not do, or refuses in setup, beyond what follows from its being an observer or an owner.
NOT_APPLICABLE = {
    "AdaptiveBatchSize": {
        *("accumulates_gradients", "trains_by_manual_optimization", "trains_on_data_without_length"),
    },
    "GlobalODERegularization": {"trains_by_manual_optimization"},
    "LanczosLRLearner": {"trains_by_manual_optimization"},
    "LocalODERegularization": {"trains_by_manual_optimization"},
    "ResumeState": {"logs_under_its_prefix"},
    "RunReport": {"logs_under_its_prefix"},
    "SampleGrid": {"logs_under_its_prefix"},
    "ScheduleCheck": {"logs_under_its_prefix"},
    "StabilityBooster": {"trains_by_manual_optimization"},
    "StabilityMonitor": {"trains_by_manual_optimization"},
    "TayNODE": {"trains_by_manual_optimization"},
}

CALLBACKS = {entry.name: entry for entry in registry.entries("callback")}
SETTINGS = collect_settings(Path(__file__).parent / "callbacks")


def _ours(name: str, kwargs: dict[str, Any]) -> Case:
    entry = CALLBACKS[name]
    not_applicable = set(NOT_APPLICABLE.get(name, ()))
    callback = entry.target(**kwargs)
    if "observer" not in entry.capabilities or getattr(callback, "owns", None):
        not_applicable |= OBSERVERS_ONLY
    if not isinstance(callback, Owner) or not callback.owns:
        not_applicable |= OWNERS_ONLY
    elif "learning rate" not in callback.owns:
        not_applicable.add("does_not_overrule_a_schedule_silently")
    return Case(entry.target, kwargs, frozenset(not_applicable))  # type: ignore[arg-type]


LIGHTNINGS_REPR = {"repr_names_the_arguments": "object at 0x"}
CASES = {
    **{
        f"{name}-{i}": _ours(name, kwargs)
        for name, several in SETTINGS.items()
        for i, kwargs in enumerate(several)
        if name in CALLBACKS
    },
    "lightning-EarlyStopping": Case(
        EarlyStopping,
        {"monitor": "val/loss", "patience": 100},
        frozenset({*OBSERVERS_ONLY, *OWNERS_ONLY, "logs_under_its_prefix"}),
        LIGHTNINGS_REPR,
    ),
    "lightning-LearningRateMonitor": Case(
        LearningRateMonitor,
        {},
        frozenset({*OBSERVERS_ONLY, *OWNERS_ONLY}),
        {
            **LIGHTNINGS_REPR,
            "decides_alike_without_a_logger": "callback with `Trainer` that has no logger",
            "logs_under_its_prefix": "it logs lr-Adam",
        },
    ),
    "lightning-GradientAccumulationScheduler": Case(
        GradientAccumulationScheduler,
        {"scheduling": {1: 4}},
        frozenset({*OBSERVERS_ONLY, *OWNERS_ONLY, "logs_under_its_prefix"}),
        {
            **LIGHTNINGS_REPR,
            # Lightning-AI/pytorch-lightning#19987: the last window of an epoch is divided by 4 whatever its length
            "accumulates_gradients": "from steps of the mean over their examples",
            # refused clearly, but by another kind of error
            "trains_by_manual_optimization": "raised RuntimeError: .* not supported for",
        },
    ),
}
CHECKS = [name for name, _ in callback_checks(pl.Callback)]


@functools.cache
def checks_of(label: str) -> dict[str, Callable[[], None]]:
    return dict(callback_checks(CASES[label].cls, **CASES[label].kwargs))


@pytest.fixture(autouse=True)
def _quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds, and tests/callbacks/test_run_report.py draws."""
    monkeypatch.setattr("lightning_opt.callbacks.run_report.render_svg", lambda panel: ("<svg></svg>", panel))
    monkeypatch.setattr("lightning_opt.callbacks.run_report.render_png", lambda *_: None)


@pytest.mark.parametrize("label", CASES)
@pytest.mark.parametrize("check", CHECKS)
def test_contract(label: str, check: str) -> None:
    CASES[label].expect(check, checks_of(label)[check])


def test_every_callback_has_settings() -> None:
    assert set(SETTINGS) == set(CALLBACKS)


def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pair of processes for all, with callbacks among them that must fail."""
    (tmp_path / "planted_callbacks.py").write_text(
        textwrap.dedent(
            """
            import lightning.pytorch as pl
            import torch

            class AddsItsRank(pl.Callback):
                def on_train_end(self, trainer, module):
                    with torch.no_grad():
                        next(module.parameters()).add_(trainer.global_rank)

            class FailsOnOneRank(pl.Callback):
                def on_train_batch_end(self, trainer, *_):
                    if trainer.global_rank == 1:
                        raise ValueError("rank 1 only")
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    import planted_callbacks  # type: ignore[import-not-found]

    sound = [(case.cls, case.kwargs) for case in CASES.values()]
    planted = [(planted_callbacks.AddsItsRank, {}), (planted_callbacks.FailsOnOneRank, {})]
    with pytest.raises(ContractError) as caught:
        check_callbacks_ddp([*sound, *planted])
    sys.modules.pop("planted_callbacks")
    report = caught.value.report
    assert report is not None
    assert len(report.passed) == len(sound), report
    assert "parameters of rank 1 against rank 0" in report.failed["AddsItsRank()"]
    assert "rank 1: ValueError: rank 1 only" in report.failed["FailsOnOneRank()"]
