"""What the Trainer offers works with the strategy, or is refused clearly before the first step."""

from ..contract import NotApplicable, require
from .fit import BATCH_SIZE, BATCHES, EPOCHS, fit
from .problem import LR, Problem
from .subject import Subject, check, require_equal, require_trained

CLIP = 0.01


@check
def accumulates_gradients(subject: Subject) -> None:
    """Two micro-batches are trained on as one batch of twice the size, to rounding, as one step."""
    halves = subject.run(plain=True, batch_size=BATCH_SIZE // 2, accumulate_grad_batches=2)
    whole = subject.run(plain=True)
    require_trained(halves, micro_batches=2, plain=True)
    require_trained(whole, plain=True)
    # float32: a gradient of size 1 is a sum of 4 terms in another order, 2e-7, and 12 steps go 0.1 of it each
    for name, value in halves[0]["parameters"].items():
        difference = (value - whole[0]["parameters"][name]).abs().max().item()
        require(difference < 2e-6, f"{name} differs by {difference:.3g} from that of whole batches")


@check
def trains_with_clipping(subject: Subject) -> None:
    """With ``gradient_clip_val`` no step of SGD goes further than the rate times that."""
    clipped = subject.run(plain=True, gradient_clip_val=CLIP)
    require_trained(clipped, plain=True)
    require(len(clipped[0]["moves"]) == EPOCHS * BATCHES, f"{len(clipped[0]['moves'])} steps moved the parameters")
    longest, allowed = max(clipped[0]["moves"]), LR * CLIP
    # each of 995 parameters is rounded to 6e-8 of its size, about 0.3: together 5e-7
    require(longest <= allowed + 1e-6, f"a step goes {longest:.3g}, and {LR} times {CLIP} is {allowed:.3g}")


@check
def trains_in_mixed_precision(subject: Subject) -> None:
    """Works with ``precision="bf16-mixed"``."""
    require_trained(subject.run(precision="bf16-mixed"))


@check
def trains_several_groups(subject: Subject) -> None:
    """Works with two parameter groups."""
    require_trained(subject.run(groups=True), groups=True)


@check
def trains_with_frozen_parameters(subject: Subject) -> None:
    """Works where a layer is frozen, and leaves it as it is."""
    told = subject.run(frozen=True)
    require_trained(told, frozen=True)
    for name, p in Problem(frozen=True).named_parameters():
        if not p.requires_grad:
            require_equal(told[0]["parameters"][name], p.detach(), f"{name}, which is frozen")


@check
def answers_unused_parameters(subject: Subject) -> None:
    """Parameters that the loss does not depend on stay as they are, or an error says that they are not used."""
    told = subject.both(fit, unused=True)
    errors = [t.get("error") or t.get("refused") for t in told]
    if any(errors):
        require(all(errors), f"only one rank raised: {errors}")
        clear = all(any(word in str(error) for word in ("unused", "not used")) for error in errors)
        require(clear, f"the error does not say it: {errors[0]}")
        raise NotApplicable(f"refused: {errors[0]}")
    told = subject.run(unused=True)
    require_trained(told, unused=True)
    for name, p in Problem(unused=True).named_parameters():
        if name.startswith("unused"):
            require_equal(told[0]["parameters"][name], p.detach(), f"{name}, which the loss does not depend on")


@check
def answers_sparse_gradients(subject: Subject) -> None:
    """Works with sparse gradients, or an error says that it does not."""
    told = subject.both(fit, sparse=True)
    errors = [t.get("error") or t.get("refused") for t in told]
    if any(errors):
        require(all(errors), f"only one rank raised: {errors}")
        require(all("sparse" in str(error).lower() for error in errors), f"the error does not say it: {errors[0]}")
        raise NotApplicable(f"refused: {errors[0]}")
    require_trained(told, sparse=True)
    require_equal(told[1]["parameters"], told[0]["parameters"], "parameters of rank 1 against rank 0")


@check
def trains_a_compiled_network(subject: Subject) -> None:
    """Works with an inner network behind ``torch.compile``, and trains as without."""
    compiled = subject.run(compiled=True)
    require_trained(compiled, compiled=True)
    values = {name.replace("_orig_mod.", ""): p for name, p in compiled[0]["parameters"].items()}
    require_equal(values, subject.outcome[0]["parameters"], "parameters with a compiled network against without")


@check
def trains_by_manual_optimization(subject: Subject) -> None:
    """Works with ``automatic_optimization = False``, and trains as with automatic; or refuses it."""
    by_hand = subject.run(manual=True, plain=True)
    require_trained(by_hand, plain=True)
    automatic = subject.run(plain=True)
    require_equal(by_hand[0]["parameters"], automatic[0]["parameters"], "parameters by manual optimization")


@check
def trains_on_data_without_length(subject: Subject) -> None:
    """Works with an iterable dataset that has no length."""
    require_trained(subject.run(length=False))


@check
def ignores_the_sanity_check(subject: Subject) -> None:
    """Validation batches before training count for nothing."""
    checked = subject.run(num_sanity_val_steps=2)
    require_equal(checked[0]["parameters"], subject.outcome[0]["parameters"], "parameters with a sanity check")


@check
def decides_alike_without_a_logger(subject: Subject) -> None:
    """Works with ``logger=False``, and trains as with a logger."""
    without = subject.run(logger=False)
    require_equal(without[0]["parameters"], subject.outcome[0]["parameters"], "parameters without a logger")


@check
def logs_under_its_prefix(subject: Subject) -> None:
    """What it logs, on rank 0, is named ``<log_prefix>/<quantity>``, by its class attribute."""
    ours = sorted({name for name, *_ in subject.outcome[0]["rows"]} - {"train/loss", "val/loss", "epoch"})
    if not ours:
        raise NotApplicable("it logs nothing")
    prefix = getattr(subject.cls, "log_prefix", "")
    require(bool(prefix), f"it logs {ours[0]} and has no log_prefix")
    wrong = [name for name in ours if not name.startswith(f"{prefix}/")]
    require(not wrong, f"it logs {', '.join(wrong)}, not under {prefix}/")


@check
def runs_fast_dev_run(subject: Subject) -> None:
    """``fast_dev_run`` works and writes no file."""
    told = subject.run(fast_dev_run=2)
    require(told[0]["steps"] == 2, f"{told[0]['steps']} steps, not 2")
    require(not told[0]["files"], f"wrote {', '.join(told[0]['files'])}")
