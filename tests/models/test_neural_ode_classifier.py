from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from scipy.integrate import solve_ivp
from torch.utils.data import DataLoader, TensorDataset

from lightning_opt.data import Digits
from lightning_opt.models import NeuralODEClassifier

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")  # torch's own loader


class Trained(NeuralODEClassifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


def new_trainer(**kwargs: Any) -> pl.Trainer:
    defaults = {"logger": False, "enable_checkpointing": False, "max_epochs": 1}
    return pl.Trainer(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **defaults | kwargs)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(6, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pool", [1, 2])
def test_the_flattened_image_is_carried_from_time_0_to_1(images: torch.Tensor, pool: int) -> None:
    model = NeuralODEClassifier(16, (5,), 3, pool=pool, rtol=1e-9, atol=1e-9).double().eval()
    start = images.unflatten(2, (4 // pool, pool)).unflatten(4, (4 // pool, pool)).mean((3, 5)).flatten(1)
    assert start.shape == (6, 16 // pool**2)

    @torch.no_grad()
    def dynamics(t: float, y: np.ndarray) -> np.ndarray:
        states = torch.from_numpy(y).reshape(start.shape)
        return model.ode.func(torch.tensor(t, dtype=torch.float64), states).reshape(-1).numpy()

    end = solve_ivp(dynamics, (0, 1), start.reshape(-1).numpy(), rtol=1e-11, atol=1e-11).y[:, -1]
    head = model.net[-1]
    expected = torch.from_numpy(end).reshape(start.shape) @ head.weight.T + head.bias
    # a few steps, each with an error of at most 1e-9 a value, which the layers pass on about as large
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_logs_the_evaluations_of_a_batch(images: torch.Tensor, stage: str) -> None:
    model = NeuralODEClassifier(16, (5,), 3).double()
    calls = []
    model.ode.func.register_forward_hook(lambda *_: calls.append(1))
    loader = DataLoader(TensorDataset(images, torch.arange(6) % 3), batch_size=3)
    trainer = new_trainer()
    evaluate = trainer.validate if stage == "val" else trainer.test
    (metrics,) = evaluate(model, loader, verbose=False)
    assert set(metrics) == {f"{stage}/{name}" for name in ("loss", "accuracy", "nfe")}
    assert metrics[f"{stage}/nfe"] == len(calls) / 2  # two batches of the same size
    assert len(calls) >= 2 * 8  # the first step's size, and one step


def test_a_checkpoint_holds_each_weight_once(images: torch.Tensor, tmp_path: Path) -> None:
    model = Trained(16, (5,), 3).double()
    loader = DataLoader(TensorDataset(images, torch.arange(6) % 3), batch_size=3)
    trainer = new_trainer()
    trainer.fit(model, loader, loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    ode = {f"net.2.func.layers.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")}
    assert set(content["state_dict"]) == ode | {"net.3.weight", "net.3.bias"}
    other = NeuralODEClassifier.load_from_checkpoint(
        tmp_path / "last.ckpt", in_features=16, hidden=(5,), num_classes=3, weights_only=True
    )
    model = model.float().eval()
    assert torch.equal(other.eval()(images.float()), model(images.float()))


def test_a_config_builds_it_by_short_names() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningModule, "model")
    arguments = {"in_features": 64, "hidden": [8], "pool": 2, "rtol": 1e-4, "adjoint": True, "label_smoothing": 0.1}
    config = {"class_path": "NeuralODEClassifier", "init_args": arguments}
    model = parser.instantiate(parser.parse_object({"model": config})).model
    assert type(model) is NeuralODEClassifier
    assert (model.ode.rtol, model.ode.adjoint, model.label_smoothing) == (1e-4, True, 0.1)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert NeuralODEClassifier.configure_optimizers is pl.LightningModule.configure_optimizers


@pytest.mark.parametrize(
    ("name", "value"),
    [("in_features", 0), ("hidden", (0,)), ("num_classes", 1), ("pool", 0), ("pool", 3), ("rtol", -1.0), ("atol", 0.0)],
)
def test_a_wrong_value_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be "):
        NeuralODEClassifier(**{"in_features": 64, name: value})


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks this small are slower on several threads, and far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_learns_digits_in_three_epochs() -> None:
    trainer, model, data = new_trainer(max_epochs=3), Trained(64, (20,), rtol=1e-3, atol=1e-3), Digits()
    trainer.fit(model, data)
    (metrics,) = trainer.test(model, data, verbose=False)
    assert metrics["test/accuracy"] >= 0.85  # 0.1 by chance
