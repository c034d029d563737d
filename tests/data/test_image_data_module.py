import math
import os
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_opt.data import ImageDataModule, ImageDataset, ResumableLoader, stratified_order
from lightning_opt.models import Classifier

# Lightning 2.6 with torch 2.13
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")

COUNTS = (500, 300, 150, 49, 1)  # of each class among the training images
LABELS = torch.arange(5).repeat_interleave(torch.tensor(COUNTS))


class Numbered(ImageDataModule):
    """Image i has the pixel value i, so that a batch tells which images are in it; 1,000 to train, 30 to test."""

    classes = ("a", "b", "c", "d", "e")
    shape = (1, 1, 2)
    max_value = 1.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loaded: list[str] = []

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        self.loaded.append(split)
        count = 1000 if split == "train" else 30
        images = torch.arange(count, dtype=torch.float32).view(-1, 1, 1).expand(-1, 1, 2)
        return images, LABELS if split == "train" else LABELS[:30]


def read(loader: DataLoader) -> list[int]:
    return [int(image) for images, _ in loader for image in images[:, 0, 0, 0]]


def fraction_bounds(prefix: int) -> list[tuple[int, int]]:
    """What a prefix may hold of each class.

    At the point t in (0, 1] of the order, round(t * n_c) members of a class of n_c have come, up to 1/2 more or less.
    A prefix of n images ends at a t with |t * N - n| <= K / 2 for K classes, and one tie in the order moves a class by
    at most 1; so class c has n * n_c / N images up to 1/2 + K / 2 * n_c / N + 1.
    """
    slack = [1.5 + len(COUNTS) / 2 * count / 1000 for count in COUNTS]
    return [
        (math.floor(prefix * count / 1000 - s), math.ceil(prefix * count / 1000 + s))
        for count, s in zip(COUNTS, slack, strict=True)
    ]


@pytest.mark.parametrize("seed", [0, 7])
def test_every_prefix_of_the_order_is_stratified(seed: int) -> None:
    order = stratified_order(LABELS, seed)
    assert torch.equal(order.sort().values, torch.arange(1000))
    for prefix in range(1, 1001):
        found = LABELS[order[:prefix]].bincount(minlength=5).tolist()
        assert all(low <= count <= high for count, (low, high) in zip(found, fraction_bounds(prefix), strict=True))


def test_equal_classes_stay_level() -> None:
    labels = torch.arange(10).repeat(20)
    order = stratified_order(labels, 0)
    for prefix in range(1, 201):
        counts = labels[order[:prefix]].bincount(minlength=10)
        assert counts.max() - counts.min() <= 1


def test_the_order_depends_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first = stratified_order(LABELS, 1)
    torch.manual_seed(5)
    again = stratified_order(LABELS, 1)
    torch.set_rng_state(state)
    assert torch.equal(first, again)
    assert not torch.equal(first, stratified_order(LABELS, 2))
    assert torch.equal(state, torch.get_rng_state())


def test_validation_takes_a_stratified_share_and_training_the_rest() -> None:
    data = Numbered(val_size=0.2)
    data.setup("fit")
    train, val = read(data.train_dataloader()), read(data.val_dataloader())
    assert len(val) == 200
    assert sorted(train + val) == list(range(1000))
    assert data.val_set is not None
    assert data.val_set.labels.bincount(minlength=5).tolist() == pytest.approx([100, 60, 30, 10, 0], abs=1)


def test_a_subset_leaves_the_validation_images_alone_and_is_part_of_a_larger_one() -> None:
    parts = {}
    for size in (50, 200, None):
        data = Numbered(val_size=100, train_size=size)
        data.setup("fit")
        parts[size] = set(read(data.train_dataloader())), read(data.val_dataloader())
    assert [len(train) for train, _ in parts.values()] == [50, 200, 900]
    assert parts[50][0] < parts[200][0] < parts[None][0]
    assert parts[50][1] == parts[200][1] == parts[None][1]
    assert not parts[None][0] & set(parts[None][1])


def test_the_split_follows_split_seed_and_the_order_follows_seed() -> None:
    def orders(**kwargs: int) -> tuple[list[int], list[int]]:
        data = Numbered(**kwargs)
        data.setup("fit")
        return read(data.train_dataloader()), read(data.val_dataloader())

    train, val = orders()
    assert (train, val) == orders()
    other_train, same_val = orders(seed=1)
    assert other_train != train
    assert sorted(other_train) == sorted(train)
    assert same_val == val
    assert orders(split_seed=1)[1] != val


def test_evaluation_reads_in_order_and_prediction_reads_the_test_images() -> None:
    data = Numbered(eval_batch_size=7)
    data.setup()
    val = read(data.val_dataloader())
    assert val == sorted(val)
    assert read(data.test_dataloader()) == read(data.predict_dataloader()) == list(range(30))
    assert [len(labels) for _, labels in data.test_dataloader()] == [7, 7, 7, 7, 2]


@pytest.mark.parametrize(
    ("stage", "loaded"),
    [("fit", ["train"]), ("validate", ["train"]), ("test", ["test"]), ("predict", ["test"]), (None, ["train", "test"])],
)
def test_a_stage_loads_what_it_needs_once(stage: str | None, loaded: list[str]) -> None:
    data = Numbered()
    data.setup(stage)
    data.setup(stage)
    assert data.loaded == loaded


class Colored(ImageDataModule):
    classes, shape = ("a", "b"), (3, 4, 5)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    images: Tensor

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        return self.images, torch.arange(len(self.images)) % 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64], ids=str)
def test_a_batch_is_normalized_channel_by_channel(dtype: torch.dtype) -> None:
    data = Colored()
    data.images = torch.randint(0, 256, (20, 3, 4, 5)).to(dtype)
    data.setup("test")
    assert data.test_set is not None
    images, labels = data.test_set.__getitems__([3, 0, 19])
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (data.mean, data.std))
    expected = (data.images[[3, 0, 19]].double() / 255 - mean) / std
    assert images.dtype == torch.float32
    # values up to 8; four roundings of half a unit in the last place (2^-24 of the value), two of them to constants
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=4 * 8 * 2**-24)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [1, 0, 1]
    assert data.test_set.images.dtype == dtype
    image, label = data.test_set[3]
    assert torch.equal(image, images[0])
    assert label == 1


def test_a_batch_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(dataset: ImageDataset, indices: Iterable[int]) -> Any:
        calls.append(list(indices))
        return original(dataset, calls[-1])

    original = ImageDataset.__getitems__
    monkeypatch.setattr(ImageDataset, "__getitems__", spy)
    data = Numbered(batch_size=300)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert isinstance(data.train_dataloader(), ResumableLoader)
    assert [len(call) for call in calls] == [300, 300, 300]
    assert batches[0][0].shape == (300, 1, 1, 2)
    assert batches[0][1].shape == (300,)


def test_workers_bring_the_same_batches_and_persist() -> None:
    alone, helped = Numbered(), Numbered(num_workers=2)
    for data in (alone, helped):
        data.setup("fit")
    loader = helped.train_dataloader()
    assert loader.persistent_workers
    assert not alone.train_dataloader().persistent_workers
    assert read(loader) == read(alone.train_dataloader())
    loader._iterator = None  # end the workers, as the end of the program does


def test_drop_last() -> None:
    data = Numbered(batch_size=400, drop_last=True)
    data.setup("fit")
    assert [len(labels) for _, labels in data.train_dataloader()] == [400, 400]


def test_reading_uses_no_global_random_state() -> None:
    state = torch.get_rng_state()
    data = Numbered()
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        read(loader)
    assert torch.equal(state, torch.get_rng_state())


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(2, 5))


class Trained(Classifier):
    def __init__(self) -> None:
        super().__init__(Net(), num_classes=5)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(**kwargs: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        log_every_n_steps=1,
        **kwargs,
    )


@pytest.mark.parametrize("cores", [1, 2, 64])
def test_the_trainer_gives_no_advice_on_workers(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    run, data = trainer(), Numbered(batch_size=300)
    run.fit(Trained(), data)  # a warning would fail the test
    assert run.global_step == 3
    assert "val/loss" in run.callback_metrics
    run.test(Trained(), data, verbose=False)
    predictions = run.predict(Trained(), data)
    assert predictions is not None
    assert [part.shape for part in predictions] == [(30, 5)]


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("batch_size", 0, ">= 1"),
        ("eval_batch_size", 0, ">= 1"),
        ("val_size", 0, ">= 1"),
        ("val_size", 0.0, r"in \(0, 1\)"),
        ("val_size", math.nan, r"in \(0, 1\)"),
        ("val_size", 1.0, r"in \(0, 1\)"),
        ("train_size", 0, ">= 1"),
        ("num_workers", -1, ">= 0"),
        ("seed", -1, ">= 0"),
        ("split_seed", -1, ">= 0"),
    ],
)
def test_a_wrong_value_is_refused_at_construction(name: str, value: float, accepted: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}.* must be {accepted}.* got {value}$"):
        Numbered(**{name: value})


@pytest.mark.parametrize(
    ("sizes", "asked"),
    [
        ({"val_size": 1000}, "leaves 0, train_size=None asks for at least 1"),
        ({"val_size": 0.0004}, "takes 0 and leaves 1000"),
        ({"val_size": 2000}, "leaves 0, train_size=None asks for at least 1"),
        ({"val_size": 100, "train_size": 901}, "takes 100 and leaves 900, train_size=901 asks for 901"),
    ],
)
def test_more_images_than_there_are_is_refused_in_setup(sizes: dict[str, int], asked: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"Numbered has 1000 images .*{asked}"):
        Numbered(**sizes).setup("fit")


def test_loaders_before_setup() -> None:
    with pytest.raises(RuntimeError, match=r"call setup\(\) of Numbered first"):
        Numbered().train_dataloader()


def test_images_and_labels_of_different_length() -> None:
    with pytest.raises(ValueError, match="3 images but 2 labels"):
        ImageDataset(torch.zeros(3, 1, 1, 2), torch.zeros(2), Numbered())


def test_images_that_are_not_normalized_are_from_0_to_1() -> None:
    class Bytes(Numbered):
        max_value = 255.0
        mean, std = (0.4,), (0.2,)

        def load(self, split: str) -> tuple[Tensor, Tensor]:
            return (torch.arange(1000) % 256).view(-1, 1, 1).expand(-1, 1, 2).to(torch.uint8), LABELS

    data = Bytes(normalize=False, val_size=10)
    data.setup("fit")
    assert data.train_set is not None
    images, _ = data.train_set.__getitems__(range(len(data.train_set)))
    # a product with the rounded 1 / 255: one rounding more than the quotient
    assert torch.allclose(images, data.train_set.images / 255, rtol=2**-23, atol=0)
    assert (images.min(), images.max()) == (0, 1)
