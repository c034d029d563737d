"""The reverse equations against the Fokker-Planck equation of the exact densities, in one dimension."""

import math

import pytest
import torch

from lightning_opt.diffusion import (
    GeometricBrownianMotion,
    log_probability_flow,
    log_reverse_drift,
    noise_levels,
    reverse_drift,
    reverse_step,
)
from tests.reference.lognormal_mixture import one_dimensional

MIXTURE = one_dimensional()
PROCESSES = {
    "paper": GeometricBrownianMotion(sigma=0.8),
    "drift": GeometricBrownianMotion(sigma=0.8, mu=0.1),
    "geometric": GeometricBrownianMotion(sigma_schedule="geometric", rho_min=0.1, rho_max=2.0, mu=-0.3),
}
processes = pytest.mark.parametrize("process", PROCESSES.values(), ids=list(PROCESSES))
Y = torch.linspace(-2.5, 3.5, 301, dtype=torch.float64)
T, STEP = 0.6, 1e-4
# Central differences with this step: truncation 1e-8 / 6 times third derivatives of the density (< 100), rounding 1e-12
TOLERANCE = {"rtol": 0, "atol": 1e-6}


def log_density(process, y, t):
    return MIXTURE.log_density(y.reshape(-1, 1), process.mean_shift(t), process.rho(t)).reshape(y.shape)


def hyvarinen(process, y, t):
    return MIXTURE.hyvarinen(y.reshape(-1, 1), process.mean_shift(t), process.rho(t)).reshape(y.shape)


def slope(function, at, step=STEP):
    return (function(at + step) - function(at - step)) / (2 * step)


@processes
def test_the_flow_carries_the_density(process):
    """d/dt p + d/dy (p u) = 0."""
    change = slope(lambda t: log_density(process, Y, t).exp(), T)

    def current(y):
        return log_density(process, y, T).exp() * log_probability_flow(process, hyvarinen(process, y, T), T)

    torch.testing.assert_close(change, -slope(current, Y), **TOLERANCE)


@processes
@pytest.mark.parametrize("wrong", [0.0, 0.5, -1.0, -2.0])
def test_the_reverse_equation_of_the_logarithm_runs_the_density_backward(process, wrong):
    """-d/dt p = -d/dy (p b) + sigma^2 / 2 d^2/dy^2 p.

    And not with the halves of sigma^2 that a forgotten Ito term adds, or half or all of a forgotten divergence takes.
    """
    change = slope(lambda t: log_density(process, Y, t).exp(), T)
    variance = process.volatility(T) ** 2

    def current(y):
        p, h = log_density(process, y, T).exp(), hyvarinen(process, y, T)
        # d/dy p = p (1 + h)
        return p * (log_reverse_drift(process, h, T) + wrong * variance) - 0.5 * variance * p * (1 + h)

    error = (change - slope(current, Y)).abs().max().item()
    assert error < TOLERANCE["atol"] if wrong == 0 else error > 0.01


@processes
@pytest.mark.parametrize("wrong", [0.0, -1.0, -2.0])
def test_the_reverse_equation_runs_the_density_of_x_backward(process, wrong):
    """-d/dt p = -d/dx (p b) + d^2/dx^2 (sigma^2 x^2 p) / 2, for the density of x itself."""
    x = torch.linspace(0.2, 6, 301, dtype=torch.float64)

    def density(x, t):
        return log_density(process, x.log(), t).exp() / x

    variance = process.volatility(T) ** 2

    def current(x):
        h = hyvarinen(process, x.log(), T)
        b = reverse_drift(process, x, h, T) + wrong * variance * x
        # d/dx (x^2 p) = x p (2 + h)
        return density(x, T) * b - 0.5 * variance * x * density(x, T) * (2 + h)

    error = (slope(lambda t: density(x, t), T) - slope(current, x)).abs().max().item()
    assert error < TOLERANCE["atol"] if wrong == 0 else error > 0.01


@processes
def test_both_reverse_equations_are_one_by_itos_formula(process):
    """The drift of log x is that of x over x, less half of the volatility squared."""
    h = hyvarinen(process, Y, T)
    by_ito = reverse_drift(process, Y.exp(), h, T) / Y.exp() - 0.5 * process.volatility(T) ** 2
    torch.testing.assert_close(log_reverse_drift(process, h, T), by_ito, rtol=1e-13, atol=1e-13)


@processes
@pytest.mark.parametrize("sampler", ["dale", "exp_euler", "ode"])
def test_steps_have_the_drift_and_the_noise_of_their_equation(process, sampler):
    """A short step divided by its length tends to the drift, its variance to that of the noise."""
    dt, h = 1e-6, hyvarinen(process, Y, T)
    epsilon = -(1 + h) * process.rho(T)
    shift, factor, noise = reverse_step(process, sampler, T, T - dt)
    drift = (shift + factor * epsilon) / dt
    expected = -log_probability_flow(process, h, T) if sampler == "ode" else log_reverse_drift(process, h, T)
    # first order in dt times second derivatives of about 100, and the cancellation 1e-16 / 1e-6
    torch.testing.assert_close(drift, expected, rtol=1e-4, atol=1e-4)
    volatility = 0.0 if sampler == "ode" else process.volatility(T)
    assert noise / math.sqrt(dt) == pytest.approx(volatility, rel=1e-5)


def test_the_step_of_dale_is_the_papers():
    sigma, mu, t, delta = 0.8, 0.1, 0.7, 0.01
    shift, factor, noise = reverse_step(GeometricBrownianMotion(sigma, mu), "dale", t, t - delta)
    h = torch.tensor([-3.0, 0.2, 2.0], dtype=torch.float64)
    epsilon = -(1 + h) * sigma * math.sqrt(t)
    exponent = delta * sigma**2 * h - delta * (mu - 1.5 * sigma**2)
    torch.testing.assert_close(shift + factor * epsilon, exponent, rtol=1e-13, atol=1e-15)
    assert noise == pytest.approx(math.sqrt(delta) * sigma, rel=1e-13)


@pytest.mark.parametrize("sampler", ["dale", "exp_euler", "ode"])
def test_scaled_steps(sampler):
    process = GeometricBrownianMotion(0.8, 0.1)
    whole, part = (reverse_step(process, sampler, 0.7, 0.6, scale) for scale in (1.0, 0.36))
    assert part.shift == pytest.approx(0.36 * whole.shift, rel=1e-14)
    assert part.epsilon == pytest.approx(0.36 * whole.epsilon, rel=1e-14)
    assert part.noise == pytest.approx(0.6 * whole.noise, rel=1e-14)


@pytest.mark.parametrize(("spacing", "order"), [("t", 1.0), ("t", 2.0), ("rho", 1.0), ("rho", 7.0), ("log", 2.0)])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=list(PROCESSES))
def test_schedules_of_noise_levels(process, spacing, order):
    levels = noise_levels(process, 9, spacing, order)
    assert levels[0] == process.largest_rho
    assert levels[-2] == pytest.approx(process.rho_min, rel=1e-12)
    assert levels[-1] == 0
    scale = {"t": lambda r: process.time(r) ** (1 / order), "rho": lambda r: r ** (1 / order), "log": math.log}[spacing]
    gaps = torch.tensor([scale(a) - scale(b) for a, b in zip(levels[:-2], levels[1:-1], strict=True)])
    torch.testing.assert_close(gaps, gaps[:1].expand(8), rtol=1e-5, atol=0)
    assert gaps.min() > 0
    assert noise_levels(process, 1, spacing, order) == [process.largest_rho, 0.0]


def test_the_quadratic_grid_is_uniform_in_the_noise_level():
    process = GeometricBrownianMotion(0.8)
    assert noise_levels(process, 30, "t", 2.0) == pytest.approx(noise_levels(process, 30, "rho", 1.0), rel=1e-12)


def test_karras_grid():
    """Equation 5 of arXiv:2206.00364."""
    n, low, high = 10, 0.02, 3.0
    expected = [(high ** (1 / 7) + i / (n - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(n)]
    process = GeometricBrownianMotion(rho_min=low, rho_max=high)
    assert noise_levels(process, n, "rho", 7.0)[:-1] == pytest.approx(expected, rel=1e-12)


def test_wrong_values():
    process = GeometricBrownianMotion()
    with pytest.raises(ValueError, match="'dale', 'ambient', 'exp_euler', 'ode'"):
        reverse_step(process, "euler", 1.0, 0.5)
    for kwargs, message in [
        ({"spacing": "quadratic"}, "'t', 'rho', 'log'"),
        ({"order": 0.0}, "spacing_order must be > 0"),
        ({"num_steps": 0}, "num_inference_steps must be >= 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            noise_levels(process, **{"num_steps": 5, **kwargs})
