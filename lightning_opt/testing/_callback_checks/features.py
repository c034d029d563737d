"""What the Trainer offers works with the callback, or is refused clearly before the first step."""

import torch
from torch import nn

from ..contract import require
from .problem import Problem, data
from .subject import (
    Outcome,
    Rows,
    Subject,
    check,
    require_equal,
    require_same_training,
    require_trained,
    without_volatile,
)


@check
def accumulates_gradients(subject: Subject) -> None:
    """Two micro-batches are trained on as one batch of twice the size, to rounding, as one step."""
    ordered = {"plain": True, "shuffle": False, "precision": "64-true"}
    if subject.is_for_odes:  # the steps of a solver, so also its rounding, are those of a whole batch
        require_trained(subject, subject.run_or_refuse(**ordered, batch_size=4, accumulate_grad_batches=2))
        return
    if subject.owns:  # it may set another rate, or make other batches, when batches are halved
        _require_exact_steps(subject.run_or_refuse(**ordered))
        _require_exact_steps(subject.run_or_refuse(**ordered, batch_size=4, accumulate_grad_batches=2))
        return
    halves = subject.run_or_refuse(**ordered, batch_size=4, accumulate_grad_batches=2)
    whole = subject.run_or_refuse(**ordered)
    steps = halves.trainer.global_step, whole.trainer.global_step
    require(steps[0] == steps[1], f"{steps[0]} steps from micro-batches, {steps[1]} from batches")
    # a gradient is a sum of 8 float64 terms of size 1 in another order, 1e-15, and 12 steps go 0.1 of it
    for name, value in halves.parameters.items():
        difference = (value - whole.parameters[name]).abs().max().item()
        require(difference < 1e-13, f"{name} differs by {difference:.3g} from that of whole batches")


@check
def trains_with_clipping(subject: Subject) -> None:
    """Works with clipped gradients."""
    require_trained(subject, subject.run_or_refuse(gradient_clip_val=0.1))


@check
def trains_in_mixed_precision(subject: Subject) -> None:
    """Works with ``precision="bf16-mixed"``."""
    require_trained(subject, subject.run_or_refuse(precision="bf16-mixed"))


@check
def trains_several_groups(subject: Subject) -> None:
    """Works with two parameter groups."""
    require_trained(subject, subject.run_or_refuse(groups=True))


@check
def trains_with_frozen_parameters(subject: Subject) -> None:
    """Works where a layer is frozen and the gradient of another is None."""
    outcome = subject.run_or_refuse(frozen=True)
    require_trained(subject, outcome)
    untouched = subject.problem(frozen=True)
    for name, p in untouched.named_parameters():
        if not p.requires_grad or name.startswith("unused"):
            require_equal(outcome.parameters[name], p.detach(), f"{name}, which is not trained")


@check
def trains_a_compiled_network(subject: Subject) -> None:
    """Works with an inner network behind ``torch.compile``."""
    require_trained(subject, subject.run_or_refuse(compiled=True))


@check
def trains_by_manual_optimization(subject: Subject) -> None:
    """Works with ``automatic_optimization = False``, or refuses it."""
    require_trained(subject, subject.run_or_refuse(manual=True))


@check
def trains_on_data_without_length(subject: Subject) -> None:
    """Works with an iterable dataset that has no length."""
    require_trained(subject, subject.run_or_refuse(length=False))


@check
def ignores_the_sanity_check(subject: Subject) -> None:
    """Validation batches before training count for nothing: logs and state are as without them."""
    checked = subject.run_or_refuse(plain=True, num_sanity_val_steps=2)
    plain = subject.run(plain=True)
    require_same_training(checked, plain, "with a sanity check against without")
    require_equal(without_volatile(checked.state), without_volatile(plain.state), "state with a sanity check")


@check
def decides_alike_without_a_logger(subject: Subject) -> None:
    """Works with ``logger=False``, and trains as with a logger."""
    outcome = subject.run(logger=False)
    require_equal(outcome.parameters, subject.outcome.parameters, "parameters without a logger against with one")


@check
def logs_to_every_logger(subject: Subject) -> None:
    """With several loggers each gets the same values."""
    first, second = Rows(), Rows()
    subject.run(logger=[first, second])
    require_equal(first.values, second.values, "rows of the first logger against the second")
    require_equal(first.values, subject.outcome.rows, "rows of one of two loggers against a single one")


@check
def runs_fast_dev_run(subject: Subject) -> None:
    """``fast_dev_run`` works and writes no file."""
    outcome = subject.run(fast_dev_run=2)
    steps = outcome.trainer.global_step
    require(steps == 2 or "batch size" in subject.owns, f"{steps} steps, not 2")
    require(not outcome.files, f"wrote {', '.join(sorted(outcome.files))}")


def _require_exact_steps(outcome: Outcome) -> None:
    """Every step is that of the mean gradient over its examples, with the options that its groups then had."""
    module = Problem(plain=True).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    inputs, labels = data()
    begun = 0
    for batches, (options,) in outcome.module.steps:
        examples = torch.cat([numbers for _, numbers in outcome.module.seen[begun:batches]])
        optimizer.param_groups[0].update(options)
        optimizer.zero_grad()
        nn.functional.cross_entropy(module.net(inputs[examples].double()), labels[examples]).backward()
        optimizer.step()
        begun = batches
    for name, p in module.named_parameters():
        difference = (p - outcome.parameters[name]).abs().max().item()
        require(difference < 1e-12, f"{name} differs by {difference:.3g} from steps of the mean over their examples")
