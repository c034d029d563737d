import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from lightning_opt.diffusion import GeometricBrownianMotion
from tests.reference.lognormal_mixture import one_dimensional

PROCESSES = {
    "paper": GeometricBrownianMotion(sigma=0.8),
    "drift": GeometricBrownianMotion(sigma=0.8, mu=0.1),
    "far": GeometricBrownianMotion(sigma=0.5, rho_max=4.0),
    "geometric": GeometricBrownianMotion(sigma_schedule="geometric", rho_min=0.02, rho_max=4.0, mu=-0.3),
}
processes = pytest.mark.parametrize("process", PROCESSES.values(), ids=list(PROCESSES))


@processes
def test_moments_are_the_integrals_of_drift_and_volatility(process):
    nodes, weights = np.polynomial.legendre.leggauss(40)
    for t in (0.1 * process.t_end, process.t_end):
        u = torch.from_numpy(0.5 * t * (nodes + 1))
        w = torch.from_numpy(0.5 * t * weights)
        v = (w * process.volatility(u) ** 2).sum().item()
        m = (w * (process.drift(u) - 0.5 * process.volatility(u) ** 2)).sum().item()
        # 40 nodes integrate exp(10.6 t) over [0, 1], the steepest of these, to rounding
        assert process.variance(t) == pytest.approx(v, rel=1e-12)
        assert process.mean_shift(t) == pytest.approx(m, rel=1e-12, abs=1e-14)
        assert process.rho(t) == pytest.approx(math.sqrt(v), rel=1e-12)


@processes
def test_time_inverts_the_noise_level(process):
    times = torch.linspace(1e-4, 1, 50, dtype=torch.float64) * process.t_end
    torch.testing.assert_close(process.time(process.rho(times)), times, rtol=1e-12, atol=0)
    assert process.rho(process.t_end) == pytest.approx(process.largest_rho, rel=1e-14)
    assert [process.rho(t) for t in times.tolist()] == pytest.approx(process.rho(times).tolist(), rel=1e-14)


def test_the_drift_of_the_paper_keeps_the_mean_of_the_logarithm():
    assert PROCESSES["paper"].mean_shift(0.7) == 0
    assert PROCESSES["far"].mean_shift(20.0) == 0
    assert PROCESSES["paper"].drift(0.3) == pytest.approx(0.32)


@processes
def test_the_score_is_that_of_the_log_normal_kernel(process):
    t = 0.3 * process.t_end
    log_x0 = torch.tensor([0.2, -0.5, 1.0]).double()
    x = torch.tensor([1.5, 0.7, 2.0]).double().requires_grad_()
    kernel = torch.distributions.LogNormal(
        log_x0 + process.mean_shift(t), torch.tensor(process.rho(t), dtype=torch.float64)
    )
    (stein,) = torch.autograd.grad(kernel.log_prob(x).sum(), x)
    h = process.hyvarinen_score(x.detach().log(), log_x0, t)
    torch.testing.assert_close(h, x.detach() * stein, rtol=1e-12, atol=1e-12)


@processes
def test_noised_data_have_the_conditional_score_of_their_noise(process):
    """-1 - eps / rho, for one time of all and for one of each sample."""
    generator = torch.Generator().manual_seed(0)
    log_x0, noise = torch.randn(2, 4, 3, 2, generator=generator).double()
    times = torch.tensor([0.1, 0.4, 0.7, 1.0]).double() * process.t_end
    log_x = process.noised(log_x0, noise, times)
    h = process.hyvarinen_score(log_x, log_x0, times)
    for i, t in enumerate(times.tolist()):
        torch.testing.assert_close(process.noised(log_x0[i], noise[i], t), log_x[i], rtol=1e-13, atol=1e-13)
        # the difference of logarithms of about 1 is divided by v >= 1e-3 at the least
        torch.testing.assert_close(h[i], -1 - noise[i] / process.rho(t), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mu", [None, 0.1])
def test_the_kernel_is_the_limit_of_ito_steps(mu):
    """Euler-Maruyama on x itself: the mean of x is x0 exp(mu t) exactly, that of log x tends to log x0 + m."""
    process = GeometricBrownianMotion(sigma=0.8, mu=mu)
    steps, n = 200, 20_000
    generator = torch.Generator().manual_seed(0)
    x = torch.ones(n).double()
    for i in range(steps):
        t = i / steps
        noise = torch.randn(n, generator=generator, dtype=torch.float64)
        x = x * (1 + process.drift(t) / steps + process.volatility(t) * math.sqrt(1 / steps) * noise)
    log_x = x.log()
    # three standard errors of the mean and of the variance, plus the bias of the first order in 1 / 200
    assert log_x.mean().item() == pytest.approx(process.mean_shift(1.0), abs=3 * 0.8 / math.sqrt(n) + 0.005)
    assert log_x.var().item() == pytest.approx(process.variance(1.0), abs=3 * 0.64 * math.sqrt(2 / n) + 0.005)


def test_hyvarinen_score_is_x_times_the_slope_of_the_log_density():
    """Finite differences of log p(x) of the mixture: the reference, before anything is held to it."""
    mixture, shift, rho = one_dimensional(), 0.1, 0.4
    x = torch.linspace(0.3, 5, 200, dtype=torch.float64)[:, None]

    def log_density(x):
        return mixture.log_density(x.log(), shift, rho) - x.log()[:, 0]

    step = 1e-5 * x
    slope = (log_density(x + step) - log_density(x - step)) / (2 * step[:, 0])
    # truncation (1e-5)^2 / 6 times third derivatives below 100, rounding 1e-16 * 10 / 1e-5
    torch.testing.assert_close(x[:, 0] * slope, mixture.hyvarinen(x.log(), shift, rho)[:, 0], rtol=0, atol=1e-8)


@processes
def test_the_mean_of_the_conditional_score_is_the_score(process):
    """E[target | x_t] over the exact posterior of x0 is h(x_t): what denoising score matching rests on."""
    mixture, t = one_dimensional(), 0.3 * process.t_end
    shift, rho = process.mean_shift(t), process.rho(t)
    y = torch.linspace(-1.5, 2.5, 41, dtype=torch.float64)[:, None] + shift
    log_x0 = torch.linspace(-3, 4, 20_001, dtype=torch.float64)  # the trapezoid rule is spectrally accurate here
    log_prior = mixture.log_density(log_x0[:, None], 0.0, 0.0)
    posterior = (log_prior - 0.5 * ((y - log_x0 - shift) / rho) ** 2).softmax(1)
    mean = (posterior * process.hyvarinen_score(y, log_x0, t)).sum(1)
    torch.testing.assert_close(mean, mixture.hyvarinen(y, shift, rho)[:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sigma": 0.0}, "sigma must be > 0"),
        ({"mu": float("nan")}, "mu must be finite"),
        ({"sigma_schedule": "linear"}, "'constant', 'geometric'"),
        ({"rho_min": 0.0}, "rho_min must be > 0"),
        ({"rho_min": 2.0, "rho_max": 1.0}, "rho_max must be > 2.0"),
        ({"sigma": 0.005}, "sigma, which is rho_max where none is given"),
    ],
)
def test_wrong_values(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GeometricBrownianMotion(**kwargs)


def test_the_mathematics_needs_torch_alone():
    names = "DataMap, GeometricBrownianMotion, Parametrization, denoising_score_matching, noise_levels, reverse_step"
    program = f"import sys; from lightning_opt.diffusion import {names}; print('diffusers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
