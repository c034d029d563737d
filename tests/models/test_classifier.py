from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_opt.data import Digits
from lightning_opt.models import MLP, Classifier, ResNet

# Lightning 2.6 with torch 2.13; the loaders of these tests are torch's own
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Trained(Classifier):
    def __init__(self, net: nn.Module, lr: float = 0.0, **kwargs: Any) -> None:
        super().__init__(net, **kwargs)
        self.lr = lr

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def new_trainer(**kwargs: Any) -> pl.Trainer:
    defaults = {"logger": False, "enable_checkpointing": False, "max_epochs": 1, "log_every_n_steps": 1}
    return pl.Trainer(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **defaults | kwargs)


class Identity(nn.Module):
    """The images are the logits; the one parameter adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        return images + self.offset


LOGITS = torch.randn(10, 3, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(10) % 3
BATCHES = DataLoader(TensorDataset(LOGITS, LABELS), batch_size=4)  # 4, 4 and 2 images
LOSSES = -LOGITS.log_softmax(dim=1)[torch.arange(10), LABELS]
ACCURACY = float((LOGITS.argmax(dim=1) == LABELS).float().mean())


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_averages_over_images(stage: str) -> None:
    model = Classifier(Identity(), num_classes=3, label_smoothing=0.3)
    evaluate = new_trainer().validate if stage == "val" else new_trainer().test
    (metrics,) = evaluate(model, BATCHES, verbose=False)
    assert set(metrics) == {f"{stage}/loss", f"{stage}/accuracy"}
    # the means over batches of 4, 4 and 2 would differ from this in the second digit; the rest is float32 rounding
    assert metrics[f"{stage}/loss"] == pytest.approx(float(LOSSES.mean()), rel=1e-6)
    assert metrics[f"{stage}/accuracy"] == pytest.approx(ACCURACY, rel=1e-6)
    assert 0 < ACCURACY < 1
    means = torch.stack([part.mean() for part in LOSSES.split(4)]).mean()
    assert abs(means - LOSSES.mean()) > 0.01


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_training_logs_the_loss_of_each_step(tmp_path: Path, smoothing: float) -> None:
    logger = CSVLogger(tmp_path)
    model = Trained(Identity(), num_classes=3, label_smoothing=smoothing)
    new_trainer(logger=logger).fit(model, BATCHES, BATCHES)
    rows = [dict(row) for row in logger.experiment.metrics] or read_csv(Path(logger.log_dir))
    logged = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    # y = (1 - s) * onehot + s / K: the loss is (1 - s) * loss of the label + s * mean loss of all labels
    smoothed = (1 - smoothing) * LOSSES + smoothing * -LOGITS.log_softmax(dim=1).mean(dim=1)
    assert logged == pytest.approx([float(part.mean()) for part in smoothed.split(4)], rel=1e-6)
    (val,) = [float(row["val/loss"]) for row in rows if row.get("val/loss")]
    assert val == pytest.approx(float(LOSSES.mean()), rel=1e-6)


def read_csv(folder: Path) -> list[dict[str, str]]:
    header, *lines = (folder / "metrics.csv").read_text().splitlines()
    return [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]


def test_accuracy_starts_anew_each_epoch() -> None:
    trainer = new_trainer()
    model = Classifier(Identity(), num_classes=3)
    first = trainer.validate(model, BATCHES, verbose=False)
    wrong = DataLoader(TensorDataset(LOGITS, (LOGITS.argmax(dim=1) + 1) % 3), batch_size=4)
    assert trainer.validate(model, wrong, verbose=False)[0]["val/accuracy"] == 0
    assert trainer.validate(model, BATCHES, verbose=False) == first


def test_prediction_gives_probabilities() -> None:
    model = Classifier(Identity(), num_classes=3)
    for loader in (BATCHES, DataLoader(LOGITS, batch_size=4)):  # with labels and without
        parts = new_trainer().predict(model, loader)
        assert parts is not None
        torch.testing.assert_close(torch.cat(parts), LOGITS.softmax(dim=1))


def test_leaves_the_optimizer_to_others() -> None:
    assert Classifier.configure_optimizers is pl.LightningModule.configure_optimizers


def test_a_checkpoint_holds_only_tensors_and_plain_values(tmp_path: Path) -> None:
    model = Trained(MLP(in_features=3, hidden=(4,), num_classes=3), lr=0.1, num_classes=3)
    trainer = new_trainer(enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.fit(model, BATCHES, BATCHES)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(content["state_dict"]) == {f"net.layers.{i}.{name}" for i in (1, 3) for name in ("weight", "bias")}
    other = Classifier.load_from_checkpoint(
        tmp_path / "last.ckpt", net=MLP(in_features=3, hidden=(4,), num_classes=3), num_classes=3, weights_only=True
    )
    assert torch.equal(other(LOGITS), model(LOGITS))


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("MLP", {"in_features": 64, "hidden": [32, 16], "dropout": 0.1}, 8),
        ("ResNet", {"width": 4, "blocks": [1, 1]}, 28),
    ],
)
def test_a_config_builds_it_by_short_names(name: str, arguments: dict[str, Any], size: int) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningModule, "model")
    net = {"class_path": name, "init_args": arguments}
    config = {"class_path": "Classifier", "init_args": {"net": net, "label_smoothing": 0.1}}
    model = parser.instantiate(parser.parse_object({"model": config})).model
    assert type(model) is Classifier
    assert model.label_smoothing == 0.1
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 10)


@pytest.mark.parametrize(("name", "value"), [("num_classes", 1), ("label_smoothing", 1.0), ("label_smoothing", -0.1)])
def test_a_wrong_value_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be "):
        Classifier(Identity(), **{name: value})


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks this small are slower on several threads, and far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("net", "lr"),
    [(lambda: MLP(in_features=64, hidden=(64,)), 3e-3), (lambda: ResNet(width=8, blocks=(1, 1)), 1e-2)],
    ids=["MLP", "ResNet"],
)
def test_learns_digits_in_five_epochs(net: Callable[[], nn.Module], lr: float) -> None:
    trainer, model, data = new_trainer(max_epochs=5), Trained(net(), lr), Digits()
    trainer.fit(model, data)
    (metrics,) = trainer.test(model, data, verbose=False)
    assert metrics["test/accuracy"] >= 0.9  # 0.1 by chance
    assert metrics["test/loss"] < 0.5  # log(10) = 2.3 by chance
