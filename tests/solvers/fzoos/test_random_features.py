import pytest
import torch

from lightning_opt.solvers.fzoos import GaussianProcess, RandomFeatures
from lightning_opt.solvers.fzoos.gaussian_process import rbf

generator = torch.Generator().manual_seed(1)
POINTS = torch.rand(30, 4, generator=generator, dtype=torch.float64)
VALUES = torch.sin(2 * POINTS[:, 0]) + POINTS.square().sum(1)


def test_inner_products_approximate_the_kernel():
    features = RandomFeatures(4, 20_000, lengthscale=0.7, seed=0)
    error = features(POINTS) @ features(POINTS).T - rbf(POINTS, POINTS, 0.7)
    # an inner product is a mean of M numbers 2 cos cos of variance at most 2: four standard deviations over 900 of them
    assert float(error.abs().max()) < 4 * (2 / 20_000) ** 0.5


def test_the_gradient_is_that_of_autograd():
    features = RandomFeatures(4, 500, lengthscale=0.7, seed=0)
    weights = features.fit(POINTS, VALUES, noise=1e-6)
    for x in POINTS[:5]:
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(features(leaf[None])[0] @ weights, leaf)
        torch.testing.assert_close(features.gradient(x, weights), expected, rtol=1e-8, atol=1e-8)


def test_the_dual_fit_is_that_of_ridge_regression():
    features = RandomFeatures(4, 50, lengthscale=0.7, seed=0)
    phi, target = features(POINTS), (VALUES - VALUES.mean()) / VALUES.std(unbiased=False)
    normal = phi.T @ phi + 1e-2 * torch.eye(50, dtype=torch.float64)
    expected = VALUES.std(unbiased=False) * torch.linalg.solve(normal, phi.T @ target)
    torch.testing.assert_close(features.fit(POINTS, VALUES, noise=1e-2), expected, rtol=1e-10, atol=1e-10)


def test_many_features_have_the_gradient_of_the_gaussian_process():
    features = RandomFeatures(4, 50_000, lengthscale=0.7, seed=0)
    weights = features.fit(POINTS, VALUES, noise=1e-2)
    exact = GaussianProcess(POINTS, VALUES, lengthscale=0.7, noise=1e-2)
    for x in POINTS[:5]:
        torch.testing.assert_close(features.gradient(x, weights), exact.gradient(x), rtol=0.1, atol=0.1)


def test_the_mean_of_weights_is_the_mean_of_functions():
    features = RandomFeatures(4, 500, lengthscale=0.7, seed=0)
    one, other = features.fit(POINTS, VALUES), features.fit(POINTS, 100 * VALUES.square())  # of other scales
    x = POINTS[0]
    mean = (features.gradient(x, one) + features.gradient(x, other)) / 2
    torch.testing.assert_close(features.gradient(x, (one + other) / 2), mean, rtol=1e-10, atol=1e-8)


def test_a_seed_gives_the_same_features_and_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    one, other = (RandomFeatures(4, 50, lengthscale=0.7, seed=3) for _ in range(2))
    assert torch.equal(one(POINTS), other(POINTS))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(RandomFeatures(4, 50, lengthscale=0.7, seed=4)(POINTS), one(POINTS))


@pytest.mark.parametrize("wrong", [{"n_features": 0}, {"lengthscale": -1.0}, {"dim": 0}])
def test_wrong_arguments(wrong):
    arguments = {"dim": 4, "n_features": 50, "lengthscale": 0.7, "seed": 0, **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RandomFeatures(**arguments)
