"""The kit fails a planted strategy for every check, so that each check is shown to be able to fail."""

import multiprocessing

import pytest
import torch

from lightning_opt.testing import ContractError, NotApplicable, TwoRanks, check_strategy, strategy_checks
from lightning_opt.testing._strategy_checks import CHECKS
from tests.testing import defective_strategies as defective

PLANTED = {
    "arguments_are_typed": (defective.Untyped, {}),
    "builds_from_a_config": (defective.TakesATensor, {"weights": torch.zeros(2)}),
    "has_a_name": (defective.Nameless, {}),
    "refuses_wrong_values": (defective.TakesAnything, {}),
    "pickles": (defective.HoldsAFunction, {}),
    "trains_alike_on_every_rank": (defective.NeverSynchronizes, {}),
    "uses_no_random_state": (defective.Draws, {}),
    "agrees_about_a_loss_that_is_not_finite": (defective.SkipsAlone, {}),
    "leaves_the_module_alone": (defective.LeavesAHook, {}),
    "state_is_tensors_and_builtins": (defective.NumpyState, {}),
    "resumes_exactly": (defective.CountsUnsaved, {}),
    "accumulates_gradients": (defective.ChangesEveryMicroBatch, {}),
    "trains_with_clipping": (defective.GoesFurther, {}),
    "trains_in_mixed_precision": (defective.RefusesLate, {}),
    "trains_several_groups": (defective.OneGroup, {}),
    "trains_with_frozen_parameters": (defective.TrainsFrozen, {}),
    "answers_unused_parameters": (defective.HidesUnused, {}),
    "answers_sparse_gradients": (defective.NeedsDenseGradients, {}),
    "trains_a_compiled_network": (defective.KnowsNames, {}),
    "trains_by_manual_optimization": (defective.NeedsALoss, {}),
    "trains_on_data_without_length": (defective.NeedsALength, {}),
    "ignores_the_sanity_check": (defective.CountsValidations, {}),
    "decides_alike_without_a_logger": (defective.DependsOnTheLogger, {}),
    "logs_under_its_prefix": (defective.NoPrefix, {}),
    "runs_fast_dev_run": (defective.AlwaysWrites, {}),
    "evaluates_alone": (defective.TrainsOnTest, {}),
    "an_error_passes_through": (defective.HidesErrors, {}),
    "fits_again_after_an_error": (defective.CountsRuns, {}),
    "fits_again_by_one_trainer": (defective.CountsUnsaved, {}),
}


@pytest.fixture(scope="module")
def ranks():
    with TwoRanks(patience=10) as two:
        yield two


@pytest.mark.parametrize("name", CHECKS)
def test_each_check_fails_a_planted_strategy(name, ranks):
    cls, kwargs = PLANTED[name]
    with pytest.raises(ContractError, match=f"^{name}: ") as caught:
        dict(strategy_checks(cls, ranks, **kwargs))[name]()
    print(caught.value)


def test_a_clear_refusal_is_accepted(ranks):
    checks = dict(strategy_checks(defective.RefusesManualOptimization, ranks))
    with pytest.raises(NotApplicable, match="needs automatic optimization"):
        checks["trains_by_manual_optimization"]()


def test_a_report_names_what_failed(monkeypatch):
    for name in set(CHECKS) - {"arguments_are_typed", "pickles", "has_a_name"}:
        monkeypatch.delitem(CHECKS, name)
    with pytest.raises(ContractError) as caught:
        check_strategy(defective.Nameless)
    assert set(caught.value.report.failed) == {"has_a_name"}
    assert caught.value.report.passed == ("arguments_are_typed", "pickles")


def test_a_rank_that_fails_alone_is_named_and_both_are_ended(ranks):
    with pytest.raises(ContractError, match="rank 0 does not answer; rank 1 raised ValueError: rank 1 only"):
        dict(strategy_checks(defective.FailsOnOneRank, ranks))["trains_alike_on_every_rank"]()
    assert multiprocessing.active_children() == []
