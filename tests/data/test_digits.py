import pytest
import torch
from sklearn.datasets import load_digits

from lightning_opt.data import Digits


def test_the_parts_make_up_the_bundled_images() -> None:
    data = Digits()
    data.setup()
    parts = [data.train_set, data.val_set, data.test_set]
    assert [len(part) for part in parts if part is not None] == [1293, 144, 360]
    images = torch.cat([part.images.flatten(1) for part in parts if part is not None])
    labels = torch.cat([part.labels for part in parts if part is not None])
    found = sorted((label, *image) for image, label in zip(images.tolist(), labels.tolist(), strict=True))
    bundled = load_digits()
    assert found == sorted((int(y), *map(int, x)) for x, y in zip(bundled.data, bundled.target, strict=True))


def test_the_test_images_are_the_same_for_every_seed() -> None:
    first, second = Digits(), Digits(seed=1, split_seed=1, train_size=100, val_size=200)
    for data in (first, second):
        data.setup()
    assert first.test_set is not None
    assert second.test_set is not None
    assert first.val_set is not None
    assert second.val_set is not None
    assert torch.equal(first.test_set.images, second.test_set.images)
    assert not torch.equal(first.val_set.images[:100], second.val_set.images[:100])
    # 174 to 183 of each of the ten digits are bundled: a fifth of them is tested
    assert first.test_set.labels.bincount().tolist() == pytest.approx([36] * 10, abs=1)


def test_batches_are_normalized() -> None:
    data = Digits(batch_size=1437 - 144)
    data.setup()
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (1293, 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    # mean and std are those of the 1,437 images; 144 of them chosen at random change the mean by about 0.001
    assert abs(images.mean()) < 0.005
    assert abs(images.std() - 1) < 0.005
