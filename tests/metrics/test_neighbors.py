import math

import pytest
import torch

from lightning_opt.metrics import nearest_neighbor_distance, precision_recall
from tests.reference import image_metrics as naive


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ring(count, seed, radius=10.0, width=0.1):
    """Points near a circle: a manifold of one dimension in a plane."""
    angles = 2 * math.pi * torch.rand(count, generator=generator(seed), dtype=torch.float64)
    radii = radius + width * torch.randn(count, generator=generator(seed + 100), dtype=torch.float64)
    return torch.stack([radii * angles.cos(), radii * angles.sin()], dim=1)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_follows_the_naive_reference(k):
    a, b = torch.rand(2, 40, 3, generator=generator()).double()
    ours = precision_recall(a, b + 0.2, k, features=None)
    assert ours == pytest.approx(naive.precision_recall(a.numpy(), (b + 0.2).numpy(), k), abs=1e-12)
    assert 0 < ours.precision < 1


def test_the_same_manifold():
    precision, recall = precision_recall(ring(500, 1), ring(500, 2), features=None)
    assert precision > 0.9
    assert recall > 0.9


def test_off_the_manifold_precision_is_low():
    """The inner circle of half the samples touches no ball of the outer one."""
    samples = torch.cat([ring(250, 1), ring(250, 3, radius=5.0)])
    precision, recall = precision_recall(samples, ring(500, 2), features=None)
    assert precision == pytest.approx(0.5, abs=0.05)
    assert recall > 0.8


def test_a_dropped_mode_lowers_recall_alone():
    """Samples of one of two circles: half of the reference is nowhere near."""
    reference = torch.cat([ring(250, 2), ring(250, 4, radius=20.0)])
    precision, recall = precision_recall(ring(500, 1), reference, features=None)
    assert precision > 0.8
    assert recall == pytest.approx(0.5, abs=0.05)


def test_one_point_repeated_has_full_precision_and_no_recall():
    reference = ring(200, 2)
    samples = reference[:1].expand(200, 2)
    assert precision_recall(samples, reference, features=None) == (1.0, 1 / 200)  # its balls have radius 0


def test_chunks_make_no_difference(monkeypatch):
    a, b = ring(300, 1, width=1.0), ring(300, 2, width=1.0)
    whole = precision_recall(a, b, features=None)
    monkeypatch.setattr("lightning_opt.metrics.neighbors._ROWS", 7)
    assert precision_recall(a, b, features=None) == whole


@pytest.mark.parametrize("k", [0, 9])
def test_a_neighbor_that_is_not_there(k):
    with pytest.raises(ValueError, match=rf"k must be in \[1, 8\], got {k}"):
        precision_recall(torch.rand(9, 2), torch.rand(9, 2), k, features=None)


def test_sets_of_unequal_size():
    with pytest.raises(ValueError, match="equally many images"):
        precision_recall(torch.rand(9, 2), torch.rand(8, 2), features=None)


def test_nearest_neighbor_distance_is_that_of_all_pairs():
    samples, train = torch.rand(20, 1, 3, 3, generator=generator(1)), torch.rand(50, 1, 3, 3, generator=generator(2))
    pairs = torch.cdist(samples.flatten(1).double(), train.flatten(1).double()) / 3  # root mean square over nine pixels
    torch.testing.assert_close(nearest_neighbor_distance(samples, train), pairs.min(dim=1).values, rtol=1e-9, atol=0)


def test_a_copy_has_distance_zero_exactly():
    train = torch.rand(500, 1, 28, 28, generator=generator())
    copies = train[100:110].clone()
    assert nearest_neighbor_distance(copies, train).tolist() == [0.0] * 10
    assert float(nearest_neighbor_distance((copies + 1e-3).clamp(max=1), train).max()) == pytest.approx(1e-3, rel=0.01)


def test_nearest_neighbor_distance_refuses_other_images():
    with pytest.raises(ValueError, match=r"train must be of shape \[N, 1, 3, 3\], got \[5, 1, 4, 4\]"):
        nearest_neighbor_distance(torch.rand(5, 1, 3, 3), torch.rand(5, 1, 4, 4))
    with pytest.raises(ValueError, match=r"samples must be in \[0, 1\]"):
        nearest_neighbor_distance(torch.rand(5, 1, 3, 3) + 1, torch.rand(5, 1, 3, 3))
