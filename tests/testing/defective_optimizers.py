"""AdaBelief with one defect a class, each made to fail the check that it is entered under."""

import collections
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from lightning_opt.optim import AdaBelief, ExponentiatedSGD
from lightning_opt.optim._base import Optimizer
from lightning_opt.optim._tensor_list import TensorList

DEFECTIVE: dict[str, list[type[torch.optim.Optimizer]]] = collections.defaultdict(list)


def fails(*checks: str) -> Callable[[type], type]:
    def decorate(cls: type) -> type:
        for check in checks:
            DEFECTIVE[check].append(cls)
        return cls

    return decorate


class Defective(AdaBelief):
    """AdaBelief with a place for something wrong before the update, when gradients are final, and after it."""

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            params = [p for group in self.param_groups for p in group["params"]]
            self.before([p for p in params if p.grad is not None])
            Optimizer.step(self)
            self.after([p for p in params if p.grad is not None])
        return loss

    def before(self, params: list[nn.Parameter]) -> None:
        pass

    def after(self, params: list[nn.Parameter]) -> None:
        pass


# --- constructor ---


@fails("arguments_are_typed")
class Untyped(AdaBelief):
    def __init__(self, params, lr: float = 1e-2, damping=None):
        super().__init__(params, lr)


@fails("builds_from_a_config")
class WronglyTyped(AdaBelief):
    def __init__(self, params, lr: float = 1e-2, betas: float = (0.9, 0.999)):
        super().__init__(params, lr, betas)


@fails("repr_names_the_options")
class Terse(AdaBelief):
    def __repr__(self):
        return "Terse(lr)"


@fails("refuses_no_parameters")
class TakesNothing(AdaBelief):
    def __init__(self, params, lr: float = 1e-2):
        super().__init__(list(params) or [nn.Parameter(torch.zeros(1))], lr)


@fails("refuses_wrong_lr", "refuses_wrong_values_in_groups")
class TakesAnyRate(AdaBelief):
    def _validate_options(self, group):
        pass


@fails("refuses_wrong_values_in_groups")
class ChecksDefaultsOnly(AdaBelief):
    def add_param_group(self, param_group):
        torch.optim.Optimizer.add_param_group(self, param_group)


@fails("refuses_wrong_betas", "refuses_wrong_eps", "refuses_wrong_weight_decay")
class TakesAnyNumber(AdaBelief):
    def validate(self, group):
        pass


@fails("refuses_wrong_eps")
class SpeaksInRiddles(AdaBelief):
    def validate(self, group):
        if not group["eps"] >= 0:
            raise ValueError("invalid value")


@fails("refuses_wrong_momentum")
class TakesAnyMomentum(ExponentiatedSGD):
    def validate(self, group):
        pass


@fails("takes_named_parameters")
class DropsNames(AdaBelief):
    def __init__(self, params, lr: float = 1e-2):
        super().__init__([p[1] if isinstance(p, tuple) else p for p in params], lr)


@fails("groups_of_a_module_are_complete")
class ForgetsBiases(AdaBelief):
    @classmethod
    def param_groups_for(cls, module):
        return super().param_groups_for(module)[:1]


# --- updates ---


@fails("decreases_a_quadratic", "decreases_rosenbrock")
class Ascends(AdaBelief):
    def __init__(self, params, lr: float = 1e-2):
        super().__init__(params, lr, maximize=True)


@fails("groups_have_their_own_options")
class OneRateForAll(Defective):
    def before(self, params):
        for group in self.param_groups:
            group["lr"] = self.param_groups[0]["lr"]


@fails("groups_can_be_added_while_training")
class ForgetsWhenExtended(AdaBelief):
    def add_param_group(self, param_group):
        self.state.clear()
        super().add_param_group(param_group)


@fails("missing_gradients_are_skipped")
class MissingIsZero(AdaBelief):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return super().step(closure)


@fails("missing_gradients_are_skipped")
class CountsStepsOfTheGroup(Defective):
    def before(self, params):
        group = self.param_groups[0]
        group["count"] = group.get("count", 0) + 1
        for p in params:
            if p in self.state:
                self.state[p]["step"].fill_(group["count"] - 1)


@fails("frozen_parameters_stay")
class DecaysFrozen(Defective):
    def after(self, params):
        for group in self.param_groups:
            torch._foreach_mul_(group["params"], 0.99)


@fails("closure_runs_with_gradients_and_its_loss_is_returned")
class ClosureWithoutGradients(AdaBelief):
    def step(self, closure=None):
        loss = None if closure is None else closure()
        super().step()
        return loss


@fails("closure_runs_with_gradients_and_its_loss_is_returned")
class LosesTheLoss(Defective):
    def step(self, closure=None):
        super().step(closure)


@fails("closure_is_called_once")
class CallsTwice(AdaBelief):
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        return super().step(closure)


@fails("closure_comes_before_the_gradients_are_read")
class StepsBeforeTheClosure(AdaBelief):
    def step(self, closure=None):
        super().step()
        return None if closure is None else closure()


@fails("step_hooks_fire_once")
class NeverHooked(AdaBelief):
    def step(self, closure=None):
        return Optimizer.step(self, closure)

    step.hooked = True


@fails("gradients_are_left_alone")
class DecaysIntoTheGradient(Defective):
    def before(self, params):
        for p in params:
            p.grad.add_(p, alpha=1e-3)


@fails("gradients_are_left_alone")
class ReplacesGradients(Defective):
    def after(self, params):
        for p in params:
            p.grad = p.grad.clone()


@fails("gradient_buffers_may_be_reused")
class KeepsTheGradientItself(Defective):
    def before(self, params):
        for p in params:
            previous = self.state[p].pop("previous", None)
            kept = p.grad
            p.grad = kept if previous is None else kept + 0.5 * previous
            self.kept = {**getattr(self, "kept", {}), p: kept}

    def after(self, params):
        for p in params:
            self.state[p]["previous"] = self.kept[p]


@fails("global_random_state_is_left_alone")
class Noisy(Defective):
    def before(self, params):
        for p in params:
            p.grad = p.grad + 0.01 * torch.randn_like(p)


@fails("maximize_is_minimize_of_the_negative")
class NeverMaximizes(Defective):
    def before(self, params):
        for group in self.param_groups:
            group["maximize"] = False


@fails("scheduled_lr_acts")
class RemembersTheRate(Defective):
    def before(self, params):
        for group in self.param_groups:
            group["lr"] = self.defaults["lr"]


@fails("tensor_lr_equals_float_lr")
class ReadsTensorRateOnce(AdaBelief):
    def __init__(self, params, lr: float | Tensor = 1e-2):
        super().__init__(params, float(lr))


# --- backends ---


@fails("foreach_matches_the_loop")
class WrongForeach(AdaBelief):
    @staticmethod
    def update(p, g, state, c, **flags):
        size = c.size * (1 + 1e-5) if isinstance(g, TensorList) else c.size
        AdaBelief.update(p, g, state, SimpleNamespace(**{**vars(c), "size": size}), **flags)


@fails("fused_matches_the_loop", "default_backend_matches_the_loop")
class WrongFused(AdaBelief):
    def _step_fused(self, kernels, group, batch):
        super()._step_fused(kernels, {**group, "lr": group["lr"] * (1 + 1e-5)}, batch)


@fails("fused_and_foreach_exclude_each_other")
class TakesBoth(AdaBelief):
    def __init__(self, params, lr: float = 1e-2, foreach: bool | None = None, fused: bool | None = None):
        super().__init__(params, lr, foreach=foreach, fused=None if foreach else fused)


@fails("capturable_gives_the_same_numbers")
class CountsAheadOnDevice(AdaBelief):
    def coefficients(self, step, lr, group):
        return super().coefficients(step + 1 if group["capturable"] else step, lr, group)


@fails("differentiable_steps_have_the_right_derivative")
class DetachesGradients(AdaBelief):
    @staticmethod
    def update(p, g, state, c, **flags):
        AdaBelief.update(p, g.detach(), state, c, **flags)


@fails("differentiable_steps_have_the_right_derivative_in_lr")
class DetachesTheRate(AdaBelief):
    def coefficients(self, step, lr, group):
        return super().coefficients(step, lr.detach() if isinstance(lr, Tensor) else lr, group)


# --- kinds of tensors ---


@fails("sparse_gradients_work_or_are_refused")
class SkipsSparse(AdaBelief):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None if p.grad.is_sparse else p.grad
        return super().step(closure)


@fails("sparse_gradients_work_or_are_refused")
class CrashesOnSparse(Defective):
    def before(self, params):
        if any(p.grad.is_sparse for p in params):
            raise RuntimeError("internal error")


@fails("complex_parameters_work_or_are_refused")
class DropsImaginaryParts(Defective):
    def before(self, params):
        for p in params:
            p.grad = torch.complex(p.grad.real, torch.zeros_like(p.grad.real)) if p.is_complex() else p.grad


@fails("layout_in_memory_does_not_matter")
class ReadsMemoryInOrder(Defective):
    def before(self, params):
        for p in params:
            p.grad = p.grad.as_strided(p.shape, torch.empty(p.shape).stride())


@fails("expanded_gradients_work")
class WritesIntoGradients(Defective):
    def before(self, params):
        for p in params:
            p.grad.mul_(1.0)


@fails("scalars_and_empty_tensors_work_or_are_refused")
class NeedsElements(Defective):
    def before(self, params):
        for p in params:
            p.grad = p.grad / p.grad.abs().max().clamp_min(1.0)


@fails("many_small_tensors_work")
class StopsAtAThousand(Defective):
    def before(self, params):
        for p in params[1000:]:
            p.grad = None


@fails("dtypes_may_be_mixed")
class KnowsOneDtype(Defective):
    def before(self, params):
        for p in params:
            if p.dtype != params[0].dtype:
                p.grad = None


@fails("float64_parameters_are_computed_in_float64")
class RoundsToSingle(Defective):
    def after(self, params):
        for p in params:
            p.copy_(p.float())


@fails("bfloat16_parameters_train")
class LosesSmallSteps(Defective):
    def before(self, params):
        for p in params:
            if p.dtype == torch.bfloat16:
                p.grad = torch.zeros_like(p)


@fails("nan_gradients_show_and_stay_where_they_are")
class HidesNan(Defective):
    def before(self, params):
        for p in params:
            p.grad = p.grad.nan_to_num(0.0)


@fails("nan_gradients_show_and_stay_where_they_are")
class SpreadsNan(Defective):
    def before(self, params):
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            p.grad = p.grad / norm


@fails("nan_gradients_show_and_stay_where_they_are")
class SpreadsNanInItsTensor(Defective):
    def after(self, params):
        for p in params:
            p.add_(0 * p.grad.sum())


@fails("infinite_gradients_do_not_hide_in_the_state")
class RepairsParametersOnly(Defective):
    def after(self, params):
        for p in params:
            p.nan_to_num_()


# --- state ---


@fails("state_is_tensors_and_builtins")
class KeepsADeque(Defective):
    def after(self, params):
        for p in params:
            self.state[p]["history"] = collections.deque([0.0])


@fails("saved_state_continues_exactly", "interrupted_training_resumes_exactly")
class CountsOutsideTheState(Defective):
    def before(self, params):
        self.count = getattr(self, "count", 0) + 1
        for p in params:
            p.grad = p.grad + 0.01 * self.count


@fails("state_loads_into_every_backend")
class KeepsStateDoubledWhenFused(AdaBelief):
    def _step_fused(self, kernels, group, batch):
        torch._foreach_div_(batch.states["exp_avg"], 2.0)
        super()._step_fused(kernels, group, batch)
        torch._foreach_mul_(batch.states["exp_avg"], 2.0)


@fails("state_of_older_versions_loads")
class NeedsEveryOption(AdaBelief):
    def load_state_dict(self, state_dict):
        assert all("fused" in group for group in state_dict["param_groups"])
        super().load_state_dict(state_dict)


@fails("pickled_optimizer_continues_exactly", "copied_optimizer_continues_exactly")
class LosesAttributes(Defective):
    def __init__(self, params, lr: float = 1e-2):
        super().__init__(params, lr)
        self.scale = 1.0

    def __getstate__(self):
        return torch.optim.Optimizer.__getstate__(self)

    def before(self, params):
        for p in params:
            p.grad = p.grad * self.scale


@fails("copied_optimizer_continues_exactly")
class CopiesShareTheState(AdaBelief):
    def __deepcopy__(self, memo):
        copy = type(self)([memo.get(id(p), p) for p in self.param_groups[0]["params"]], lr=self.defaults["lr"])
        for p, q in zip(self.param_groups[0]["params"], copy.param_groups[0]["params"], strict=True):
            copy.state[q] = self.state[p]
        return copy


@fails("state_of_bfloat16_parameters_is_float32")
class StateInBfloat16(AdaBelief):
    def init_state(self, p, group):
        return {k: v if k == "step" else v.to(p.dtype) for k, v in super().init_state(p, group).items()}


@fails("state_of_bfloat16_parameters_survives")
class CastsStateOnLoading(AdaBelief):
    def load_state_dict(self, state_dict):
        torch.optim.Optimizer.load_state_dict(self, state_dict)


# --- the Trainer ---


class HooksGradients(Defective):
    """A defect in every accumulation into ``p.grad``."""

    def __init__(self, params, lr: float = 1e-2):
        super().__init__(params, lr)
        for p in self.param_groups[0]["params"]:
            p.register_post_accumulate_grad_hook(self.accumulated)

    def accumulated(self, p):
        pass


@fails("accumulated_gradients_equal_one_big_batch")
class ClampsWhileAccumulating(HooksGradients):
    def accumulated(self, p):
        p.grad.clamp_(-1e-3, 1e-3)


@fails("clipped_gradients_train")
class UsesGradientsFromBeforeClipping(HooksGradients):
    def accumulated(self, p):
        self.state[p]["raw"] = p.grad.clone()

    def before(self, params):
        for p in params:
            p.grad = self.state[p].pop("raw", p.grad)


@fails("bf16_mixed_precision_trains")
class LivesOnTheLastBits(Defective):
    def before(self, params):
        for p in params:
            p.grad = 256 * (p.grad - p.grad.bfloat16().float())


@fails("fp16_mixed_precision_trains_with_clipping")
class UnscalesItself(AdaBelief):
    _step_supports_amp_scaling = True


@fails("compiled_network_trains")
class ForbidsCompilation(AdaBelief):
    def step(self, closure=None):
        torch.compiler.reset()  # what earlier tests compiled would serve
        with torch.compiler.set_stance("fail_on_recompile"):
            return super().step(closure)


@fails("fast_dev_run_takes_one_step")
class WarmsUpForAStep(Defective):
    def before(self, params):
        for group in self.param_groups:
            group["lr"] = 1e-2 if self.state else 0.0


@fails("one_step_is_one_global_step")
class StepsTwice(AdaBelief):
    def step(self, closure=None):
        loss = super().step(closure)
        for hook in self._optimizer_step_post_hooks.values():
            hook(self, (), {})
        return loss


@fails("manual_optimization_trains")
class SkipsWithoutLoss(AdaBelief):
    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        if loss is not None:
            super().step()
        return loss


class FailsOnOneRank(Defective):
    """Fails ``check_optimizers_ddp``, and leaves the other rank waiting."""

    def after(self, params):
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            raise RuntimeError("out of memory")


class RanksDisagree(Defective):
    """Fails ``check_optimizers_ddp``."""

    def after(self, params):
        if torch.distributed.is_initialized():
            for p in params:
                p.mul_(1 + 1e-6 * torch.distributed.get_rank())
