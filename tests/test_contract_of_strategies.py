"""Every check of the strategies' contract over every registered strategy, and over Lightning's DDP.

The settings to check with stand in the ``settings`` of each strategy's own test file: a dict from registered names to
the constructor's arguments, or to a list of them. One pair of processes serves all.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy

from lightning_opt import registry
from lightning_opt.testing import TwoRanks, strategy_checks
from tests.collected import collect_settings
from tests.contract_case import Case

registry.load_all()

# What a strategy does not do, or refuses in setup.
WITHOUT_GRADIENTS = {"accumulates_gradients", "trains_with_clipping", "trains_by_manual_optimization"}
COMPRESSED = {"answers_unused_parameters", "answers_sparse_gradients"}
NOT_APPLICABLE = {
    "CBOStrategy": {*WITHOUT_GRADIENTS, "answers_unused_parameters"},
    "DeepGAStrategy": WITHOUT_GRADIENTS,
    "EControlStrategy": COMPRESSED,
    "EF14Strategy": COMPRESSED,
    "EF21Strategy": COMPRESSED,
    "FZooSStrategy": {
        *WITHOUT_GRADIENTS,
        *("answers_unused_parameters", "agrees_about_a_loss_that_is_not_finite"),
    },
    "NaiveCompressionStrategy": COMPRESSED,
}
# A genetic algorithm mutates every parameter; those without effect drift.
FAILURES = {"DeepGAStrategy": {"answers_unused_parameters": "unused.weight, which the loss does not depend on"}}

STRATEGIES = {entry.name: entry for entry in registry.entries("strategy")}
SETTINGS = collect_settings(Path(__file__).parent / "strategies")


def _ours(name: str, kwargs: dict[str, Any]) -> Case:
    not_applicable = set(NOT_APPLICABLE.get(name, ()))
    if kwargs.get("weights") == "auto":  # it asks training_step for a loss beforehand
        not_applicable.add("trains_by_manual_optimization")
    return Case(STRATEGIES[name].target, kwargs, frozenset(not_applicable), FAILURES.get(name, {}))


CASES = {
    **{
        f"{name}-{i}": _ours(name, kwargs)
        for name, several in SETTINGS.items()
        for i, kwargs in enumerate(several)
        if name in STRATEGIES
    },
    "lightning-DDPStrategy": Case(
        DDPStrategy,
        {"process_group_backend": "gloo"},
        frozenset({"answers_unused_parameters", "logs_under_its_prefix"}),
        {"refuses_wrong_values": "model_averaging_period=nan is accepted"},
    ),
}
CHECKS = [name for name, _ in strategy_checks(DDPStrategy, TwoRanks())]


@pytest.fixture(scope="module")
def ranks() -> Iterator[TwoRanks]:
    with TwoRanks() as two:
        yield two


@functools.cache
def checks_of(label: str, ranks: TwoRanks) -> dict[str, Callable[[], None]]:
    return dict(strategy_checks(CASES[label].cls, ranks, **CASES[label].kwargs))


@pytest.mark.parametrize("label", CASES)
@pytest.mark.parametrize("check", CHECKS)
def test_contract(label: str, check: str, ranks: TwoRanks) -> None:
    CASES[label].expect(check, checks_of(label, ranks)[check])


def test_every_strategy_has_settings() -> None:
    assert set(SETTINGS) == set(STRATEGIES)
