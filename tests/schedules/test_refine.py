import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from lightning_opt.schedules import last_iterate_bound, refine_schedule, resample, smooth_norms
from lightning_opt.schedules.refine import tail_sums
from tests.reference import refinement


def record(steps, seed=0):
    """Norms like those of a run: they fall, and are noisy."""
    generator = np.random.default_rng(seed)
    return 3 / np.sqrt(1 + np.arange(steps) / 20) * np.exp(0.4 * generator.standard_normal(steps))


# --- closed forms ---


@pytest.mark.parametrize("method", ["sgd", "adam"])
@pytest.mark.parametrize("norm", [1e-8, 1.0, 3e7])
def test_constant_norms_give_linear_decay(method, norm):
    total = 200
    schedule = refine_schedule(torch.full((total,), norm), method)
    expected = (total - torch.arange(1, total + 1, dtype=torch.float64)) / (total - 1)
    torch.testing.assert_close(schedule, expected, rtol=0, atol=1e-12)
    assert schedule[-1] == 0


@pytest.mark.parametrize(("method", "ratio"), [("sgd", 4.0), ("adam", 2.0)])
def test_norms_that_halve_in_the_middle(method, ratio):
    """Norms 2 then 1: weights 1/ratio then 1, so tail sums are of two straight pieces."""
    total, half = 100, 50
    norms = torch.cat([torch.full((half,), 2.0), torch.ones(half)])
    t = torch.arange(1, total + 1, dtype=torch.float64)
    # the first half: (half - t) of its own weight and half of the other's; the second: what is left of it
    expected = torch.where(t <= half, ((half - t) / ratio + half) / ratio, total - t)
    torch.testing.assert_close(refine_schedule(norms, method), expected / expected.max(), rtol=0, atol=1e-12)
    assert refine_schedule(norms, method).argmax() == half  # the rate rises when the norms fall


def test_the_tail_sum_identity():
    """The last value is the weighted mean and what follows from the tails; arXiv:2310.07831, lemma of theorem 1."""
    generator = torch.Generator().manual_seed(0)
    for total in (2, 7, 50):
        w = torch.rand(total, generator=generator, dtype=torch.float64) + 0.1
        q = torch.randn(total, generator=generator, dtype=torch.float64)
        later, here = tail_sums(w), w + tail_sums(w)
        value = (w * q).sum() / w.sum()
        for k in range(total - 1):
            value += w[k] / later[k] / here[k] * (w[k:] * (q[k:] - q[k])).sum()
        # sums of 50 terms of size 1
        torch.testing.assert_close(value, q[-1], rtol=0, atol=1e-13)


# --- parity ---


@pytest.mark.parametrize(("method", "power"), [("sgd", 2), ("adam", 1)])
@pytest.mark.parametrize(("steps", "tau"), [(30, 0.1), (31, 0.5), (500, 0.1), (499, 0.037)])
def test_parity_with_the_formula(method, power, steps, tau):
    norms = record(steps)
    expected = refinement.refine(norms, power, tau)
    actual = refine_schedule(torch.from_numpy(norms), method, tau)
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("steps", "tau"), [(30, 0.1), (100, 0.31), (101, 0.5)])
def test_the_median_filter(steps, tau):
    norms = record(steps, seed=1)
    smoothed = smooth_norms(torch.from_numpy(norms), tau, floor=0.0).norms.numpy()
    np.testing.assert_array_equal(smoothed, refinement.smooth(norms, tau))
    width = 2 * (math.floor(tau * steps) // 2) + 1
    padded = np.pad(norms, (0, 2 * width), mode="reflect")
    np.testing.assert_array_equal(smoothed, ndimage.median_filter(padded, size=width, mode="nearest")[:steps])


# --- the bound ---


def test_the_bound_against_explicit_sums():
    norms, rates = record(40), np.random.default_rng(2).uniform(0.1, 1, 40)
    ours = last_iterate_bound(torch.from_numpy(norms), torch.from_numpy(rates), 1.7)
    assert ours.item() == pytest.approx(refinement.bound(norms, rates, 1.7), rel=1e-13)


def test_the_bound_holds():
    """Subgradient descent on |A x - b|, with the norms that it has."""
    generator = np.random.default_rng(0)
    total = 60
    for _ in range(20):
        a = generator.standard_normal((15, 4))
        x_star = generator.standard_normal(4)
        distance = np.linalg.norm(x_star)
        shapes = {"linear": np.linspace(1, 0, total + 1)[:-1], "constant": np.ones(total)}
        for shape in shapes.values():
            rates = shape * distance / (np.linalg.norm(a, 2) * math.sqrt(15 * total))
            x, norms = np.zeros(4), []
            for rate in rates:
                last, g = x, a.T @ np.sign(a @ (x - x_star))
                norms.append(np.linalg.norm(g))
                x = x - rate * g
            bound = last_iterate_bound(torch.tensor(norms), torch.from_numpy(rates), distance).item()
            assert np.abs(a @ (last - x_star)).sum() <= bound  # the bound is about x_T, before the T-th step


def test_the_numeric_schedule_has_the_smallest_bound():
    norms = torch.from_numpy(record(80))
    smooth, distance = smooth_norms(norms).norms, 1.0

    def best(schedule):
        scales = torch.logspace(-3, 2, 300, dtype=torch.float64)
        shape = torch.cat([schedule[:-1], schedule[-2:-1]])  # x_T is reached before the T-th step, whose rate is free
        return min(last_iterate_bound(smooth, scale * shape, distance).item() for scale in scales)

    bounds = {method: best(refine_schedule(norms, method)) for method in ("sgd", "adam", "numeric")}
    bounds["linear"] = best(torch.linspace(1, 0, 81, dtype=torch.float64)[:-1])
    assert bounds["numeric"] < min(bounds["sgd"], bounds["adam"], bounds["linear"])
    assert bounds["sgd"] < bounds["linear"]  # what refinement promises


def test_the_numeric_schedule_of_constant_norms_is_nearly_linear():
    schedule = refine_schedule(torch.ones(100), "numeric")
    linear = torch.linspace(1, 0, 101, dtype=torch.float64)[:-1]
    assert (schedule - linear)[:-1].abs().max() < 0.03
    with pytest.raises(ValueError, match="at most 5000 norms, got 5001"):
        refine_schedule(torch.ones(5001), "numeric")


# --- pitfalls ---


def test_norms_that_vanish_are_clamped_and_said_to_be():
    norms = torch.cat([torch.ones(150), torch.full((50,), 1e-9)])
    with pytest.warns(UserWarning, match="25% of the smoothed gradient norms are below floor=0.001"):
        clamped = refine_schedule(norms)
    assert smooth_norms(norms).clamped == pytest.approx(0.25, abs=0.05)
    assert clamped.argmax() == 150
    torch.testing.assert_close(smooth_norms(norms).norms[160:], torch.full((40,), 1e-3).double())


def test_large_norms_at_the_beginning_are_a_warm_up():
    """As the first norm is repeated before the beginning; the median of reflected norms would be 1 from the start."""
    norms = torch.tensor([8.0, 4.0, 2.0] + [1.0] * 97)
    assert torch.equal(smooth_norms(norms, tau=0.1).norms, norms.double())  # by a filter 11 wide
    schedule = refine_schedule(norms, tau=0.1)
    assert schedule.argmax() == 3  # weight 1, and 96 of weight 1 behind it
    assert schedule[0].item() == pytest.approx((1 / 16 + 1 / 4 + 97) / 64 / 96, rel=1e-12)


def test_infinite_norms_are_dropped_and_the_length_stays():
    norms = torch.from_numpy(record(100))
    with_infinite = torch.cat([torch.tensor([math.inf]).double(), norms, torch.tensor([math.inf]).double()])
    schedule = refine_schedule(with_infinite)
    torch.testing.assert_close(schedule, resample(refine_schedule(norms), 102), rtol=0, atol=1e-15)


def test_another_length():
    norms = torch.from_numpy(record(100))
    whole, half = refine_schedule(norms), refine_schedule(norms, total_steps=199)
    torch.testing.assert_close(half[::2], whole, rtol=0, atol=1e-15)
    torch.testing.assert_close(half[1::2], (whole[1:] + whole[:-1]) / 2, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("norms", "kwargs", "message"),
    [
        (torch.ones(0), {}, r"must be a vector with one norm a step, got shape \(0,\)"),
        (torch.ones(30, 2), {}, r"got shape \(30, 2\)"),
        (torch.tensor([1.0] * 40 + [math.nan]), {}, "got NaN at step 40: the run has diverged"),
        (torch.tensor([1.0] * 40 + [-2.0]), {}, "norms must be >= 0, got -2.0"),
        (torch.zeros(40), {}, "must not all be zero"),
        (torch.tensor([*[0.0] * 50, 1.0, *[0.0] * 49]), {}, "must not be zero in most of every window"),
        (torch.tensor([1.0] * 50 + [0.0] * 50), {"floor": 0.0}, "floor must be > 0 where"),
        (torch.ones(29), {}, r"tau \* len\(norms\) must be at least 3, got 0.1 \* 29"),
        (torch.ones(40), {"tau": 0.0}, r"tau must be in \(0.0, 0.5\]"),
        (torch.ones(40), {"tau": 0.6}, r"tau must be in \(0.0, 0.5\]"),
        (torch.ones(40), {"floor": 2.0}, r"floor must be in \[0.0, 1.0\]"),
        (torch.ones(40), {"total_steps": 1}, "total_steps must be an integer >= 2, got 1"),
        (torch.ones(40), {"method": "lion"}, "method must be one of 'sgd', 'adam', 'numeric'"),
    ],
)
def test_wrong_values(norms, kwargs, message):
    with pytest.raises(ValueError, match=message):
        refine_schedule(norms, **kwargs)


def test_a_short_record_works_with_a_wider_filter():
    assert len(refine_schedule(torch.ones(8), tau=0.4)) == 8


# --- effect ---


def test_refined_from_a_linear_run_on_digits():
    """Softmax regression on six principal components: warm-up appears, and the loss is that of tuned linear decay."""
    from sklearn.datasets import load_digits
    from sklearn.decomposition import PCA

    x, labels = load_digits(return_X_y=True)
    x = PCA(6, random_state=0).fit_transform(x)
    x = np.hstack([(x - x.mean(0)) / x.std(0), np.ones((len(x), 1))])
    y, total = np.eye(10)[labels], 2000
    order = np.random.default_rng(0).integers(len(x), size=(total, 16))

    def softmax(z):
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    def train(shape, rate):
        w, norms = np.zeros((7, 10)), []
        for factor, rows in zip(shape, order, strict=True):
            g = x[rows].T @ (softmax(x[rows] @ w) - y[rows]) / 16
            w, _ = w - rate * factor * g, norms.append(np.linalg.norm(g))
        return -np.log((softmax(x @ w) * y).sum(1)).mean(), norms

    grid = (0.5, 1.0, 2.0, 4.0)
    linear = np.linspace(1, 0, total + 1)[:-1]
    losses, norms = zip(*(train(linear, rate) for rate in grid), strict=True)
    refined = refine_schedule(torch.tensor(norms[int(np.argmin(losses))])).numpy()
    best = {"linear": min(losses)}
    best |= {name: min(train(s, r)[0] for r in grid) for name, s in (("flat", np.ones(total)), ("refined", refined))}
    assert best["refined"] <= 1.01 * best["linear"]
    assert best["linear"] <= 0.98 * best["flat"]
    assert 0.05 <= refined.argmax() / total <= 0.4
    assert refined[0] < 0.3
