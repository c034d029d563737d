"""What the Trainer offers works with the callback, or is refused clearly before the first step."""

from ..contract import require
from .subject import (
    BATCHES,
    EPOCHS,
    Outcome,
    Problem,
    Rows,
    Subject,
    check,
    require_equal,
    require_same_training,
    run,
    without_volatile,
)


@check
def accumulates_gradients(subject: Subject) -> None:
    """Two micro-batches are trained on as one batch of twice the size, to rounding, as one step."""
    ordered = {"plain": True, "shuffle": False, "precision": "64-true"}
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
    _trains(subject.run_or_refuse(gradient_clip_val=0.1))


@check
def trains_in_mixed_precision(subject: Subject) -> None:
    """Works with ``precision="bf16-mixed"``."""
    _trains(subject.run_or_refuse(precision="bf16-mixed"))


@check
def trains_several_groups(subject: Subject) -> None:
    """Works with two parameter groups."""
    _trains(subject.run_or_refuse(groups=True))


@check
def trains_with_frozen_parameters(subject: Subject) -> None:
    """Works where a layer is frozen and the gradient of another is None."""
    outcome = subject.run_or_refuse(frozen=True)
    _trains(outcome)
    untouched = Problem(frozen=True)
    for name, p in untouched.named_parameters():
        if not p.requires_grad or name.startswith("unused"):
            require_equal(outcome.parameters[name], p.detach(), f"{name}, which is not trained")


@check
def trains_a_compiled_network(subject: Subject) -> None:
    """Works with an inner network behind ``torch.compile``."""
    _trains(subject.run_or_refuse(compiled=True))


@check
def trains_by_manual_optimization(subject: Subject) -> None:
    """Works with ``automatic_optimization = False``, or refuses it."""
    _trains(subject.run_or_refuse(manual=True))


@check
def trains_on_data_without_length(subject: Subject) -> None:
    """Works with an iterable dataset that has no length."""
    _trains(subject.run_or_refuse(length=False))


@check
def ignores_the_sanity_check(subject: Subject) -> None:
    """Validation batches before training count for nothing: logs and state are as without them."""
    checked = subject.run_or_refuse(plain=True, num_sanity_val_steps=2)
    plain = run(subject.build(), module=Problem(plain=True))
    require_same_training(checked, plain, "with a sanity check against without")
    require_equal(without_volatile(checked.state), without_volatile(plain.state), "state with a sanity check")


@check
def decides_alike_without_a_logger(subject: Subject) -> None:
    """Works with ``logger=False``, and trains as with a logger."""
    outcome = run(subject.build(), logger=False)
    require_equal(outcome.parameters, subject.outcome.parameters, "parameters without a logger against with one")


@check
def logs_to_every_logger(subject: Subject) -> None:
    """With several loggers each gets the same values."""
    first, second = Rows(), Rows()
    run(subject.build(), logger=[first, second])
    require_equal(first.values, second.values, "rows of the first logger against the second")
    require_equal(first.values, subject.outcome.rows, "rows of one of two loggers against a single one")


@check
def runs_fast_dev_run(subject: Subject) -> None:
    """``fast_dev_run`` works and writes no file."""
    outcome = run(subject.build(), fast_dev_run=2)
    require(outcome.trainer.global_step == 2, f"{outcome.trainer.global_step} steps, not 2")
    require(not outcome.files, f"wrote {', '.join(sorted(outcome.files))}")


def _trains(outcome: Outcome) -> None:
    steps = outcome.trainer.global_step
    require(steps == EPOCHS * BATCHES, f"{steps} steps, not {EPOCHS * BATCHES}")
