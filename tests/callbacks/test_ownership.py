from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_opt.callbacks import AdaptiveBatchSize, LanczosLRLearner, StabilityBooster
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
        max_epochs=1,
    )


def test_a_sole_owner_is_accepted():
    learner = Learner()
    others = (GradientAccumulationScheduler({2: 2}), BatchSizeFinder(), Timer())
    check_sole_owner(trainer_with(learner, *others), learner)


@pytest.mark.parametrize(
    ("owner", "other", "what"),
    [
        (Learner(), Grower(), "Learner and Grower both set the learning rate"),
        (Grower(), Grower(), "Grower and Grower both set the learning rate"),
        (Learner(), StochasticWeightAveraging(0.1), "both set the learning rate"),
        (Learner(), BackboneFinetuning(), "Learner and BackboneFinetuning both set the learning rate"),
        (Grower(), GradientAccumulationScheduler({2: 2}), "both set the batch size"),
        (Grower(), BatchSizeFinder(), "Grower and BatchSizeFinder both set the batch size"),
        (Learner(), LearningRateFinder(), "Learner and LearningRateFinder both set the learning rate"),
    ],
)
def test_two_owners_are_refused(owner, other, what):
    with pytest.raises(MisconfigurationException, match=what):
        check_sole_owner(trainer_with(owner, other), owner)


@pytest.mark.parametrize(
    ("owner", "finder"),
    [
        (AdaptiveBatchSize(), BatchSizeFinder()),
        (AdaptiveBatchSize(lr_scale="sqrt"), LearningRateFinder()),
        (LanczosLRLearner(), LearningRateFinder()),
        (StabilityBooster(), LearningRateFinder()),
    ],
)
@pytest.mark.parametrize("finder_first", [False, True])
def test_lightnings_finders_are_refused_before_they_try_anything(owner, finder, finder_first):
    """Lightning's finders run trial steps in ``on_fit_start``, behind every ``setup``."""
    module = BoringModel()
    module.lr = module.batch_size = 1  # what they set
    before = [p.detach().clone() for p in module.parameters()]
    callbacks = [finder, owner] if finder_first else [owner, finder]
    with pytest.raises(MisconfigurationException, match=f"{type(owner).__name__} and {type(finder).__name__} both set"):
        trainer_with(*callbacks).fit(module)
    assert (module.lr, module.batch_size) == (1, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
