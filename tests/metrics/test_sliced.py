import math

import pytest
import torch

from lightning_opt.metrics import sliced_wasserstein


def images(count, seed):
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_set_with_itself_in_another_order():
    assert sliced_wasserstein(images(30, 1), images(30, 1).flip(0)) < 1e-14


def test_a_shift_moves_each_projection_by_its_share():
    """Mean of |<u, 1>| c over directions; for large dimensions <u, 1> is normal with variance 1."""
    x = 0.5 * torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = 0.25 * math.sqrt(2 / math.pi)
    ours = sliced_wasserstein(x + 0.25, x, directions=4000)
    assert ours == pytest.approx(expected, rel=4 * math.sqrt(math.pi / 2 - 1) / 4000**0.5)


def test_depends_on_its_seed_alone():
    x, y = images(30, 1), images(30, 2)
    first = sliced_wasserstein(x, y)
    state = torch.get_rng_state()
    assert sliced_wasserstein(x, y) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert sliced_wasserstein(x, y, seed=1) != first


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (images(29, 2), "equally many images, got 30 and 29"),
        (images(30, 2) + 1, r"reference must be in \[0, 1\]"),
        (torch.rand(30, 1, 5, 5), r"reference must be of shape \[N, 1, 4, 4\]"),
    ],
)
def test_wrong_images_are_named(other, message):
    with pytest.raises(ValueError, match=message):
        sliced_wasserstein(images(30, 1), other)
