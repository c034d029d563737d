"""Counter-based normal noise: the generator's published vectors, an independent implementation, and statistics."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_opt.diffusion import NoiseKey, draw_noise_key, philox4x32, philox_normal
from tests.reference import philox as reference

# the known-answer tests of Random123, Philox4x32 with 10 rounds: counter, key, words
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
KEYS = [(0, 0), (1, 2**32 - 2), (2**63 + 5, 2**40), (2**64 - 1, 2**64 - 2)]  # the last one's counters begin again


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    assert reference.philox4x32(words(counter), words(key)) == words(expected)
    counters = torch.tensor([words(counter)] * 2)
    assert philox4x32(counters, words(key)).tolist() == [list(words(expected))] * 2


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("count", [1, 4, 41])
def test_numbers_equal_those_of_plain_python(key, count):
    expected = torch.from_numpy(reference.normal(count, *key))
    actual = philox_normal((count,), key, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(philox_normal((count,), key), actual.float())


def test_a_number_depends_on_its_place_alone():
    stream = philox_normal((400,), NoiseKey(3, 2**32 - 50))
    assert torch.equal(stream.reshape(4, 5, 20), philox_normal((4, 5, 20), NoiseKey(3, 2**32 - 50)))
    assert torch.equal(stream[240:], philox_normal((160,), NoiseKey(3, 2**32 + 10)))
    assert philox_normal((0, 3), NoiseKey(3)).shape == (0, 3)


def test_distribution():
    x = philox_normal((200_000,), NoiseKey(2023)).double().numpy()
    n = len(x)
    assert abs(x.mean()) < 4 / math.sqrt(n)  # four standard errors each
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert stats.kstest(x, "norm").pvalue > 1e-3
    assert 3.8 < np.abs(x).max() < 6  # a fair share of tails: of 200,000 numbers the largest is about 4.4


def test_streams_and_neighbors_are_independent():
    """Pairs within a counter, counters side by side, and equal places of different offsets and seeds."""
    n = 100_000
    x = philox_normal((n,), NoiseKey(7)).double()
    others = {
        "seed": philox_normal((n,), NoiseKey(8)).double(),
        "high word of the seed": philox_normal((n,), NoiseKey(7 + 2**32)).double(),
        "high word of the offset": philox_normal((n,), NoiseKey(7, 2**32)).double(),
        "offset behind": philox_normal((n,), NoiseKey(7, n // 4)).double(),
        "neighbor": x.roll(1),
        "other pair": x.roll(2),
        "next counter": x.roll(4),
    }
    for name, y in others.items():
        for p, q in ((x, y), (x**2 - 1, y**2 - 1)):
            correlation = (p * q).mean() / (p.std() * q.std())
            assert abs(correlation) < 4.5 / math.sqrt(n), name
    places = x.reshape(-1, 4).T.numpy()  # each number of a counter is normal by itself
    assert all(stats.kstest(place, "norm").pvalue > 1e-3 for place in places)


def test_a_cpu_generator_gives_keys_that_its_state_decides():
    first, second = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    before = torch.get_rng_state()
    keys = [draw_noise_key(first, 10) for _ in range(3)]
    assert keys == [draw_noise_key(second, 10) for _ in range(3)]
    assert len({key.seed for key in keys}) == 3
    assert max(key.seed for key in keys) > 2**32
    state = first.get_state()
    resumed = torch.Generator()
    resumed.set_state(state)
    assert draw_noise_key(resumed, 10) == draw_noise_key(first, 10)
    assert torch.equal(torch.get_rng_state(), before)


class CudaGenerator(torch.Generator):
    """As much of a CUDA generator as a machine without one can show."""

    device = torch.device("cuda")
    offset = 8

    def initial_seed(self) -> int:
        return -3

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        self.offset = offset


def test_a_cuda_generator_gives_its_seed_and_moves_its_offset():
    generator = CudaGenerator()
    assert draw_noise_key(generator, 9) == NoiseKey(2**64 - 3, 2)
    assert generator.offset == 8 + 4 * 3  # torch counts words; 9 numbers take 3 counters
    assert draw_noise_key(generator, 1) == NoiseKey(2**64 - 3, 5)


@pytest.mark.parametrize(("key", "name"), [((-1, 0), "seed"), ((0, 2**64), "offset")])
def test_keys_out_of_range_are_refused(key, name):
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 2\*\*64\)"):
        philox_normal((3,), key)
