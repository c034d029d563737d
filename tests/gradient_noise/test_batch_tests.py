import dataclasses
import math

import pytest
import torch

from lightning_opt.gradient_noise import GradientStatistics, next_batch_size, required_batch_size, split_batch
from tests.reference import gradient_noise as naive

TESTS = ["norm", "inner_product", "augmented_inner_product", "coordinate"]


def noisy(samples=40, dimension=21, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.3 + torch.randn(samples, dimension, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("seed", range(3))
def test_follows_the_naive_reference(test, seed):
    g = noisy(seed=seed)
    statistics = GradientStatistics.from_per_sample(g)
    for kwargs in ({}, {"eta": 0.1, "theta": 0.05, "nu": 0.01, "quantile": 0.5}):
        assert required_batch_size(statistics, test, **kwargs) == math.ceil(naive.requested(g.numpy(), test, **kwargs))


@pytest.mark.parametrize("b", [2, 5, 16])
@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0])
def test_orthonormal_gradients(b, eta):
    """g_i = e_i: S = 1, |mean|^2 = 1/b, so b / eta^2 is asked for. All are at one angle to the mean: V = 0, W = S."""
    statistics = GradientStatistics.from_per_sample(torch.eye(b, dtype=torch.float64))
    assert statistics.var_trace == pytest.approx(1.0, rel=1e-14)
    assert statistics.grad_norm_sq == pytest.approx(1 / b, rel=1e-14)
    assert statistics.var_along == pytest.approx(0.0, abs=1e-30)
    assert statistics.var_orthogonal == pytest.approx(1.0, rel=1e-14)
    exact = b / eta**2
    assert required_batch_size(statistics, eta=eta * (1 + 1e-12)) == math.ceil(exact * (1 - 1e-12))


def test_parallel_gradients():
    """g_i = a_i u: nothing is orthogonal, and the norm test is the inner product test with theta = eta."""
    u = torch.tensor([3.0, 4.0], dtype=torch.float64)
    statistics = GradientStatistics.from_per_sample(torch.tensor([1.0, 2.0, 4.0, 5.0]).double().unsqueeze(1) * u)
    assert statistics.var_orthogonal == pytest.approx(0.0, abs=1e-12 * statistics.var_trace)
    norm = required_batch_size(statistics, "norm", eta=0.3)
    assert norm == required_batch_size(statistics, "inner_product", theta=0.3)
    assert norm == required_batch_size(statistics, "augmented_inner_product", theta=0.3, nu=0.01)
    assert norm == math.ceil((10 / 3) / (0.09 * 9))  # Var a = 10/3, (mean a)^2 = 9


def test_each_condition_of_the_augmented_test_counts():
    across = GradientStatistics(samples=4, groups=4, grad_norm_sq=1.0, var_trace=8.0, var_along=0.0)
    assert required_batch_size(across, "inner_product") == 0
    assert required_batch_size(across, "augmented_inner_product", nu=0.5) == 32
    along = dataclasses.replace(across, var_along=8.0)
    assert required_batch_size(along, "augmented_inner_product", theta=0.5, nu=0.5) == 32


def test_coordinate_test_leaves_out_a_share():
    """A coordinate near zero asks for nearly everything; the quantile leaves it out."""
    g = torch.ones(8, 20, dtype=torch.float64)
    g[::2] += 1
    g[:, 0] = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64) + 1e-6
    statistics = GradientStatistics.from_per_sample(g)
    others = math.ceil((2 / 7) / (0.25 * 2.25))
    assert required_batch_size(statistics, "coordinate", quantile=0.95) == others
    assert required_batch_size(statistics, "coordinate", quantile=1.0) == pytest.approx((8 / 7) / (0.25e-12), rel=1e-6)


@pytest.mark.parametrize("test", TESTS)
def test_zero_noise_and_zero_gradients(test):
    assert required_batch_size(GradientStatistics.from_per_sample(torch.ones(4, 3)), test) == 0
    assert required_batch_size(GradientStatistics.from_per_sample(torch.zeros(4, 3)), test) == 0
    opposite = GradientStatistics.from_per_sample(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
    asked = required_batch_size(opposite, test)
    # along a mean that is zero nothing varies
    assert asked == (0 if test == "inner_product" else math.inf)


@pytest.mark.parametrize("test", TESTS)
def test_not_finite_asks_for_nothing(test):
    g = noisy()
    g[3, 2] = math.nan
    asked = required_batch_size(GradientStatistics.from_per_sample(g), test)
    assert math.isnan(asked)
    assert next_batch_size(32, asked, 1000) == 32


def test_debias_is_the_noise_scale():
    """With the norm debiased, the request is B_simple / eta^2 of arXiv:1812.06162."""
    statistics = GradientStatistics(samples=10, groups=10, grad_norm_sq=1.0, var_trace=5.0)
    assert required_batch_size(statistics, debias=True) == math.ceil(5.0 / (0.25 * 0.5))
    drowned = dataclasses.replace(statistics, var_trace=50.0)
    assert required_batch_size(drowned, debias=True) > 1e30


@pytest.mark.parametrize(
    ("current", "requested", "b_max", "cap", "expected"),
    [
        (32, 100.0, 1000, None, 100),
        (32, 10.0, 1000, None, 32),
        (32, math.inf, 1000, None, 1000),
        (32, math.inf, 1000, 2.0, 64),
        (3, 100.0, 1000, 1.1, 4),  # a cap never stops it
        (2000, math.inf, 1000, None, 2000),
    ],
)
def test_monotone_rule(current, requested, b_max, cap, expected):
    assert next_batch_size(current, requested, b_max, cap) == expected


def test_split_holds_the_batch_and_no_more_than_it_must():
    for batch in range(1, 200):
        for world in (1, 2, 3):
            for most in (None, 1, 7, 32):
                micro, accum = split_batch(batch, most, world)
                effective = micro * accum * world
                assert batch <= effective < batch + accum * world
                assert most is None or micro <= most
                fewest = 1 if most is None else math.ceil(batch / (most * world))
                assert accum == fewest


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: required_batch_size(s, "nrom"), "Did you mean 'norm'"),
        (lambda s: required_batch_size(s, eta=0.0), "eta must be > 0.0 and finite, got 0.0"),
        (lambda s: required_batch_size(s, theta=-1.0), "theta must be > 0.0 and finite, got -1.0"),
        (lambda s: required_batch_size(s, nu=math.nan), "nu must be > 0.0 and finite, got nan"),
        (lambda s: required_batch_size(s, quantile=0.0), r"quantile must be in \(0.0, 1.0\], got 0.0"),
        (lambda s: required_batch_size(s, "inner_product"), "needs the variance along the gradient"),
        (lambda s: required_batch_size(s, "coordinate"), "needs the variance of each coordinate"),
        (lambda s: next_batch_size(2, 4.0, 8, 1.0), "growth_cap must be > 1.0 and finite, got 1.0"),
        (lambda s: split_batch(0), "batch must be >= 1 and finite, got 0"),
        (lambda s: split_batch(4, 0), "max_micro must be >= 1 and finite, got 0"),
    ],
)
def test_wrong_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(GradientStatistics(samples=4, groups=4, grad_norm_sq=1.0, var_trace=1.0))
