"""Strategies that break one promise each; two other processes import them too."""

from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def scale(optimizer, factor):
    """Multiply all parameters."""
    with torch.no_grad():
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.mul_(factor)


class Untyped(DDPStrategy):
    def __init__(self, every=1, **kwargs):
        super().__init__(**kwargs)


class TakesATensor(DDPStrategy):
    def __init__(self, weights: torch.Tensor, **kwargs):
        super().__init__(**kwargs)


class Nameless(DDPStrategy):
    pass


class TakesAnything(DDPStrategy):
    def __init__(self, rate: float = 1.0, **kwargs):
        super().__init__(**kwargs)


class HoldsAFunction(DDPStrategy):
    def __init__(self):
        super().__init__()
        self.function = lambda: None


class NeverSynchronizes(DDPStrategy):
    def configure_ddp(self):
        pass


class Draws(DDPStrategy):
    def optimizer_step(self, *args, **kwargs):
        torch.rand(1)
        return super().optimizer_step(*args, **kwargs)


class SkipsAlone(DDPStrategy):
    """Takes a step back on the rank whose own loss is not finite."""

    def optimizer_step(self, optimizer, *args, **kwargs):
        before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        loss = super().optimizer_step(optimizer, *args, **kwargs)
        if not loss.isfinite():
            with torch.no_grad():
                for p, old in zip((p for g in optimizer.param_groups for p in g["params"]), before, strict=True):
                    p.copy_(old)
        return loss


class LeavesAHook(DDPStrategy):
    def setup(self, trainer):
        super().setup(trainer)
        self.lightning_module.net.register_forward_hook(lambda *_: None)


class NumpyState(DDPStrategy):
    def save_checkpoint(self, checkpoint, *args, **kwargs):
        super().save_checkpoint({**checkpoint, "mine": np.float64(1)}, *args, **kwargs)


class CountsUnsaved(DDPStrategy):
    """Shrinks the parameters ever more; what it counts is in no checkpoint, and a second fit counts on."""

    count = 0

    def optimizer_step(self, optimizer, *args, **kwargs):
        out = super().optimizer_step(optimizer, *args, **kwargs)
        self.count += 1
        scale(optimizer, 1 - 1e-3 * self.count)
        return out


class ChangesEveryMicroBatch(DDPStrategy):
    def post_backward(self, closure_loss):
        super().post_backward(closure_loss)
        for p in self.lightning_module.parameters():
            p.grad.add_(0.1)


class GoesFurther(DDPStrategy):
    def optimizer_step(self, optimizer, *args, **kwargs):
        out = super().optimizer_step(optimizer, *args, **kwargs)
        scale(optimizer, 0.99)
        return out


class RefusesLate(DDPStrategy):
    def optimizer_step(self, *args, **kwargs):
        if "bf16" in self.precision_plugin.precision:
            raise MisconfigurationException("refused too late")
        return super().optimizer_step(*args, **kwargs)


class OneGroup(DDPStrategy):
    def setup(self, trainer):
        super().setup(trainer)
        (_,) = self.optimizers[0].param_groups


class TrainsFrozen(DDPStrategy):
    def optimizer_step(self, *args, **kwargs):
        out = super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            for p in self.lightning_module.parameters():
                p.add_(0.01)
        return out


class HidesUnused(DDPStrategy):
    def training_step(self, *args, **kwargs):
        try:
            return super().training_step(*args, **kwargs)
        except RuntimeError as error:
            raise KeyError("bucket") from error


class NeedsDenseGradients(DDPStrategy):
    def optimizer_step(self, optimizer, closure, *args, **kwargs):
        def checked():
            loss = closure()
            if any(p.grad.is_sparse for p in self.lightning_module.parameters()):
                raise KeyError("layout")
            return loss

        return super().optimizer_step(optimizer, checked, *args, **kwargs)


class KnowsNames(DDPStrategy):
    def setup(self, trainer):
        super().setup(trainer)
        self.weight = dict(self.lightning_module.named_parameters())["net.0.weight"]


class NeedsALoss(DDPStrategy):
    def optimizer_step(self, *args, **kwargs):
        out = super().optimizer_step(*args, **kwargs)
        assert out is not None
        return out


class NeedsALength(DDPStrategy):
    def optimizer_step(self, *args, **kwargs):
        int(self.lightning_module.trainer.num_training_batches)
        return super().optimizer_step(*args, **kwargs)


class CountsValidations(DDPStrategy):
    validations = 0

    def validation_step(self, *args, **kwargs):
        self.validations += 1
        return super().validation_step(*args, **kwargs)

    def optimizer_step(self, optimizer, *args, **kwargs):
        out = super().optimizer_step(optimizer, *args, **kwargs)
        scale(optimizer, 1 - 1e-3 * self.validations)
        return out


class DependsOnTheLogger(DDPStrategy):
    def setup(self, trainer):
        super().setup(trainer)
        if trainer.logger is None:
            self.optimizers[0].param_groups[0]["lr"] *= 2


class NoPrefix(DDPStrategy):
    def training_step(self, *args, **kwargs):
        self.lightning_module.log("loss_of_mine", 1.0)
        return super().training_step(*args, **kwargs)


class AlwaysWrites(DDPStrategy):
    def setup(self, trainer):
        super().setup(trainer)
        Path(trainer.default_root_dir, "file").write_text("")


class TrainsOnTest(DDPStrategy):
    def test_step(self, *args, **kwargs):
        with torch.no_grad():
            next(self.lightning_module.parameters()).zero_()
        return super().test_step(*args, **kwargs)


class HidesErrors(DDPStrategy):
    def on_exception(self, exception):
        raise KeyError("another")


class CountsRuns(DDPStrategy):
    runs = 0

    def setup(self, trainer):
        super().setup(trainer)
        CountsRuns.runs += 1
        scale(self.optimizers[0], 1 - 1e-3 * self.runs)


class FailsOnOneRank(DDPStrategy):
    def optimizer_step(self, *args, **kwargs):
        if self.global_rank == 1:
            raise ValueError("rank 1 only")
        return super().optimizer_step(*args, **kwargs)


class RefusesManualOptimization(DDPStrategy):
    """Sound: it says before the first step what it cannot do."""

    def setup(self, trainer):
        if not trainer.lightning_module.automatic_optimization:
            raise MisconfigurationException("RefusesManualOptimization needs automatic optimization")
        super().setup(trainer)
