import importlib
import re
from pathlib import Path

import pytest
import torch

from lightning_opt.optim import AdaBelief, ExponentiatedSGD
from lightning_opt.testing import ContractError, NotApplicable, check_optimizer, optimizer_checks

NAMES = [name for name, _ in optimizer_checks(AdaBelief)]


@pytest.fixture(scope="module")
def defective():
    """Importable by name, as pickling needs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        return importlib.import_module("defective_optimizers").DEFECTIVE


@pytest.mark.parametrize("name", NAMES)
def test_every_check_can_fail(name, defective):
    assert defective[name], "no optimizer with this defect"
    for cls in defective[name]:
        lr = 0.1 if issubclass(cls, ExponentiatedSGD) else 1e-2
        with pytest.raises(ContractError, match=f"^{name}: .* But: "):
            dict(optimizer_checks(cls, lr=lr))[name]()


def test_every_defect_belongs_to_a_check(defective):
    assert set(defective) == set(NAMES)


def test_sound_optimizer_passes_and_the_random_state_stays():
    before = torch.get_rng_state()
    report = check_optimizer(AdaBelief, lr=1e-2)
    assert torch.equal(torch.get_rng_state(), before)
    assert not report.failed
    assert report.not_applicable == {"refuses_wrong_momentum": "AdaBelief takes no option 'momentum'"}
    assert set(report.passed) | set(report.not_applicable) == set(NAMES)


def test_all_failures_are_reported_together():
    class Broken(torch.optim.SGD):
        def __repr__(self):
            return ""

        def zero_grad(self, set_to_none=True):
            raise KeyError("grad")

    with pytest.raises(ContractError) as caught:
        check_optimizer(Broken, lr=0.05)
    report = caught.value.report
    assert {"repr_names_the_options", "frozen_parameters_stay", "refuses_wrong_lr"} <= set(report.failed)
    assert "not applicable" in str(report)
    assert "refuses_wrong_betas: Broken takes no option 'betas'" in str(caught.value)
    assert re.search(r"failed +refuses_wrong_lr: .*lr=nan is accepted", str(caught.value))
    assert re.search(r"failed +frozen_parameters_stay: .* raised KeyError: 'grad'", str(caught.value))


def test_options_that_do_not_exist_are_not_applicable():
    with pytest.raises(NotApplicable, match="SGD takes no option 'betas'"):
        dict(optimizer_checks(torch.optim.SGD))["refuses_wrong_betas"]()


def test_options_behind_keyword_arguments_count():
    class Forwards(AdaBelief):
        def __init__(self, params, **kwargs):
            super().__init__(params, **kwargs)

    with pytest.raises(NotApplicable, match="momentum"):
        dict(optimizer_checks(Forwards, lr=1e-2))["refuses_wrong_momentum"]()
    for name in ("refuses_wrong_eps", "fused_matches_the_loop", "maximize_is_minimize_of_the_negative"):
        dict(optimizer_checks(Forwards, lr=1e-2))[name]()
