"""The kit passes ours and fails a planted callback for every check, so that each check is shown to be able to fail."""

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_opt import registry
from lightning_opt.callbacks._ownership import check_no_scheduler, check_sole_owner
from lightning_opt.testing import ContractError, NotApplicable, callback_checks, check_callback
from lightning_opt.testing._callback_checks import CHECKS


class Bad(pl.Callback):
    """What the planted ones have in common: a state that is saved, and a good repr."""

    def __init__(self) -> None:
        self.count = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


class Untyped(Bad):
    def __init__(self, every=1) -> None:
        super().__init__()


class TakesATensor(Bad):
    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()


class NoRepr(pl.Callback):
    pass


class HasLog(Bad):
    def log(self):
        pass


class NumpyState(Bad):
    def state_dict(self):
        return {"count": np.float64(1)}


class Forgets(Bad):
    def on_train_batch_end(self, *_):
        self.count += 1

    def load_state_dict(self, state_dict):
        pass


class HoldsAFunction(Bad):
    def __init__(self) -> None:
        super().__init__()
        self.function = lambda: None


class CountsUnsaved(Bad):
    def on_train_batch_end(self, trainer, module, *_):
        self.count += 1
        module.log("count", float(self.count))

    def state_dict(self):
        return {}


class Nudges(Bad):
    """Changes the weights in the last bits."""

    def on_train_batch_end(self, trainer, module, *_):
        with torch.no_grad():
            next(module.parameters()).mul_(1 + 1e-6)


class Draws(Bad):
    def on_validation_end(self, *_):
        torch.rand(1)


class Waits(Bad):
    def on_train_batch_end(self, trainer, module, *_):
        self.total = next(module.parameters()).sum().item()


class ChangesEveryMicroBatch(Bad):
    def on_after_backward(self, trainer, module):
        for p in module.parameters():
            p.grad.add_(0.1)


class FailsWithClipping(Bad):
    def on_train_batch_start(self, trainer, *_):
        if trainer.gradient_clip_val:
            raise ValueError("no clipping, please")


class RefusesLate(Bad):
    def on_train_batch_end(self, trainer, *_):
        if "bf16" in trainer.precision:
            raise MisconfigurationException("refused too late")


class OneGroup(Bad):
    def on_train_start(self, trainer, module):
        (_,) = trainer.optimizers[0].param_groups


class NeedsGradients(Bad):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.norms = [p.grad.norm() for p in module.parameters()]


class KnowsNames(Bad):
    def on_train_start(self, trainer, module):
        self.weight = dict(module.named_parameters())["net.0.weight"].detach()


class Automatic(Bad):
    def on_train_batch_end(self, trainer, module, outputs, *_):
        assert module.automatic_optimization


class NeedsALength(Bad):
    def on_train_start(self, trainer, module):
        self.batches = int(trainer.num_training_batches)


class CountsValidations(Bad):
    def on_validation_end(self, *_):
        self.count += 1


class DependsOnTheLogger(Bad):
    def on_train_start(self, trainer, module):
        if trainer.logger is None:
            trainer.optimizers[0].param_groups[0]["lr"] *= 2


class LogsToTheFirst(Bad):
    def on_train_batch_end(self, trainer, *_):
        if trainer.logger is not None:
            trainer.logger.log_metrics({"bad/step": trainer.global_step}, step=trainer.global_step)


class AlwaysWrites(Bad):
    def on_fit_end(self, trainer, module):
        Path(trainer.default_root_dir, "file").write_text("")


class NoPrefix(Bad):
    def on_train_batch_end(self, trainer, module, *_):
        module.log("loss_of_mine", 1.0)


class TrainsOnTest(Bad):
    def on_test_start(self, trainer, module):
        with torch.no_grad():
            next(module.parameters()).zero_()


class HidesErrors(Bad):
    def on_exception(self, *_):
        raise KeyError("another")


class HalvesTheRate(Bad):
    def on_train_start(self, trainer, module):
        for group in trainer.optimizers[0].param_groups:
            group["lr"] /= 2


class MakesLargerBatches(Bad):
    def on_train_epoch_start(self, trainer, module):
        trainer.accumulate_grad_batches = 2


class SetsTheRate(Bad):
    owns = frozenset({"learning rate"})

    def on_before_optimizer_step(self, trainer, module, optimizer):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + trainer.global_step)


class SetsTheRateAlone(SetsTheRate):
    def setup(self, trainer, module, stage):
        check_sole_owner(trainer, self)

    def on_fit_start(self, trainer, module):
        check_no_scheduler(trainer, self)


class MakesLargerBatchesAlone(Bad):
    """Sound: from its second epoch on every step takes two batches of the loader."""

    owns = frozenset({"batch size"})

    def setup(self, trainer, module, stage):
        check_sole_owner(trainer, self)
        if stage == "fit" and trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException("MakesLargerBatchesAlone sets accumulate_grad_batches")
        if not module.automatic_optimization:
            raise MisconfigurationException("MakesLargerBatchesAlone needs automatic optimization")

    def on_train_epoch_start(self, trainer, module):
        trainer.accumulate_grad_batches = self.batches(trainer.current_epoch)

    def on_train_end(self, trainer, module):
        trainer.accumulate_grad_batches = 1

    def batches(self, epoch):
        return 1 if epoch == 0 else 2


class CutsTheLastWindowShort(MakesLargerBatchesAlone):
    """Lightning divides by 4 also where an epoch of 6 batches leaves only 2 for its last step."""

    def batches(self, epoch):
        return 4


class LeavesAHook(Bad):
    def on_fit_start(self, trainer, module):
        self.handle = module.net.register_forward_hook(lambda *_: None)

    def on_fit_end(self, *_):
        self.handle.remove()


class CountsRuns(Bad):
    def on_fit_start(self, *_):
        self.count += 1


PLANTED = {
    "arguments_are_typed": (Untyped, {}),
    "builds_from_a_config": (TakesATensor, {"weights": torch.zeros(2)}),
    "repr_names_the_arguments": (NoRepr, {}),
    "leaves_the_name_log_free": (HasLog, {}),
    "state_is_tensors_and_builtins": (NumpyState, {}),
    "loaded_state_is_the_saved_one": (Forgets, {}),
    "copies_and_pickles": (HoldsAFunction, {}),
    "resumes_exactly": (CountsUnsaved, {}),
    "leaves_no_trace": (Nudges, {}),
    "uses_no_random_state": (Draws, {}),
    "waits_for_nothing_between_logged_steps": (Waits, {}),
    "accumulates_gradients": (ChangesEveryMicroBatch, {}),
    "trains_with_clipping": (FailsWithClipping, {}),
    "trains_in_mixed_precision": (RefusesLate, {}),
    "trains_several_groups": (OneGroup, {}),
    "trains_with_frozen_parameters": (NeedsGradients, {}),
    "trains_a_compiled_network": (KnowsNames, {}),
    "trains_by_manual_optimization": (Automatic, {}),
    "trains_on_data_without_length": (NeedsALength, {}),
    "ignores_the_sanity_check": (CountsValidations, {}),
    "decides_alike_without_a_logger": (DependsOnTheLogger, {}),
    "logs_to_every_logger": (LogsToTheFirst, {}),
    "runs_fast_dev_run": (AlwaysWrites, {}),
    "sets_only_what_it_owns": (HalvesTheRate, {}),
    "refuses_a_second_owner": (SetsTheRate, {}),
    "does_not_overrule_a_schedule_silently": (SetsTheRate, {}),
    "logs_under_its_prefix": (NoPrefix, {}),
    "evaluates_alone": (TrainsOnTest, {}),
    "an_error_passes_through": (HidesErrors, {}),
    "removes_its_hooks": (LeavesAHook, {}),
    "fits_again_after_an_error": (CountsRuns, {}),
}


@pytest.fixture
def registered(monkeypatch):
    """Registers a class for the time of a test."""
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))

    def register(cls, **kwargs):
        registry.register("callback", summary="planted", **kwargs)(cls)

    return register


@pytest.mark.parametrize("name", CHECKS)
def test_each_check_fails_a_planted_callback(name, registered):
    cls, kwargs = PLANTED[name]
    if name in ("leaves_no_trace", "waits_for_nothing_between_logged_steps"):
        registered(cls, capabilities=("observer",))
    with pytest.raises(ContractError, match=f"{name}: "):
        dict(callback_checks(cls, **kwargs))[name]()


def test_a_clear_refusal_is_accepted_and_an_observer_is_asked_more(registered):
    class Refuses(Bad):
        def setup(self, trainer, module, stage):
            if trainer.gradient_clip_val:
                raise MisconfigurationException("Refuses cannot clip")

    checks = dict(callback_checks(Refuses))
    with pytest.raises(NotApplicable, match="Refuses cannot clip"):
        checks["trains_with_clipping"]()
    with pytest.raises(NotApplicable, match="observer"):
        checks["leaves_no_trace"]()
    nudged = dict(callback_checks(Nudges))
    nudged["trains_several_groups"]()
    registered(Nudges, capabilities=("observer",))
    with pytest.raises(ContractError, match="with the callback against without"):
        dict(callback_checks(Nudges))["trains_several_groups"]()


@pytest.mark.parametrize("cls", [SetsTheRateAlone, MakesLargerBatchesAlone])
def test_owners_that_keep_their_promises_pass(cls):
    report = check_callback(cls)
    assert {"sets_only_what_it_owns", "refuses_a_second_owner", "accumulates_gradients"} <= {
        *report.passed,
        *report.not_applicable,
    }
    assert "resumes_exactly" in report.passed


@pytest.mark.parametrize(
    ("cls", "name", "message"),
    [
        (MakesLargerBatches, "sets_only_what_it_owns", "its steps have .2, 2, 2"),
        (CutsTheLastWindowShort, "accumulates_gradients", "from steps of the mean over their examples"),
    ],
)
def test_owners_that_break_them_fail(cls, name, message):
    with pytest.raises(ContractError, match=message):
        dict(callback_checks(cls))[name]()


def test_a_report_names_what_failed():
    with pytest.raises(ContractError) as caught:
        check_callback(HasLog)
    assert set(caught.value.report.failed) == {"leaves_the_name_log_free"}
    assert "it has log" in str(caught.value)
