from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_opt.callbacks import LocalODERegularization, ResumeState
from lightning_opt.data import Digits
from lightning_opt.models import NeuralSDEClassifier

Callbacks = list[pl.Callback]


def model_of(**arguments: Any) -> NeuralSDEClassifier:
    torch.manual_seed(0)
    model = NeuralSDEClassifier(in_features=64, dim=8, hidden=8, method="euler", **arguments)
    model.configure_optimizers = lambda: torch.optim.Adam(model.parameters(), 1e-2)
    return model


def trainer(callbacks: Callbacks, **arguments: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "limit_val_batches": 0, "accelerator": "cpu"}
    return pl.Trainer(callbacks=callbacks, **{**quiet, "max_epochs": 2, **arguments})


def fitted(callbacks: Callbacks, resume: Path | None = None, **arguments: Any) -> tuple[pl.Trainer, dict[str, Any]]:
    model, fit = model_of(), trainer(callbacks, **arguments)
    fit.fit(model, datamodule=Digits(train_size=320), ckpt_path=resume, weights_only=True)
    return fit, {name: value.clone() for name, value in model.state_dict().items()}


def test_the_callback_makes_a_neural_sde_cheaper() -> None:
    results = []
    for callbacks in ([], [LocalODERegularization(coeff=3.0, decay="constant")]):
        model, fit = model_of(rtol=3e-3, atol=3e-3), trainer(callbacks, max_epochs=4)
        fit.fit(model, datamodule=Digits(train_size=640))
        results += fit.test(model, datamodule=Digits(), verbose=False)
    plain, regularized = results
    assert regularized["test/nfe"] <= 0.75 * plain["test/nfe"]
    assert regularized["test/accuracy"] > 0.6  # 0.1 by chance


def test_without_a_coefficient_training_is_bit_for_bit_the_same() -> None:
    _, plain = fitted([])
    callback = LocalODERegularization(coeff=0.0, coeff_end=0.0, decay="constant")
    _, watched = fitted([callback])
    assert all(torch.equal(watched[name], value) for name, value in plain.items())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("sampling", ["unbiased", "biased"])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(sampling: Any, tmp_path: Path) -> None:
    def callbacks(run: str) -> Callbacks:
        saving = ModelCheckpoint(tmp_path / run, "{step}", every_n_train_steps=7, save_top_k=-1)
        return [LocalODERegularization(sampling=sampling), ResumeState(), saving]

    options = {"enable_checkpointing": True, "max_epochs": 3}  # of 5 steps
    _, whole = fitted(callbacks("whole"), **options)
    _, resumed = fitted(callbacks("resumed"), tmp_path / "whole/step=7.ckpt", **options)
    assert int(whole["net.2.solves"]) == 15
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimate": "stiffness"}, "'net.2': NeuralSDE has no estimate 'stiffness', only error"),
        ({"block": "net"}, "'net' is no block that solves an equation; NeuralSDEClassifier has 'net.2'"),
    ],
)
def test_what_cannot_be_regularized_is_refused_before_the_first_step(arguments: Any, message: str) -> None:
    model = model_of()
    with pytest.raises(MisconfigurationException, match=message):
        trainer([LocalODERegularization(**arguments)]).fit(model, datamodule=Digits())
    assert int(model.sde.solves) == 0


def test_fixed_steps_are_refused_before_the_first_step() -> None:
    model = model_of()
    model.sde.adaptive = False
    with pytest.raises(MisconfigurationException, match=r"fixed steps \(method 'euler'\), so that none is accepted"):
        trainer([LocalODERegularization()]).fit(model, datamodule=Digits())
    assert int(model.sde.solves) == 0
