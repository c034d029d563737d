"""The kit passes a sound scheduler and fails a planted one for every check."""

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from lightning_opt.schedules import LinearDecayLR
from lightning_opt.schedules._base import StepSchedule
from lightning_opt.testing import ContractError, NotApplicable, check_scheduler, scheduler_checks

CHECKS = [name for name, _ in scheduler_checks(StepLR, step_size=4)]


class Untyped(LinearDecayLR):
    def __init__(self, optimizer, total_steps=12):
        super().__init__(optimizer, total_steps)


class TakesATensor(LinearDecayLR):
    def __init__(self, optimizer, total_steps: torch.Tensor, last_epoch: int = -1):
        super().__init__(optimizer, int(total_steps), last_epoch=last_epoch)


class Terse(LinearDecayLR):
    def __repr__(self):
        return "Terse()"


class NoInterval(LinearDecayLR):
    interval = None


class TakesAnyNumber(StepSchedule):
    def __init__(self, optimizer, total_steps: int = 12, last_epoch: int = -1):
        super().__init__(optimizer, total_steps, "hold", last_epoch)

    def rate(self, step, base, group):
        return base * (1 - 0.01 * step)


class TakesAnyEpoch(LinearDecayLR):
    def __init__(self, optimizer, total_steps: int = 12, last_epoch: int = -1):
        super().__init__(optimizer, total_steps, last_epoch=max(-1, last_epoch))


class SetsNothingAtFirst(LinearDecayLR):
    def _initial_step(self):
        self._step_count = 1
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


class EndsAtZero(LinearDecayLR):
    """As the paper's index has it."""

    def rate(self, step, base, group):
        return base * (1 - step / (self.total_steps - 1))


class ReportsTheBase(LinearDecayLR):
    def get_last_lr(self):
        return list(self.base_lrs)


class SetsTheFirstGroupOnly(LinearDecayLR):
    def rate(self, step, base, group):
        return super().rate(step, self.base_lrs[0], group)


class ReplacesTensors(LinearDecayLR):
    def step(self, epoch=None):
        super().step(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = float(group["lr"])


class Draws(LinearDecayLR):
    def rate(self, step, base, group):
        return super().rate(step, base, group) * (1 + 0.1 * torch.rand(()).item())


class FollowsTheGradient(LinearDecayLR):
    def rate(self, step, base, group):
        return super().rate(step, base, group) / group["params"][0].grad.norm().item()


class GoesNegative(LinearDecayLR):
    def rate(self, step, base, group):
        return base * (1 - self.last_epoch / 12)

    ends = False


class RunsOutOfValues(LinearDecayLR):
    def rate(self, step, base, group):
        return base * ([0.5] * 13)[self.last_epoch]

    ends = False


class CountsCalls(LinearDecayLR):
    """Not by last_epoch, which others set too."""

    def rate(self, step, base, group):
        self.calls = getattr(self, "calls", -1) + 1
        return super().rate(min(self.calls, 12), base, group)


class Foreign:
    pass


class HoldsAnObject(LinearDecayLR):
    def __init__(self, optimizer, total_steps: int = 12, last_epoch: int = -1):
        self.thing = Foreign()
        super().__init__(optimizer, total_steps, last_epoch=last_epoch)


class Forgets(LinearDecayLR):
    def load_state_dict(self, state_dict):
        pass


class HoldsAFunction(LinearDecayLR):
    def __init__(self, optimizer, total_steps: int = 12, last_epoch: int = -1):
        self.function = lambda: None
        super().__init__(optimizer, total_steps, last_epoch=last_epoch)


class SkipsARate(LinearDecayLR):
    """Steps twice at its second step."""

    def step(self, epoch=None):
        super().step(epoch)
        if self.last_epoch == 2 and self.optimizer.param_groups[0]["params"][0].ndim == 2:
            super().step(epoch)


class ForgetsWhereItWas(LinearDecayLR):
    def load_state_dict(self, state_dict):
        super().load_state_dict({**state_dict, "last_epoch": state_dict["last_epoch"] - 1})


T = {"total_steps": 12}
PLANTED = {
    "arguments_are_typed": (Untyped, T),
    "builds_from_a_config": (TakesATensor, {"total_steps": torch.tensor(12)}),
    "repr_names_the_arguments": (Terse, T),
    "says_its_interval": (NoInterval, T),
    "refuses_wrong_numbers_of_steps": (TakesAnyNumber, T),
    "refuses_a_wrong_last_epoch": (TakesAnyEpoch, T),
    "the_first_rate_is_set_at_once": (SetsNothingAtFirst, {**T, "warmup_steps": 3}),
    "no_step_is_wasted": (EndsAtZero, T),
    "the_last_rates_are_those_of_the_groups": (ReportsTheBase, T),
    "groups_keep_their_own_rates": (SetsTheFirstGroupOnly, T),
    "tensor_lr_equals_float_lr": (ReplacesTensors, T),
    "depends_on_the_step_alone": (Draws, T),
    "steps_beyond_the_end_are_defined": (GoesNegative, T),
    "works_in_a_sequence": (CountsCalls, T),
    "state_is_tensors_and_builtins": (HoldsAnObject, T),
    "loaded_state_continues_exactly": (Forgets, T),
    "last_epoch_continues_exactly": (CountsCalls, T),
    "copies_and_pickles_continue_exactly": (HoldsAFunction, T),
    "steps_once_an_optimizer_step": (SkipsARate, T),
    "resumes_exactly": (ForgetsWhereItWas, T),
}


@pytest.mark.parametrize("name", CHECKS)
def test_each_check_fails_a_planted_scheduler(name):
    cls, kwargs = PLANTED[name]
    with pytest.raises(ContractError, match=f"^{name}: .* But: "):
        dict(scheduler_checks(cls, **kwargs))[name]()


@pytest.mark.parametrize(
    ("cls", "name"),
    [(FollowsTheGradient, "depends_on_the_step_alone"), (RunsOutOfValues, "steps_beyond_the_end_are_defined")],
)
def test_other_defects_are_found_too(cls, name):
    with pytest.raises(ContractError, match=f"^{name}: "):
        dict(scheduler_checks(cls, **T))[name]()


def test_a_sound_scheduler_passes_and_the_random_state_stays():
    before = torch.get_rng_state()
    report = check_scheduler(LinearDecayLR, total_steps=12)
    assert torch.equal(torch.get_rng_state(), before)
    assert set(report.passed) == set(CHECKS)


def test_options_that_do_not_exist_are_not_applicable():
    with pytest.raises(NotApplicable, match="StepLR takes no number of steps"):
        dict(scheduler_checks(StepLR, step_size=4))["refuses_wrong_numbers_of_steps"]()
