"""State: what it is made of, and that saving, loading and copying change nothing."""

import copy
import pickle

import torch

from .._callback_checks.state import foreign_types, through_a_file
from .._callback_checks.subject import require_equal
from ..contract import require
from .subject import STEPS, Subject, check, current, make_optimizer, rates, require_rates

DONE = 5


@check
def state_is_tensors_and_builtins(subject: Subject) -> None:
    """``state_dict`` holds tensors and Python builtins only, and loads with ``weights_only``."""
    scheduler = subject.build()
    rates(scheduler, DONE)
    state = scheduler.state_dict()
    foreign = foreign_types(state)
    require(not foreign, f"neither tensors nor builtins: {', '.join(foreign)}")
    require_equal(through_a_file(state), state, "saved and loaded")


@check
def loaded_state_continues_exactly(subject: Subject) -> None:
    """A new scheduler with the saved states of scheduler and optimizer has the rates of the uninterrupted one."""
    expected = rates(subject.build())
    scheduler = subject.build()
    rates(scheduler, DONE)
    states = through_a_file(scheduler.state_dict()), through_a_file(scheduler.optimizer.state_dict())
    optimizer = make_optimizer()
    loaded = subject.build(optimizer)
    loaded.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    require(list(map(float, loaded.get_last_lr())) == current(scheduler), "get_last_lr is not that of the saved one")
    require_rates(rates(loaded, STEPS - DONE), expected[DONE:], "behind the loaded state")


@check
def last_epoch_continues_exactly(subject: Subject) -> None:
    """Built on an optimizer with ``initial_lr`` and ``last_epoch=k`` it goes on with step k + 1, as torch's do."""
    expected = rates(subject.build())
    scheduler = subject.build()
    rates(scheduler, DONE)
    again = subject.build(scheduler.optimizer, last_epoch=DONE - 1)
    require(again.last_epoch == DONE, f"last_epoch is {again.last_epoch}, not {DONE}")
    # the order of a few roundings at most, where a rate is computed from the one before
    require_rates(rates(again, STEPS - DONE), expected[DONE:], "built in the middle", tolerance=1e-14)


@check
def copies_and_pickles_continue_exactly(subject: Subject) -> None:
    """Deep copies and pickles have the rates of the original, and an optimizer of their own."""
    expected = rates(subject.build())
    scheduler = subject.build()
    rates(scheduler, DONE)
    for how, twin in (("copy", copy.deepcopy(scheduler)), ("pickle", pickle.loads(pickle.dumps(scheduler)))):
        require(twin.optimizer is not scheduler.optimizer, f"the {how} shares the optimizer")
        before = current(scheduler)
        require_rates(rates(twin, STEPS - DONE), expected[DONE:], f"of a {how}")
        require(current(scheduler) == before, f"the {how} changes the rates of the original")
        require(isinstance(twin.optimizer, torch.optim.Optimizer), f"the {how} has no optimizer")
