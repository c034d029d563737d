"""What the tests of image metrics share."""

import pytest
from torch import Tensor

from lightning_opt.data import Digits, stratified_order


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Training images, held-out images and the labels of these, in random order."""
    data = Digits()
    (train, train_labels), (held_out, labels) = data.load("train"), data.load("test")
    # they lie in the order of their writers
    first, second = stratified_order(train_labels, seed=1), stratified_order(labels, seed=1)
    return train[first][:, None] / 16, held_out[second][:, None] / 16, labels[second]
