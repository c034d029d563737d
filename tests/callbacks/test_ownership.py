from typing import ClassVar

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging, Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_opt.callbacks._ownership import check_sole_owner


class Learner(pl.Callback):
    owns: ClassVar = frozenset({"learning rate"})


class Grower(pl.Callback):
    owns: ClassVar = frozenset({"batch size", "learning rate"})


def trainer_with(*callbacks):
    return pl.Trainer(
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )


def test_a_sole_owner_is_accepted():
    learner = Learner()
    check_sole_owner(trainer_with(learner, GradientAccumulationScheduler({2: 2}), Timer()), learner)


@pytest.mark.parametrize(
    ("owner", "other", "what"),
    [
        (Learner(), Grower(), "Learner and Grower both set the learning rate"),
        (Grower(), Grower(), "Grower and Grower both set the learning rate"),
        (Learner(), StochasticWeightAveraging(0.1), "both set the learning rate"),
        (Grower(), GradientAccumulationScheduler({2: 2}), "both set the batch size"),
    ],
)
def test_two_owners_are_refused(owner, other, what):
    with pytest.raises(MisconfigurationException, match=what):
        check_sole_owner(trainer_with(owner, other), owner)
