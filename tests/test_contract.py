"""Every check of the optimizers' contract over every registered optimizer, and over optimizers of other packages.

The settings to check with stand in the ``settings`` of each method's own test file: a dict from registered names to the
constructor's arguments, or to a list of them.
"""

import functools
import importlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_optimizer
import torch

from lightning_opt import registry
from lightning_opt.testing import ContractError, NotApplicable, check_optimizers_ddp, optimizer_checks
from tests.collected import collect_settings
from tests.contract_case import Case

registry.load_all()


SETTINGS = collect_settings(Path(__file__).parent / "optim")
OPTIMIZERS = {entry.name: entry for entry in registry.entries("optimizer")}

# Options that a method does not have; fused kernels are left to test_fused_where_registered.
NOT_APPLICABLE = {
    "AdaBelief": {"refuses_wrong_momentum"},
    "DiffGrad": {"refuses_wrong_momentum"},
    "AdaGradNorm": {
        *("refuses_wrong_betas", "refuses_wrong_eps", "refuses_wrong_momentum", "groups_have_their_own_options"),
        # one norm of all gradients
        *("groups_can_be_added_while_training", "missing_gradients_are_skipped", "many_small_tensors_work"),
        "dtypes_may_be_mixed",
    },
    "EGPlusMinus": {"refuses_wrong_betas", "refuses_wrong_eps", "refuses_wrong_weight_decay"},
    "ExponentiatedAdamW": {"refuses_wrong_momentum"},
    "ExponentiatedSGD": {"refuses_wrong_betas", "refuses_wrong_eps"},
    "Lion": {"refuses_wrong_eps", "refuses_wrong_momentum"},
    "LionK": {"refuses_wrong_eps", "refuses_wrong_momentum"},
    "MirrorSGD": {
        "refuses_wrong_betas",
        "refuses_wrong_eps",
        "refuses_wrong_momentum",
        "refuses_wrong_weight_decay",
    },
    "ProxSGD": {"refuses_wrong_betas", "refuses_wrong_eps", "refuses_wrong_momentum"},
}

TORCH_FAILURES = {
    "refuses_wrong_values_in_groups": "lr=-1 in a group is accepted",
    # fused=True reads gradients in memory order, whatever their strides
    "layout_in_memory_does_not_matter": "backend fused: tensor 0 differs",
    "expanded_gradients_work": "backend fused: tensor 0 differs",
}
PEER_FAILURES = {
    "repr_names_the_options": "not in repr: .*maximize",
    "refuses_wrong_lr": "lr=-1.0 raises NegativeLRError, not ValueError",
    "refuses_wrong_weight_decay": "weight_decay=nan is accepted",
    "refuses_wrong_values_in_groups": "lr=-1 in a group is accepted",
    "gradients_are_left_alone": "'maximize': True",  # negated in place
    # torch's Optimizer pickles its state and groups only; these keep options elsewhere
    "pickled_optimizer_continues_exactly": "has no attribute",
    "copied_optimizer_continues_exactly": "has no attribute",
    "state_of_bfloat16_parameters_is_float32": "exp_avg is torch.bfloat16",
}
NOT_IN_PEERS = {
    "refuses_wrong_momentum",
    "groups_of_a_module_are_complete",
    "fused_matches_the_loop",
    "fused_and_foreach_exclude_each_other",
    "capturable_gives_the_same_numbers",
    "differentiable_steps_have_the_right_derivative",
    "differentiable_steps_have_the_right_derivative_in_lr",
}
NOT_IN_SGD = {
    "refuses_wrong_betas",
    "refuses_wrong_eps",
    "groups_of_a_module_are_complete",
    "capturable_gives_the_same_numbers",
}
SGD_FAILURES = {
    **TORCH_FAILURES,
    "refuses_wrong_lr": "lr=nan is accepted",
    "refuses_wrong_weight_decay": "weight_decay=nan is accepted",
    "refuses_wrong_momentum": "momentum=nan is accepted",
}
CASES = {
    **{
        f"{name}-{i}": Case(OPTIMIZERS[name].target, kwargs, frozenset(NOT_APPLICABLE.get(name, ())))  # type: ignore[arg-type]
        for name, several in SETTINGS.items()
        for i, kwargs in enumerate(several)
        if name in OPTIMIZERS
    },
    "torch-AdamW": Case(
        torch.optim.AdamW,
        {"lr": 1e-2},
        # capturable needs an accelerator there
        frozenset({"refuses_wrong_momentum", "groups_of_a_module_are_complete", "capturable_gives_the_same_numbers"}),
        {
            **TORCH_FAILURES,
            "state_of_bfloat16_parameters_is_float32": "exp_avg is torch.bfloat16, exp_avg_sq is torch.bfloat16",
        },
    ),
    "torch-SGD": Case(torch.optim.SGD, {"lr": 0.05}, frozenset(NOT_IN_SGD), SGD_FAILURES),
    "torch-SGD-momentum": Case(
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.9},
        frozenset(NOT_IN_SGD),
        {
            **SGD_FAILURES,
            "state_of_bfloat16_parameters_is_float32": "momentum_buffer is torch.bfloat16",
            # the first momentum is a detached copy of the gradient
            "differentiable_steps_have_the_right_derivative": "with respect to input 2",
        },
    ),
    "pytorch_optimizer-AdaBelief": Case(
        pytorch_optimizer.AdaBelief,
        {"lr": 1e-2},
        frozenset({*NOT_IN_PEERS, "tensor_lr_equals_float_lr"}),
        {
            **PEER_FAILURES,
            "refuses_wrong_eps": "eps=nan is accepted",
            "missing_gradients_are_skipped": "given only the others",  # one step count for the whole group
        },
    ),
    "pytorch_optimizer-Lion": Case(
        pytorch_optimizer.Lion,
        {"lr": 1e-2},
        frozenset({*NOT_IN_PEERS, "refuses_wrong_eps"}),
        {
            **PEER_FAILURES,
            # torch.sign(nan) is 0
            "nan_gradients_show_and_stay_where_they_are": "as if nothing had happened",
            "infinite_gradients_do_not_hide_in_the_state": "the state is .nan., the parameter finite",
        },
    ),
}
CHECKS = [name for name, _ in optimizer_checks(torch.optim.SGD)]


@functools.cache
def checks_of(label: str) -> dict[str, Callable[[], None]]:
    return dict(optimizer_checks(CASES[label].cls, **CASES[label].kwargs))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("label", CASES)
@pytest.mark.parametrize("check", CHECKS)
def test_contract(label, check):
    CASES[label].expect(check, checks_of(label)[check], excuse="no fused kernel" if "fused" in check else None)


def test_every_optimizer_has_settings():
    assert set(SETTINGS) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_where_registered(name):
    applied = []
    for i in range(len(SETTINGS[name])):
        try:
            checks_of(f"{name}-{i}")["fused_matches_the_loop"]()
        except NotApplicable:
            continue
        applied.append(i)
    assert bool(applied) == ("fused" in OPTIMIZERS[name].capabilities)


def test_two_ranks_agree():
    """One pair of processes for all, with optimizers among them that must fail."""
    sound = [(case.cls, case.kwargs) for case in CASES.values()]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent / "testing")  # so that the ranks can import it
        defective = importlib.import_module("defective_optimizers")
        bad = [(defective.RanksDisagree, {"lr": 1e-2}), (defective.FailsOnOneRank, {"lr": 1e-2})]
        with pytest.raises(ContractError) as caught:
            check_optimizers_ddp([*sound, *bad, (torch.optim.SGD, {"lr": 0.01})])
    report = caught.value.report
    assert len(report.passed) == len(sound), report
    disagree, fails, after = report.failed.items()
    assert disagree[0] == "RanksDisagree(lr=0.01)"
    assert re.search("rank 0 against rank 1: tensor 0 differs by .*e-0", disagree[1])
    assert fails[0] == "FailsOnOneRank(lr=0.01)"
    assert after[0] == "SGD(lr=0.01)"
    assert "not run, since one before it failed" in after[1]


def test_missing_settings_are_noticed(tmp_path):
    (tmp_path / "test_a.py").write_text('settings = {"A": {"lr": 1}, "B": [{"lr": 2}, {"lr": 3}]}\n')
    (tmp_path / "test_b.py").write_text("import math\n")
    assert collect_settings(tmp_path) == {"A": [{"lr": 1}], "B": [{"lr": 2}, {"lr": 3}]}
    (tmp_path / "test_b.py").write_text('settings = {"A": {}}\n')
    with pytest.raises(AssertionError, match="test_b.py has settings for A"):
        collect_settings(tmp_path)
