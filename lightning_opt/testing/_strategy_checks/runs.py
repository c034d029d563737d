"""One run beside and after another: evaluation alone, errors, several fits."""

import torch
from torch import nn

from ..contract import require
from .fit import BATCHES, evaluate_alone, fit, fit_after_an_error
from .problem import Problem, data
from .subject import Subject, check, require_equal, require_trained


@check
def evaluates_alone(subject: Subject) -> None:
    """``validate``, ``test`` and ``predict`` without a fit see all data once, and leave the parameters alone."""
    told = subject.run(evaluate_alone)
    module = Problem()
    inputs, labels = data()
    with torch.no_grad():
        logits = module.net(inputs)
    loss = nn.functional.cross_entropy(logits, labels).item()
    for rank, t in enumerate(told):
        require_equal(t["parameters"], {n: p.detach() for n, p in module.named_parameters()}, f"those of rank {rank}")
        for name, value in t["values"].items():
            # a mean of 48 float32 losses of size 1, in another order
            require(abs(value - loss) < 2e-6, f"{name} is {value} on rank {rank}, and {loss} in one process")
        # as a float32 product of another shape rounds
        difference = (t["predicted"] - logits[rank::2]).abs().max().item()
        require(difference < 2e-6, f"predictions of rank {rank} differ by {difference:.3g} from those in one process")


@check
def an_error_passes_through(subject: Subject) -> None:
    """An error in ``training_step`` reaches the caller as it is."""
    for rank, t in enumerate(subject.both(fit, fail_at=BATCHES + 1)):
        require(t.get("planted", False), f"on rank {rank} came out: {t.get('error', 'no error')}")


@check
def fits_again_after_an_error(subject: Subject) -> None:
    """After an error another fit goes as if it were the first."""
    again = subject.run(fit_after_an_error)
    require_equal(again[0]["parameters"], subject.outcome[0]["parameters"], "parameters after the second fit")


@check
def fits_again_by_one_trainer(subject: Subject) -> None:
    """A second ``fit`` of one Trainer trains its module as the first did: nothing is left of that."""
    once, twice = subject.run(shuffle=False), subject.run(shuffle=False, fits=2)
    require_trained(twice, fits=2)
    require_equal(twice[0]["parameters"], once[0]["parameters"], "parameters of the second fit against the first")
