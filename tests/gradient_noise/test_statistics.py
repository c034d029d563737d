import math

import pytest
import torch

from lightning_opt.gradient_noise import GradientStatistics, RunningGradientStatistics, per_sample_statistics
from tests.reference import gradient_noise as naive

MEAN = torch.tensor([0.5, -0.2, 0.1, 0.0, 0.3], dtype=torch.float64)
ROOT = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
SIGMA = ROOT @ ROOT.T


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return MEAN + torch.randn(*shape, 5, dtype=torch.float64, generator=generator) @ ROOT.T


def group_means(samples, sizes):
    return torch.stack([part.mean(0) for part in samples.split(sizes)])


def by_running(samples, sizes):
    running = RunningGradientStatistics()
    for part in samples.split(sizes):
        running.add([part.mean(0)], len(part))
    return running.statistics()


ESTIMATORS = {
    "samples": lambda g: GradientStatistics.from_per_sample(g),
    "equal groups": lambda g: GradientStatistics.from_groups(group_means(g, [3] * 8), [3] * 8),
    "unequal groups": lambda g: GradientStatistics.from_groups(group_means(g, [1, 2, 9, 4, 8]), [1, 2, 9, 4, 8]),
    "running": lambda g: by_running(g, [1, 2, 9, 4, 8]),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_trace_is_unbiased(name):
    """E[S] = tr Sigma for samples and for groups of any sizes."""
    values = torch.tensor([ESTIMATORS[name](g).var_trace for g in draw(2000, 24)])
    assert values.mean().item() == pytest.approx(SIGMA.trace().item(), abs=4 * values.std().item() / 2000**0.5)
    assert values.std() / 2000**0.5 < 0.02 * SIGMA.trace()  # so the line above means 8 %, for the widest of them


@pytest.mark.parametrize("name", ["samples", "equal groups", "unequal groups"])
def test_variance_along_the_mean_has_the_same_expectation_from_groups(name):
    """E[V] = mu' Sigma mu + tr(Sigma^2) / b for Gaussians: their mean and deviations are independent."""
    values = torch.tensor([ESTIMATORS[name](g).var_along for g in draw(2000, 24, seed=1)])
    expected = (MEAN @ SIGMA @ MEAN + (SIGMA @ SIGMA).trace() / 24).item()
    assert values.mean().item() == pytest.approx(expected, abs=4 * values.std().item() / 2000**0.5)


def test_squared_norm_is_debiased():
    statistics = [GradientStatistics.from_per_sample(g) for g in draw(2000, 24, seed=2)]
    values = torch.tensor([s.unbiased_grad_norm_sq for s in statistics])
    error = 4 * values.std().item() / 2000**0.5
    assert values.mean().item() == pytest.approx((MEAN @ MEAN).item(), abs=error)
    biased = torch.tensor([s.grad_norm_sq for s in statistics]).mean().item()
    assert biased - (MEAN @ MEAN).item() == pytest.approx(SIGMA.trace().item() / 24, abs=error)
    assert SIGMA.trace().item() / 24 > 2 * error  # the bias is seen


@pytest.mark.parametrize("sizes", [[1] * 24, [3] * 8, [1, 2, 9, 4, 8]])
def test_follows_the_naive_reference(sizes):
    h = group_means(draw(24, seed=4), sizes)
    ours, expected = GradientStatistics.from_groups(h, sizes), naive.variances(h.numpy(), sizes)
    assert ours.var_trace == pytest.approx(expected["S"], rel=1e-12)
    assert ours.var_along == pytest.approx(expected["V"], rel=1e-12)
    assert ours.var_orthogonal == pytest.approx(expected["W"], rel=1e-12)
    assert ours.variance.numpy() == pytest.approx(expected["coordinate"], rel=1e-12)
    running = by_running(draw(24, seed=4), sizes)
    assert running.var_trace == pytest.approx(expected["S"], rel=1e-12)
    assert running.grad_norm_sq == pytest.approx(ours.grad_norm_sq, rel=1e-12)


def test_sums_give_the_same():
    h, n = draw(6, seed=5), torch.tensor([4.0, 1, 2, 2, 5, 3], dtype=torch.float64)
    expected = GradientStatistics.from_groups(h, [int(i) for i in n])
    mean = expected.mean
    ours = GradientStatistics.from_sums(
        samples=17,
        groups=6,
        grad_norm_sq=(mean @ mean).item(),
        sum_sq=(n @ h.square().sum(1)).item(),
        sum_dot_sq=(n @ (h @ mean).square()).item(),
        mean=mean,
        sum_of_squares=n @ h.square(),
    )
    for name in ("var_trace", "var_along", "var_orthogonal"):
        assert getattr(ours, name) == pytest.approx(getattr(expected, name), rel=1e-12)
    torch.testing.assert_close(ours.variance, expected.variance, rtol=1e-12, atol=0)


def test_running_variance_does_not_cancel():
    """A spread of 1e-4 beside a mean of 100 in float32, whose squares are only 1e-3 apart."""
    h = 100 + 1e-4 * torch.arange(8.0).unsqueeze(1)
    running = RunningGradientStatistics(coordinates=True)
    for row in h:
        running.add([row], 1)
    expected = h.double().var(0).item()
    assert running.statistics().var_trace == pytest.approx(expected, rel=0.05)  # 100 + 1e-4 k itself is rounded to 8e-6
    assert running.statistics().variance.item() == pytest.approx(running.statistics().var_trace, rel=1e-5)


def test_per_sample_gradients_of_a_model():
    """Against one backward pass a sample, in chunks that do not divide the batch."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    x, y = torch.randn(7, 4).double(), torch.randint(3, (7,))
    rows = []
    for i in range(7):
        loss = torch.nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))]))
    expected = GradientStatistics.from_per_sample(torch.stack(rows))

    def loss(parameters, sample):
        return torch.nn.functional.cross_entropy(torch.func.functional_call(model, parameters, sample[0]), sample[1])

    ours = per_sample_statistics(loss, dict(model.named_parameters()), (x, y), 7, chunk_size=3)
    assert ours.samples == ours.groups == 7
    for name in ("grad_norm_sq", "var_trace", "var_along"):
        assert getattr(ours, name) == pytest.approx(getattr(expected, name), rel=1e-12)
    torch.testing.assert_close(ours.variance, expected.variance, rtol=1e-11, atol=1e-16)


def test_not_finite_stays_not_finite():
    g = draw(4)
    g[0, 0] = math.nan
    assert math.isnan(GradientStatistics.from_per_sample(g).var_trace)
    assert math.isnan(
        GradientStatistics.from_sums(samples=2, groups=2, grad_norm_sq=math.inf, sum_sq=math.inf).var_trace
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GradientStatistics.from_per_sample(torch.ones(1, 3)), "at least 2"),
        (
            lambda: GradientStatistics.from_groups(torch.ones(2, 3), [3, 0]),
            "samples must be >= 1 in every group, got 0",
        ),
        (lambda: GradientStatistics.from_groups(torch.ones(3, 3), [1, 1]), "got 2 and 3"),
        (
            lambda: GradientStatistics.from_sums(samples=4, groups=1, grad_norm_sq=1.0, sum_sq=1.0),
            "groups must be >= 2",
        ),
        (lambda: RunningGradientStatistics().statistics(), "at least 2 groups, got 0"),
        (lambda: RunningGradientStatistics().add([torch.ones(1)], 0), "samples must be >= 1, got 0"),
        (lambda: per_sample_statistics(lambda p, b: b.sum(), {}, torch.ones(1), 1), "samples must be >= 2, got 1"),
    ],
)
def test_wrong_values_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
