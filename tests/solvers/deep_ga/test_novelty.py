import pytest
import torch

from lightning_opt.solvers.deep_ga import Novelty, novelty_scores, pad_behaviors


def brute_force(b, archive, k):
    """One behavior after the other, one distance after the other."""
    scores = []
    for i, behavior in enumerate(b):
        others = [o for j, o in enumerate(b) if j != i] + list(archive)
        distances = sorted(((behavior - other) ** 2).sum().sqrt().item() for other in others)
        scores.append(sum(distances[:k]) / min(k, len(distances)))
    return torch.tensor(scores, dtype=b.dtype)


@pytest.mark.parametrize(("k", "archived"), [(1, 0), (5, 7), (25, 30), (1000, 3)])
def test_novelty_is_the_mean_distance_to_the_nearest(k, archived):
    b, archive = torch.randn(40, 3, dtype=torch.float64), torch.randn(archived, 3, dtype=torch.float64)
    torch.testing.assert_close(novelty_scores(b, archive, k), brute_force(b, archive, k), rtol=1e-12, atol=1e-12)
    single = novelty_scores(b.float(), archive, k)
    torch.testing.assert_close(single.double(), brute_force(b, archive, k), rtol=1e-6, atol=1e-6)


def test_duplicates_are_not_novel():
    b = torch.randn(1, 4).repeat(6, 1) * 100
    b = torch.cat([b, torch.randn(3, 4)])
    scores = novelty_scores(b, None, k=5)
    assert (scores[:6] == 0).all()  # exactly: five others are equal
    assert (scores[6:] > 0).all()
    assert novelty_scores(b, None, k=6)[0] > 0


def test_padding_repeats_the_last_element():
    long, short = torch.randn(4, 2), torch.randn(2, 2)
    padded = pad_behaviors([long, short])
    assert torch.equal(padded[0], long.flatten())
    assert torch.equal(padded[1], torch.stack([short[0], short[1], short[1], short[1]]).flatten())


def test_bad_input():
    with pytest.raises(ValueError, match="no neighbor"):
        novelty_scores(torch.zeros(1, 2), None, 1)
    with pytest.raises(ValueError, match=r"\[N, d\]"):
        novelty_scores(torch.zeros(3), None, 1)
    with pytest.raises(ValueError, match="k must"):
        novelty_scores(torch.zeros(3, 1), None, 0)
    with pytest.raises(ValueError, match="at least one"):
        pad_behaviors([torch.zeros(0)])
    with pytest.raises(ValueError, match="archive_prob"):
        Novelty(archive_prob=1.5)
    with pytest.raises(ValueError, match="k must"):
        Novelty(k=0)
