import math

import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF

from lightning_opt.solvers.fzoos import GaussianProcess
from lightning_opt.solvers.fzoos.gaussian_process import cholesky

generator = torch.Generator().manual_seed(1)
POINTS = torch.rand(40, 6, generator=generator, dtype=torch.float64)
VALUES = (5 + 3 * torch.sin(4 * POINTS[:, 0]) * POINTS[:, 1] + POINTS[:, 2:].square().sum(1)).clone()
AT = torch.rand(7, 6, generator=generator, dtype=torch.float64)


def surrogate(noise=1e-6, **options):
    return GaussianProcess(POINTS, VALUES, lengthscale=0.8, noise=noise, **options)


def test_the_mean_is_that_of_scikit_learn():
    other = GaussianProcessRegressor(RBF(0.8), optimizer=None, alpha=1e-6, normalize_y=True).fit(POINTS, VALUES)
    expected = torch.from_numpy(other.predict(AT))
    torch.testing.assert_close(surrogate().mean(AT), expected, rtol=1e-8, atol=1e-8)
    # its likelihood is that of the same standardized values
    assert surrogate().log_marginal_likelihood() == pytest.approx(other.log_marginal_likelihood_value_, rel=1e-8)


def test_the_gradient_is_that_of_scikit_learns_mean():
    other = GaussianProcessRegressor(RBF(0.8), optimizer=None, alpha=1e-4, normalize_y=True).fit(POINTS, VALUES)
    h = 1e-4  # central differences: h^2 of the third derivative, and 1e-16 / h of rounding of a mean of size 10
    steps = h * torch.eye(6, dtype=torch.float64)
    for x in AT[:2]:
        differences = torch.from_numpy(other.predict(x + steps) - other.predict(x - steps)) / (2 * h)
        torch.testing.assert_close(surrogate(1e-4).gradient(x), differences, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_that_of_autograd():
    fitted = surrogate()
    for x in AT:
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(fitted.mean(leaf[None])[0], leaf)
        torch.testing.assert_close(fitted.gradient(x), expected, rtol=1e-8, atol=1e-8)


def test_the_uncertainty_is_the_trace_of_the_covariance_of_the_gradient():
    fitted = surrogate(1e-3)

    def kernel(a, b):
        return torch.exp(-0.5 * (a[:, None] - b[None]).square().sum(2) / 0.8**2)

    inverse = torch.linalg.inv(kernel(POINTS, POINTS) + 1e-3 * torch.eye(40, dtype=torch.float64))

    def covariance(x, z):  # of the values at two points, whose mixed derivative is that of the gradients
        cross = kernel(x[None], POINTS) @ inverse @ kernel(POINTS, z[None])
        return (kernel(x[None], z[None]) - cross)[0, 0]

    for x, found in zip(AT, fitted.gradient_uncertainty(AT), strict=True):

        def by_z(x_, x=x):
            z = x.clone().requires_grad_()
            return torch.autograd.grad(covariance(x_, z), z, create_graph=True)[0]

        expected = torch.autograd.functional.jacobian(by_z, x).trace()
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_the_uncertainty_is_that_of_the_prior_far_away_and_small_among_data():
    fitted = surrogate()
    assert float(fitted.gradient_uncertainty(AT + 50)[0]) == pytest.approx(6 / 0.8**2, rel=1e-12)
    cross = torch.cat([0.01 * torch.eye(6), -0.01 * torch.eye(6)]).double()
    near = GaussianProcess(cross, cross.sum(1), lengthscale=0.8, noise=1e-8)
    (at_center,) = near.gradient_uncertainty(torch.zeros(1, 6, dtype=torch.float64))
    assert 0 <= float(at_center) < 0.01 * 6 / 0.8**2


def test_coordinates_that_points_do_not_differ_in_change_the_priors_part_only():
    turn = torch.linalg.qr(torch.randn(300, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    wide = GaussianProcess(POINTS @ turn.T, VALUES, lengthscale=0.8)
    expected = surrogate().gradient_uncertainty(AT) + 294 / 0.8**2
    # the inverse has norm 1e6 by the noise of 1e-6, and each of its entries an error of up to 1e-9
    torch.testing.assert_close(wide.gradient_uncertainty(AT @ turn.T), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(wide.gradient(turn @ AT[0]), turn @ surrogate().gradient(AT[0]), rtol=1e-6, atol=1e-6)


def test_the_gradient_of_a_quadratic_is_known_after_as_many_queries_as_coordinates_and_one():
    d = 20
    draws = torch.Generator().manual_seed(3)
    x = torch.rand(d, generator=draws, dtype=torch.float64)
    curvature = 0.5 + torch.rand(d, generator=draws, dtype=torch.float64)
    near = x + 0.01 * (2 * torch.rand(d, d, generator=draws, dtype=torch.float64) - 1)
    points = torch.cat([x[None], near])
    fitted = GaussianProcess(points, (curvature * (points - 0.5) ** 2).sum(1), lengthscale=0.3 * math.sqrt(d))
    cosine = torch.nn.functional.cosine_similarity(fitted.gradient(x), 2 * curvature * (x - 0.5), dim=0)
    assert cosine > 0.95


def test_equal_values_have_no_gradient_and_repeated_points_no_singular_matrix():
    flat = GaussianProcess(POINTS, torch.full((40,), 1e6 / 3), lengthscale=0.8)
    assert float(flat.gradient(AT[0]).abs().max()) < 1e-6
    twice = GaussianProcess(torch.cat([POINTS, POINTS]), torch.cat([VALUES, VALUES]), lengthscale=0.8, noise=0.0)
    torch.testing.assert_close(twice.mean(POINTS), VALUES, rtol=1e-3, atol=1e-3)  # jitter of 1e-6 was added


def test_noise_is_averaged_over():
    draws = torch.Generator().manual_seed(4)
    noisy = VALUES + 0.5 * torch.randn(40, generator=draws, dtype=torch.float64)
    fits = [GaussianProcess(POINTS, noisy, lengthscale=0.8, least_variance=v) for v in (0.0, 0.25)]
    errors = [float((fit.mean(POINTS) - VALUES).square().mean()) for fit in fits]
    assert errors[1] < 0.7 * errors[0]
    same = GaussianProcess(POINTS, noisy, lengthscale=0.8, noise=0.25 / float(noisy.var(unbiased=False)))
    torch.testing.assert_close(fits[1].mean(AT), same.mean(AT), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("points", "values", "options", "message"),
    [
        (POINTS, VALUES, {"lengthscale": 0.0}, "lengthscale must be > 0 and finite, got 0.0"),
        (POINTS, VALUES, {"lengthscale": 1.0, "noise": -1.0}, "noise must be >= 0"),
        (POINTS, VALUES[:3], {"lengthscale": 1.0}, r"got \(40, 6\) and \(3,\)"),
        (POINTS[:0], VALUES[:0], {"lengthscale": 1.0}, "needed"),
        (POINTS, VALUES / 0, {"lengthscale": 1.0}, "must be finite"),
    ],
)
def test_wrong_arguments(points, values, options, message):
    with pytest.raises(ValueError, match=message):
        GaussianProcess(points, values, **options)


def test_a_matrix_that_no_jitter_helps():
    with pytest.raises(ValueError, match="not positive definite, even with 0.001"):
        cholesky(-torch.eye(3, dtype=torch.float64), 0.0)
