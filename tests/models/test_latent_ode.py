import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_opt.callbacks import ResumeState
from lightning_opt.data import CoupledOscillators
from lightning_opt.models import LatentODE


class Trained(LatentODE):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adamax(self.parameters(), 3e-2)


def new_trainer(**kwargs: Any) -> pl.Trainer:
    defaults = {"logger": False, "enable_checkpointing": False, "max_epochs": 1}
    return pl.Trainer(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **defaults | kwargs)


def small_data() -> CoupledOscillators:
    sizes = {"train_size": 40, "val_size": 7, "test_size": 7, "batch_size": 4, "eval_batch_size": 5}
    data = CoupledOscillators(**sizes, num_times=6, frequency=0.3, channel_rate=1.0)
    data.setup()
    return data


def first_batch(loader: DataLoader) -> tuple[Tensor, Tensor, Tensor]:
    times, values, observed = next(iter(loader))
    return times.double(), values.double(), observed


@pytest.mark.parametrize("step", [0, 150])
def test_the_loss_is_the_negative_evidence_lower_bound(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LatentODE(4, latent=3, encoder_hidden=5, hidden=(6,), sigma=0.3, rtol=1e-9, atol=1e-9).double()
    monkeypatch.setattr(LatentODE, "global_step", property(lambda self: step))
    logged: dict[str, Tensor] = {}
    monkeypatch.setattr(model, "log", lambda name, value, **_: logged.update({name: value}))
    batch = times, values, observed = first_batch(small_data().val_dataloader())
    loss = model.training_step(batch, 0)
    state = torch.get_rng_state()
    assert torch.equal(model.training_step(batch, 0), loss)  # the draw depends on the step and the batch alone
    assert not torch.equal(model.training_step(batch, 1), loss)
    assert torch.equal(torch.get_rng_state(), state)

    mean, log_variance = model.encode(times, values, observed)
    noise = torch.randn(mean.shape, generator=model._generator(0), dtype=mean.dtype)
    channels = model.decode(mean + (log_variance / 2).exp() * noise, times[0])
    seen = torch.distributions.Normal(channels[observed], 0.3).log_prob(values[observed]).sum()
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum()
    weight = 0.0 if step < 100 else 1 - 0.99 ** (step - 100)
    # sums of about 100 terms of order 10 in float64
    torch.testing.assert_close(loss, (weight * divergence - seen) / observed.numel(), rtol=1e-12, atol=0)
    torch.testing.assert_close(logged["train/kl"], divergence / len(values), rtol=1e-12, atol=0)


def test_the_encoder_reads_backward_what_was_observed_alone() -> None:
    model = LatentODE(2, latent=3, encoder_hidden=5).double()
    times = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64).expand(1, -1)
    values = torch.randn(1, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    observed = torch.tensor([[[True, False], [True, True], [False, False], [False, True]]])
    mean, log_variance = model.encode(times, values, observed)
    other = torch.where(observed, values, 9.0)
    assert torch.equal(model.encode(times, other, observed)[0], mean)
    state = torch.zeros(1, 1, 5, dtype=torch.float64)
    for index, gap in ((3, 0.0), (2, 1.0 - 0.7), (1, 0.7 - 0.2), (0, 0.2)):  # to the next time, 0 at the last
        mask = observed[:, index].double()
        row = torch.cat([values[:, index] * mask, mask, torch.tensor([[gap]], dtype=torch.float64)], dim=1)
        state = model.encoder(row[:, None], state)[1]
    torch.testing.assert_close(torch.cat([mean, log_variance], 1), model.to_posterior(state[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_averages_over_observed_values(stage: str) -> None:
    model, data, trainer = LatentODE(4, latent=3, encoder_hidden=5), small_data(), new_trainer()
    evaluate = trainer.validate if stage == "val" else trainer.test
    (metrics,) = evaluate(model, datamodule=data, verbose=False)
    assert set(metrics) == {f"{stage}/{name}" for name in ("loss", "mse", "nfe")}
    part = data.val_set if stage == "val" else data.test_set
    assert part is not None
    batch = times, values, observed = part.__getitems__(range(7))
    channels = torch.cat([model(tuple(tensor[rows] for tensor in batch)) for rows in (slice(5), slice(5, 7))])
    squares = (channels - values)[observed] ** 2
    assert metrics[f"{stage}/mse"] == pytest.approx(squares.mean().item(), rel=1e-5)  # float32
    misfit = (squares / model.sigma**2 + math.log(2 * math.pi * model.sigma**2)).sum() / 2 / observed.numel()
    assert metrics[f"{stage}/loss"] == pytest.approx(misfit.item(), rel=1e-4)  # squares over 0.0025, less 4
    torch.testing.assert_close(torch.cat(new_trainer().predict(model, datamodule=data)), data_order(model, data))


def data_order(model: LatentODE, data: CoupledOscillators) -> Tensor:
    assert data.test_set is not None
    parts = [data.test_set.__getitems__(rows) for rows in (range(5), range(5, 7))]
    return torch.cat([model(part) for part in parts])


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_learns_and_resumes_within_an_epoch(tmp_path: Path) -> None:
    def fit(seed: int, **kwargs: Any) -> tuple[LatentODE, pl.Trainer]:
        torch.manual_seed(seed)
        model = Trained(4, latent=4, encoder_hidden=16, hidden=(16,), kl_start=50, rtol=1e-3, atol=1e-3)
        saving = ModelCheckpoint(tmp_path / str(seed), filename="{step}", every_n_train_steps=33, save_top_k=-1)
        trainer = new_trainer(
            max_steps=80,
            max_epochs=-1,
            callbacks=[saving, ResumeState()],
            limit_val_batches=0,
            enable_checkpointing=True,
        )
        trainer.fit(model, small_data(), **kwargs)  # 10 batches an epoch
        return model, trainer

    straight, _ = fit(0)
    resumed, trainer = fit(1, ckpt_path=tmp_path / "0" / "step=33.ckpt", weights_only=True)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    (metrics,) = trainer.test(resumed, datamodule=small_data(), verbose=False)
    untrained = new_trainer().test(Trained(4, latent=4), datamodule=small_data(), verbose=False)[0]
    assert metrics["test/mse"] < 0.8 * untrained["test/mse"]


def test_series_of_different_times_are_refused() -> None:
    times = torch.tensor([[0.0, 0.5], [0.0, 0.6]])
    with pytest.raises(ValueError, match=r"^times must be the same for all series"):
        LatentODE(1)((times, torch.zeros(2, 2, 1), torch.ones(2, 2, 1).bool()))


def test_a_config_builds_it_by_short_names() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningModule, "model")
    config = {"class_path": "LatentODE", "init_args": {"channels": 4, "hidden": [8], "adjoint": True}}
    model = parser.instantiate(parser.parse_object({"model": config})).model
    assert type(model) is LatentODE
    assert model.ode.adjoint
    assert LatentODE.configure_optimizers is pl.LightningModule.configure_optimizers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("channels", 0),
        ("latent", 0),
        ("encoder_hidden", 0),
        ("hidden", (0,)),
        ("sigma", 0.0),
        ("kl_start", -1),
        ("rtol", -1.0),
        ("seed", -1),
    ],
)
def test_a_wrong_value_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be "):
        LatentODE(**{"channels": 4, name: value})
