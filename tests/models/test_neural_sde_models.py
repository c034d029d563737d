import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_opt.data import Digits, SpiralSDE
from lightning_opt.models import NeuralSDEClassifier, NeuralSDEMoments


def trainer(**arguments: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", enable_model_summary=False, **{**quiet, **arguments})


def test_the_classifier_is_the_papers_network() -> None:
    model = NeuralSDEClassifier()
    weights = sum(p.numel() for p in model.parameters())
    assert weights == (784 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32) + (32 * 32 + 32) + (32 * 10 + 10)
    state = torch.full((2, 32), 100.0)
    assert model.sde.drift(torch.tensor(0.0), state).abs().max() <= 1  # tanh is last
    assert model.sde.diffusion(torch.tensor(0.0), state).abs().max() > 1


def test_the_classifier_learns_digits_and_logs_its_evaluations() -> None:
    pl.seed_everything(0, verbose=False)
    model = NeuralSDEClassifier(in_features=64, method="euler", rtol=0.1, atol=0.1)
    model.configure_optimizers = lambda: torch.optim.Adam(model.parameters(), 1e-2)
    fit = trainer(max_epochs=3, limit_val_batches=0)
    fit.fit(model, datamodule=Digits())
    (result,) = fit.test(model, datamodule=Digits(), verbose=False)
    assert result["test/accuracy"] > 0.8  # 0.1 by chance
    assert result["test/nfe"] == model.sde.last_solve.nfe_forward >= 4
    assert fit.test(model, datamodule=Digits(), verbose=False) == [result]  # the same noise


def test_the_moment_loss_is_the_difference_of_moments() -> None:
    model = NeuralSDEMoments().eval()
    starts = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(0, 1, 3)
    drawn = model(starts, times).detach()
    moved = torch.stack([drawn[:, 0], 2 * drawn[:, 1], drawn[:, 2] + 0.3], dim=1)
    loss, error = model._compare((times.expand(40, -1), moved))
    mean, var = drawn[:, 1].mean(dim=0), drawn[:, 1].var(dim=0)
    # at time 1: means m against 2 m, variances v against 4 v; at time 2: means 0.3 apart
    assert loss.item() == pytest.approx((mean.square().sum() + 2 * 0.09 + 9 * var.square().sum()).item() / 4, rel=1e-4)
    squares = (mean.square() + var).sum().item() + 2 * 0.09
    assert error.item() == pytest.approx(math.sqrt(squares / 8), rel=1e-4)


def test_the_moments_of_the_spiral_are_learned() -> None:
    pl.seed_everything(0, verbose=False)
    data = SpiralSDE(train_size=100, val_size=2, test_size=200, num_times=3, num_steps=200, batch_size=100)
    model = NeuralSDEMoments(hidden=16, method="euler", rtol=0.1, atol=0.1, dt=0.1)
    (before,) = trainer().test(model, datamodule=data, verbose=False)
    model.configure_optimizers = lambda: torch.optim.Adam(model.parameters(), 2e-2)
    trainer(max_epochs=60, limit_val_batches=0).fit(model, datamodule=data)
    (after,) = trainer().test(model, datamodule=data, verbose=False)
    assert after["test/moment_error"] < before["test/moment_error"] / 2
    (batch,) = trainer().predict(model, datamodule=data)
    assert batch.shape == (200, 3, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeuralSDEClassifier(dim=0), "dim must be >= 1"),
        (lambda: NeuralSDEClassifier(hidden=0), "hidden must be >= 1"),
        (lambda: NeuralSDEMoments(hidden=0), "hidden must be >= 1"),
        (lambda: NeuralSDEMoments(rtol=-1), "rtol must be >= 0"),
    ],
)
def test_wrong_values_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
