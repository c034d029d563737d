import pytest
import torch

from lightning_opt.diffusion import (
    GeometricBrownianMotion,
    Parametrization,
    denoising_score_matching,
    epsilon_from_hyvarinen,
    explicit_score_matching,
    implicit_score_matching,
)
from tests.reference.lognormal_mixture import gauss_hermite, one_dimensional, two_dimensional

PROCESS = GeometricBrownianMotion(sigma=0.8)
# Models of Hyvarinen's score as functions of y = log x, none of them the true one
MODELS = {
    "zero": lambda y: 0 * y,
    "linear": lambda y: -1 - y,
    "wave": lambda y: torch.sin(2 * y) - 0.5,
    "decay": lambda y: -(y**3) * torch.exp(-(y**2)),
}


def quadrature(rho, nodes=80):
    """Clean logarithms, noise and weights of every pair of nodes of both components: exact for smooth functions."""
    mixture = one_dimensional()
    z, w = gauss_hermite(nodes)
    log_x0 = mixture.means[:, :, None] + mixture.stds[:, :, None] * z[:, None]
    log_x0, noise = (v.expand(2, nodes, nodes).reshape(-1, 1) for v in (log_x0, z))
    weight = (mixture.weights[:, None, None] * w[:, None] * w).reshape(-1)
    return log_x0, noise, weight


@pytest.mark.parametrize("rho", [0.3, 0.8])
def test_denoising_and_explicit_score_matching_differ_by_a_constant(rho):
    """The constant is v (E target^2 - E h^2), the same for every model, so that both have one minimiser."""
    log_x0, noise, weight = quadrature(rho)
    y = log_x0 + rho * noise
    h = one_dimensional().hyvarinen(y, 0.0, rho)
    target = -1 - noise / rho
    level = torch.full((len(y),), rho, dtype=torch.float64)
    constant = rho**2 * (weight @ (target**2 - h**2)[:, 0])
    for name, model in MODELS.items():
        denoising = weight @ denoising_score_matching(epsilon_from_hyvarinen(model(y), rho), noise, level, "v")
        explicit = weight @ explicit_score_matching(model(y), h)
        # 80 nodes resolve the true score, whose poles are 0.3 away in z, to this
        assert (denoising - rho**2 * explicit).item() == pytest.approx(constant.item(), rel=1e-6), name


def test_implicit_and_explicit_score_matching_differ_by_a_constant():
    """Half the explicit loss less E h^2 / 2, with neither noise nor the true score in it."""
    mixture, rho = one_dimensional(), 0.8
    y = torch.linspace(-6, 7, 4001, dtype=torch.float64)[:, None]
    weight = mixture.log_density(y, 0.0, rho).exp() * (y[1] - y[0])
    h = mixture.hyvarinen(y, 0.0, rho)
    for name, model in MODELS.items():
        implicit = weight @ implicit_score_matching(lambda x, model=model: model(x.log()) / x, y.exp())
        explicit = weight @ explicit_score_matching(model(y), h)
        # the trapezoid rule over a density that is 1e-12 at the ends
        assert implicit.item() == pytest.approx((0.5 * explicit - 0.5 * weight @ h[:, 0] ** 2).item(), abs=1e-8), name


def test_implicit_score_matching_sums_over_dimensions_and_trains():
    """With psi_i = -a_i x_i the loss is a_i x_i^2 (a_i x_i^2 / 2 - 3) summed, and so is its gradient in a."""
    a = torch.tensor([0.5, 2.0], requires_grad=True)
    x = torch.tensor([[1.0, 2.0], [3.0, 0.5]])
    loss = implicit_score_matching(lambda x: -a * x, x)
    u = a * x**2
    torch.testing.assert_close(loss, (u * (0.5 * u - 3)).sum(1) + 0 * loss)
    (gradient,) = torch.autograd.grad(loss.sum(), a)
    torch.testing.assert_close(gradient, (x**2 * (u - 3)).sum(0).detach())


@pytest.mark.parametrize("weight", ["edm", "v", "v2"])
def test_the_loss_is_the_weighted_square_of_hyvarinens_score(weight):
    generator = torch.Generator().manual_seed(0)
    epsilon, noise = torch.randn(2, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    rho = torch.tensor([0.1, 0.8, 3.0], dtype=torch.float64)
    losses = denoising_score_matching(epsilon, noise, rho, weight, log_std=0.4)
    for i, r in enumerate(rho.tolist()):
        factor = {"edm": r**2 * (r**2 + 0.16) / 0.16, "v": r**2, "v2": r**4}[weight]
        residual = (-1 - epsilon[i] / r) - (-1 - noise[i] / r)
        assert losses[i].item() == pytest.approx(factor * (residual**2).mean().item(), rel=1e-12)


def test_the_authors_residual():
    """V2 is the mean square of v x s + log x - log x0 - m + v, their code's expression at one time."""
    generator = torch.Generator().manual_seed(0)
    log_x0, noise = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    process = GeometricBrownianMotion(0.8, mu=0.1)
    log_x, v, rho = process.noised(log_x0, noise, t), process.variance(t)[:, None], process.rho(t)
    stein = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    m = process.mean_shift(t)[:, None]
    residual = v * (log_x.exp() * stein) + log_x - log_x0 - m + v
    epsilon = Parametrization("stein").epsilon(stein, log_x, m, rho[:, None])
    torch.testing.assert_close(denoising_score_matching(epsilon, noise, rho, "v2"), (residual**2).mean(1))


def bumps(z, count, reach=3.5):
    """Gaussian bumps over an evenly spaced grid in each dimension, and 1, at standardised inputs."""
    centers = torch.linspace(-reach, reach, count, dtype=z.dtype)
    one = [torch.exp(-0.5 * ((z[:, i, None] - centers) / (centers[1] - centers[0])) ** 2) for i in range(z.shape[1])]
    product = one[0] if len(one) == 1 else (one[0][:, :, None] * one[1][:, None, :]).flatten(1)
    return torch.cat([product, torch.ones(len(z), 1, dtype=z.dtype)], 1)


@pytest.mark.parametrize(
    ("mixture", "rho", "count"),
    [
        pytest.param(one_dimensional(), 0.1, 45, id="1-D, rho=0.1"),
        pytest.param(one_dimensional(), 0.4, 45, id="1-D, rho=0.4"),
        pytest.param(one_dimensional(), 0.8, 45, id="1-D, rho=0.8"),
        pytest.param(two_dimensional(), 0.4, 12, id="2-D, rho=0.4"),
    ],
)
def test_the_minimiser_is_the_analytic_score(mixture, rho, count):
    """A linear model of the preconditioned output, fitted to noised data, beside the true score: within 2%.

    The model is a sum of 46 (145 in 2-D) bumps with free coefficients and the data are 131,072 low-discrepancy points.
    The loss is quadratic in the coefficients, so that least squares finds the minimum; that the library's loss has no
    slope there shows that it is the loss that was minimised.
    """
    n = 2**17
    log_x0, noise = mixture.spread_out(n)
    log_x = log_x0 + rho * noise
    mean, std = log_x0.mean().item(), log_x0.std().item()
    p = Parametrization("edm", mean, std)
    features = bumps(p.network_input(log_x, 0.0, rho), count)
    targets = p.output(noise, log_x, 0.0, rho)
    ridge = 1e-9 * n * torch.eye(features.shape[1], dtype=torch.float64)
    minimum = torch.linalg.solve(features.T @ features + ridge, features.T @ targets)

    level = torch.full((n,), rho, dtype=torch.float64)
    slopes = []
    for at in (minimum.clone(), torch.zeros_like(minimum)):
        epsilon = p.epsilon(features @ at.requires_grad_(), log_x, 0.0, rho)
        loss = denoising_score_matching(epsilon, noise, level, "edm", std).mean()
        slopes.append(torch.autograd.grad(loss, at)[0].norm().item())
    assert slopes[0] < 1e-6 * slopes[1]

    generator = torch.Generator().manual_seed(0)
    fresh = mixture.sample_log(20_000, generator)
    fresh = fresh + rho * torch.randn(fresh.shape, generator=generator, dtype=torch.float64)
    found = -1 - p.epsilon(bumps(p.network_input(fresh, 0.0, rho), count) @ minimum, fresh, 0.0, rho) / rho
    true = mixture.hyvarinen(fresh, 0.0, rho)
    error = ((found - true).norm() / true.norm()).item()
    assert error <= 0.02
