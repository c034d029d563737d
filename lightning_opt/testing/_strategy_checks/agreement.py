"""Two ranks: the same parameters on both, whatever the global random state and the losses."""

import torch

from ..contract import NotApplicable, require
from .fit import fit
from .subject import Subject, check, require_equal, require_trained


@check
def trains_alike_on_every_rank(subject: Subject) -> None:
    """Each rank reads its own data, one step is one ``global_step``, and all end with the same bits."""
    require_trained(subject.outcome)


@check
def uses_no_random_state(subject: Subject) -> None:
    """The global random states of python, numpy and torch are neither used nor changed, so that runs repeat."""
    for rank, told in enumerate(subject.outcome):
        before, after = told["random"]
        require_equal(after, before, f"random states of rank {rank} after a fit against before")
    other = subject.run(seed=1)
    require_equal(other[0]["parameters"], subject.outcome[0]["parameters"], "parameters with another global seed")


@check
def agrees_about_a_loss_that_is_not_finite(subject: Subject) -> None:
    """An infinite loss on one rank leaves all ranks with the same bits, or is refused by all of them."""
    told = subject.both(fit, poisoned_at=4)
    errors = [t.get("error") for t in told]
    require(all(errors) or not any(errors), f"only one rank raised: {errors}")
    if all(errors):
        raise NotApplicable(f"refused by both ranks: {errors[0]}")
    require_equal(told[1]["parameters"], told[0]["parameters"], "parameters of rank 1 against rank 0")


@check
def leaves_the_module_alone(subject: Subject) -> None:
    """Behind a fit the module has its own names and no hooks, and its tensors are what the ranks agreed on."""
    for rank, told in enumerate(subject.outcome):
        require(not told["hooks"], f"hooks left on rank {rank}: {', '.join(told['hooks'])}")
        dtypes = {p.dtype for p in told["parameters"].values()}
        require(dtypes == {torch.float32}, f"parameters are {dtypes} on rank {rank}")
