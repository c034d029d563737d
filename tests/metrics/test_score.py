import json

import pytest
import torch
from torch import nn

from lightning_opt.metrics import frechet_distance, score_samples


@pytest.fixture(scope="module")
def scores(digits):
    """Of samples that are as good as can be: the other half of the held-out images."""
    train, held_out, _ = digits
    return score_samples(held_out[180:], held_out[:180], train)


def test_held_out_images_as_samples_score_as_real_ones(scores):
    assert scores.count == 180
    assert scores.samples.frechet < 1.5 * scores.real.frechet
    assert scores.real.frechet < 0.05 * scores.noise.frechet
    assert abs(scores.samples.kernel) < 0.05 * scores.noise.kernel
    assert min(scores.samples.precision, scores.samples.recall, scores.real.precision, scores.real.recall) > 0.6
    assert max(scores.noise.precision, scores.noise.recall) < 0.05
    assert scores.samples.sliced_wasserstein < 0.2 * scores.noise.sliced_wasserstein
    assert scores.nearest == pytest.approx(scores.nearest_held_out, rel=0.2)
    assert not scores.missing_classes
    assert scores.samples.confidence > 0.9


def test_each_number_is_that_of_its_function(digits, scores):
    _, held_out, labels = digits
    assert scores.samples.frechet == pytest.approx(frechet_distance(held_out[180:], held_out[:180]), rel=1e-9)
    counts = torch.tensor([scores.samples.class_counts[name] for name in map(str, range(10))])
    assert int((counts - labels[180:].bincount()).abs().sum()) <= 12  # the classifier errs on a few
    assert sum(scores.held_out_class_counts.values()) == 180


def test_memorized_samples_are_seen_by_their_nearest_neighbors(digits, scores):
    train, held_out, _ = digits
    memorized = score_samples(train[:180], held_out[:180], train)
    assert memorized.nearest == 0
    assert memorized.nearest_held_out == scores.nearest_held_out > 0.05
    assert memorized.samples.frechet < 1.5 * memorized.real.frechet  # no distance sees it


def test_a_dropped_mode_is_seen_by_recall_and_by_the_class_counts(digits, scores):
    train, held_out, labels = digits
    few = held_out[180:][labels[180:] < 5]
    samples = few.repeat(3, 1, 1, 1)[:180]
    dropped = score_samples(samples, held_out[:180], train)
    assert set(dropped.missing_classes) >= {"6", "7"}
    assert dropped.samples.recall < 0.6 < scores.samples.recall
    assert dropped.samples.precision > 0.6
    assert dropped.samples.frechet > 3 * scores.samples.frechet
    assert "no sample is of" in str(dropped)


def test_the_table_and_the_flat_numbers(scores):
    flat = scores.as_dict()
    assert flat["frechet"] == scores.samples.frechet
    assert flat["frechet_real"] == scores.real.frechet
    assert flat["frechet_noise"] == scores.noise.frechet
    assert len(flat) == 3 * 6 + 2
    json.dumps(flat)
    table = str(scores).splitlines()
    assert "180 of each" in table[0]
    assert f"{scores.samples.frechet:.4g}" in table[1]
    assert f"{scores.noise.frechet:.4g}" in table[1]
    assert "no sample is of" not in str(scores)


def test_the_seed_alone_decides(digits, scores):
    train, held_out, _ = digits
    state = torch.get_rng_state()
    assert score_samples(held_out[180:], held_out[:180], train) == scores
    assert torch.equal(torch.get_rng_state(), state)
    other = score_samples(held_out[180:], held_out[:180], train, seed=1)
    assert other.real.frechet != scores.real.frechet
    assert other.samples.frechet == scores.samples.frechet


class Pixels(nn.Flatten):
    num_features = 64


def test_a_net_that_classifies_nothing(digits):
    train, held_out, _ = digits
    scores = score_samples(held_out[180:], held_out[:180], train, features=Pixels())
    assert scores.samples.confidence is None
    assert not scores.held_out_class_counts
    assert "confidence" not in str(scores)
    assert "confidence" not in scores.as_dict()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((20, 21, 30), "held_out must hold as many images as samples, 20, got 21: choose 20 at random"),
        ((20, 20, 19), "real must hold at least as many images as samples, 20, got 19"),
        ((3, 3, 3), r"k must be in \[1, 2\], got 3"),
    ],
)
def test_wrong_counts(digits, sizes, message):
    _, held_out, _ = digits
    samples, held, real = (held_out[:size] for size in sizes)
    with pytest.raises(ValueError, match=message):
        score_samples(samples, held, real)


def test_wrong_images(digits):
    _, held_out, _ = digits
    with pytest.raises(ValueError, match=r"samples must be in \[0, 1\] and finite, got values from -1 to 1"):
        score_samples(2 * held_out - 1, held_out, held_out)
    with pytest.raises(ValueError, match="floating-point tensor"):
        score_samples(held_out, (16 * held_out).byte(), held_out)
    with pytest.raises(ValueError, match=r"real must be of shape \[N, 1, 8, 8\]"):
        score_samples(held_out, held_out, torch.rand(400, 1, 28, 28))
    with pytest.raises(ValueError, match="features must be a net's name"):
        score_samples(held_out, held_out, held_out, features=None)
