"""What compressors send, what arrives, and how much of a vector is lost."""

import math

import pytest
import torch

from lightning_opt.compression import Draw, Identity, QuantizeInt8, RandK, ScaledSign, TopK
from lightning_opt.compression.compressor import from_words, to_words
from lightning_opt.compression.randk import random_subset
from lightning_opt.compression.topk import top

ALL = [
    TopK(ratio=0.1),
    TopK(k=3, value_dtype="bfloat16"),
    RandK(ratio=0.1),
    RandK(ratio=0.6, value_dtype="float16"),
    ScaledSign(),
    QuantizeInt8(block=16),
    QuantizeInt8(block=16, rounding="stochastic"),
    QuantizeInt8(step=0.01),
    Identity(),
]
DRAW = Draw(step=3, name="w", rank=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("numel", [1, 7, 8, 33, 1000])
@pytest.mark.parametrize("compressor", ALL, ids=repr)
def test_a_message_has_the_size_that_was_said_and_adds_what_it_says(compressor, numel, dtype):
    v = torch.randn(numel, dtype=dtype)
    words = compressor.compress(v, DRAW)
    assert words.dtype == torch.int32
    assert len(words) == compressor.nwords(numel, dtype)
    assert compressor.nbytes(numel, dtype) == 4 * len(words)
    said = compressor.decompress(words, v, DRAW)
    target = torch.ones_like(v)
    shifted = torch.cat([words.new_zeros(1), words])[1:]  # begins where no float64 may lie
    assert compressor.add_(target, shifted, 0.5, DRAW) is target
    largest = 1 + float(said.abs().max())
    torch.testing.assert_close(target, 1 + 0.5 * said, rtol=0, atol=2 * torch.finfo(dtype).eps * largest)


@pytest.mark.parametrize("compressor", ALL, ids=repr)
def test_the_contraction_holds(compressor):
    vectors = [torch.randn(500), torch.randn(500) ** 5, torch.eye(500)[7], torch.zeros(500)]
    for v in vectors:
        # RandK contracts on average over its draws only: 400 of them, of a relative spread below 1, miss it by 0.05
        losses = []
        for step in range(400 if isinstance(compressor, RandK) else 1):
            draw = Draw(step=step)
            losses.append((compressor.decompress(compressor.compress(v, draw), v, draw) - v).square().sum())
        delta = compressor.delta(500)
        if delta is not None:
            slack = 5 * delta / math.sqrt(400 * 0.1) if isinstance(compressor, RandK) else 2e-5  # rounding to bfloat16
            assert torch.stack(losses).mean() <= (1 - delta + slack) * v.square().sum() + 1e-12
        if isinstance(compressor, ScaledSign) and v.any():
            own = v.abs().sum() ** 2 / (500 * v.square().sum())
            torch.testing.assert_close(losses[0] / v.square().sum(), 1 - own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compressor", ALL, ids=repr)
def test_homogeneous_compressors_scale(compressor):
    """By a power of two, so that rounding is the same."""
    v = torch.randn(100)
    scaled = compressor.decompress(compressor.compress(4 * v, DRAW), v, DRAW)
    plain = compressor.decompress(compressor.compress(v, DRAW), v, DRAW)
    assert torch.equal(scaled, 4 * plain) == compressor.homogeneous


@pytest.mark.parametrize("numel", [10, 2**15 - 1, 2**15, 100_003])
@pytest.mark.parametrize("part", [0.001, 0.01, 0.12, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["normal", "heavy", "equal", "few", "sorted"])
def test_top_finds_the_largest(numel, part, kind):
    v = torch.randn(numel)
    if kind == "heavy":
        v = v**9
    elif kind == "equal":
        v = torch.ones(numel)
    elif kind == "few":
        v = torch.where(torch.rand(numel) < 0.0005, v, 0)
    elif kind == "sorted":
        v = v.sort().values
    k = max(1, int(part * numel))
    places = top(v, k)
    assert len(places.unique()) == len(places) == k
    assert torch.equal(v[places].abs().sort().values, v.abs().topk(k).values.flip(0))
    assert torch.equal(places, top(v.clone(), k))


def test_values_travel_rounded():
    v = torch.tensor([1 + 2**-10, 0.0, 0.0])
    compressor = TopK(k=1, value_dtype="bfloat16")
    assert compressor.decompress(compressor.compress(v), v).tolist() == [1.0, 0.0, 0.0]
    assert compressor.nbytes(1000) == 8
    assert TopK(k=2, value_dtype="float16").nbytes(1000) == 12  # two values share a word
    assert TopK(ratio=0.01).nbytes(16384) == 164 * 8


def test_random_places_are_the_same_on_all_ranks_and_others_at_each_step():
    v = torch.arange(1.0, 1001)
    compressor = RandK(k=50)
    sent = {
        (step, name, rank): compressor.decompress(compressor.compress(v, d), v, d).nonzero().flatten().tolist()
        for step in range(2)
        for name in "ab"
        for rank in range(2)
        for d in [Draw(step, name, rank)]
    }
    assert sent[0, "a", 0] == sent[0, "a", 1]
    assert len({tuple(places) for places in sent.values()}) == 4
    assert compressor.nbytes(1000) == 200  # no place travels
    assert RandK(k=50, seed=1).compress(v).tolist() != compressor.compress(v).tolist()


@pytest.mark.parametrize(("numel", "k"), [(20, 3), (20, 15), (5, 5)])
def test_every_place_is_drawn_as_often(numel, k):
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(numel)
    for _ in range(2000):
        places = random_subset(numel, k, generator)
        assert len(places.unique()) == k
        counts[places] += 1
    p = k / numel
    # five standard deviations of a binomial count
    assert (counts - 2000 * p).abs().max() <= 5 * math.sqrt(2000 * p * (1 - p)) + 1e-9


def test_stochastic_rounding_is_right_on_average_and_its_own_on_each_rank():
    v = torch.full((1000,), 0.3)
    compressor = QuantizeInt8(step=1.0, rounding="stochastic")
    said = [compressor.decompress(compressor.compress(v, Draw(0, "w", rank)), v) for rank in range(2)]
    # five standard deviations of the mean of 1000 draws of 0 or 1
    assert all(abs(float(s.mean()) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 1000) for s in said)
    assert not torch.equal(*said)
    assert torch.equal(said[0], compressor.decompress(compressor.compress(v, Draw(0, "w", 0)), v))


def test_an_int8_error_is_at_most_half_a_step():
    v = torch.randn(1000)
    for compressor, step in [(QuantizeInt8(block=1000), v.abs().max() / 127), (QuantizeInt8(step=0.05), 0.05)]:
        error = (compressor.decompress(compressor.compress(v), v) - v).abs().max()
        assert error <= 0.5 * step * (1 + 1e-4)
    cut = QuantizeInt8(step=0.01)
    assert float(cut.decompress(cut.compress(torch.tensor([9.0])), v[:1])) == pytest.approx(1.27)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.uint8])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 8])
def test_words_round_trip(dtype, count):
    values = torch.arange(count).to(dtype)
    assert torch.equal(from_words(to_words(values), dtype, count), values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(ratio=0.0), r"ratio must be in \(0, 1\], got 0.0"),
        (lambda: TopK(ratio=1.5), r"ratio must be in \(0, 1\], got 1.5"),
        (lambda: TopK(k=0), "k must be >= 1 and finite, got 0"),
        (lambda: RandK(ratio=float("nan")), r"ratio must be in \(0, 1\], got nan"),
        (lambda: TopK(value_dtype="float8"), "value_dtype must be one of"),
        (lambda: QuantizeInt8(block=0), "block must be >= 1"),
        (lambda: QuantizeInt8(step=0.0), "step must be > 0"),
        (lambda: QuantizeInt8(rounding="up"), "rounding must be one of 'nearest', 'stochastic'; got 'up'"),
    ],
)
def test_wrong_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()
