import math
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_opt import registry
from lightning_opt.data import (
    KMNIST,
    MNIST,
    CorruptDataError,
    DataNotFoundError,
    Digits,
    FashionMNIST,
    IdxImages,
    ImageDataModule,
    write_idx,
)

SETS = (MNIST, FashionMNIST, KMNIST)


@pytest.fixture
def random_images(tmp_path: Path) -> str:
    """A folder with each data set in small: 50 + 20 random images."""
    for cls in SETS:
        folder = tmp_path / cls.folders[1]
        folder.mkdir(parents=True)
        for split, count in (("train", 50), ("test", 20)):
            images, labels = cls.files[split]
            write_idx(folder / f"{images.name}.gz", torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8))
            write_idx(folder / f"{labels.name}.gz", torch.arange(count, dtype=torch.uint8) % 10)
    return str(tmp_path)


@pytest.mark.parametrize("cls", SETS)
def test_reads_the_four_files(cls: type[IdxImages], random_images: str) -> None:
    data = cls(root=random_images, verify=False, batch_size=15, train_size=30)
    data.prepare_data()
    data.setup()
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (15, 1, 28, 28)
    assert labels.shape == (15,)
    assert data.train_set is not None
    assert data.test_set is not None
    assert data.train_set.labels.bincount().tolist() == pytest.approx([3] * 10, abs=1)
    # uniform pixels have mean 1/2; the mean of 20 * 784 of them is within 5 standard errors of 0.29 / sqrt(15,680)
    images, _ = next(iter(data.test_dataloader()))
    restored = images.mean() * cls.std[0] + cls.mean[0]
    assert abs(restored - 0.5) < 5 * 0.29 / math.sqrt(20 * 784)


@pytest.mark.parametrize("cls", SETS)
def test_other_images_under_the_published_names_are_refused(cls: type[IdxImages], random_images: str) -> None:
    with pytest.raises(CorruptDataError, match=f"{cls.folders[1]}/t10k-images-idx3-ubyte.gz is .* not the published"):
        cls(root=random_images).setup("test")


@pytest.mark.parametrize("cls", SETS)
def test_every_archive_has_its_own_checksum_and_a_mirror_is_a_folder(cls: type[IdxImages]) -> None:
    files = [file for pair in cls.files.values() for file in pair]
    sums = [file.archive_sha256 for file in files] + [file.content_sha256 for file in files if file.content_sha256]
    assert len(set(sums)) == len(sums) >= 6
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in sums)
    assert all(re.fullmatch("https?://.*/", mirror) for mirror in cls.mirrors)
    assert len(cls.mirrors) >= 2


def test_fashion_mnist_is_found_where_debian_installs_it() -> None:
    # the file list of the package dataset-fashion-mnist
    assert FashionMNIST.system_folder == "/usr/share/datasets/fashion-mnist"


@pytest.mark.parametrize("cls", [*SETS, Digits])
def test_a_config_builds_it_by_its_short_name(cls: type[ImageDataModule]) -> None:
    name = cls.__name__
    assert registry.find(name).kind == "data"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    arguments: dict[str, Any] = {"batch_size": 7, "val_size": 0.25, "train_size": 100, "seed": 3}
    if name != "Digits":
        arguments["root"] = "/somewhere"
    data = parser.instantiate(parser.parse_object({"data": {"class_path": name, "init_args": arguments}})).data
    assert type(data) is cls
    assert {key: getattr(data, key) for key in arguments} == arguments


def test_without_training_files_the_test_images_are_divided(
    random_images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # nothing was fetched before
    monkeypatch.setattr(KMNIST, "mirrors", ())
    options = {"root": random_images, "verify": False, "val_size": 4, "batch_size": 1, "divide_test": True}
    whole = KMNIST(**options)
    whole.prepare_data()
    whole.setup()
    assert whole.train_set is not None
    assert len(whole.train_set) == 46  # of 50 training images: the option changes nothing where they are
    for file in KMNIST.files["train"]:
        (Path(random_images) / "KMNIST/raw" / f"{file.name}.gz").unlink()
    parts = []
    for stage in ("fit", "test"):  # which come to the same division one by one
        data = KMNIST(**options)
        data.prepare_data()
        with pytest.warns(UserWarning, match="of the 20 test images 16 serve for training and validation and 4 for"):
            data.setup(stage)
        sets = [data.train_set, data.val_set, data.test_set]
        parts += [part.images for part in sets if part is not None]
    assert [len(part) for part in parts] == [12, 4, 4]
    assert len(torch.cat(parts).unique(dim=0)) == 20
    with pytest.raises(DataNotFoundError, match=r"train-images-idx3-ubyte is not at hand"):
        KMNIST(root=random_images, verify=False).prepare_data()
