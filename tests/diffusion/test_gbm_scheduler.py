import functools
import math
import statistics

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EulerDiscreteScheduler

from lightning_opt.diffusion import DataMap, GBMScheduler, log_moments
from tests.diffusion.scheduler_properties import PROPERTIES
from tests.reference import gbm_samplers
from tests.reference.lognormal_mixture import one_dimensional, two_dimensional

CONFIGS = [
    {},
    {"sampler": "exp_euler", "rho_max": 4.0, "timestep_spacing": "rho", "spacing_order": 3.0, "log_mean": 0.2},
    {"sampler": "ode", "prediction_type": "epsilon", "log_std": 0.5, "to_positive": "exp", "exp_scale": 1.0},
    {"sampler": "ambient", "prediction_type": "stein", "log_std": 0.4, "num_train_timesteps": 500},
    {"sampler": "dale", "prediction_type": "hyvarinen", "mu": 0.1, "timestep_spacing": "t", "spacing_order": 1.0},
    {
        "sampler": "exp_euler",
        "sigma_schedule": "geometric",
        "rho_max": 2.0,
        "timestep_spacing": "log",
        "log_mean": [0.3, -0.1, 0.0],
        "log_std": [0.4, 0.7, 1.0],
        "to_positive": "identity",
    },
    {"sampler": "multistep", "rho_max": 4.0, "timestep_spacing": "rho", "spacing_order": 3.0, "mu": 0.1},
    {"fused": True, "rho_max": 3.0, "sampler": "exp_euler", "mu": 0.1},
    {"fused": True, "prediction_type": "stein", "log_mean": [0.1, 0.2, 0.3], "log_std": [0.4, 0.3, 0.5]},
    {"inner_steps": 2, "step_scale": 0.5, "denoise_final": False, "noise_anneal": 0.9999, "log_mean": [0.1, 0.2, 0.3]},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_properties(check, config, tmp_path):
    check(GBMScheduler, config, tmp_path)


# --- the target distribution ---


def reverse(mixture, start, steps, extra=0.0, **config):
    """Log states from noised data, with the analytic score; ``extra`` times sigma^2 is added to the drift."""
    scheduler = GBMScheduler(**{"prediction_type": "epsilon", **config})
    scheduler.set_timesteps(steps)
    process, generator = scheduler.process, torch.Generator().manual_seed(1)
    log_x, levels = start, scheduler.sigmas.double().tolist()
    for i, t in enumerate(scheduler.timesteps):
        shift = process.mean_shift(process.time(levels[i]))
        log_x = scheduler.step(mixture.epsilon(log_x, shift, levels[i]), t, log_x, generator).prev_sample
        log_x += extra * (levels[i] ** 2 - levels[i + 1] ** 2)
    return log_x


def noised(mixture, n, **config):
    process, generator = GBMScheduler(**config).process, torch.Generator().manual_seed(0)
    log_x0 = mixture.sample_log(n, generator)
    return process.noised(log_x0, torch.randn(log_x0.shape, generator=generator, dtype=log_x0.dtype), process.t_end)


MIXTURE = one_dimensional().to(torch.float32)
UNIFORM = {"timestep_spacing": "t", "spacing_order": 1.0}
WRONG = {0.0: "right", -2.0: "no divergence term", -1.0: "half the divergence term", 0.5: "no Ito term"}


@functools.cache
def quantiles(n):
    return one_dimensional().log_quantiles(n).exp()


def distance(log_x):
    """Wasserstein-1 distance of positive samples to the exact target in one dimension, by its quantiles."""
    return (log_x.flatten().double().exp().sort().values - quantiles(len(log_x))).abs().mean().item()


def sliced(log_x, other, directions=64):
    """Wasserstein-1 distance of positive samples, averaged over directions."""
    angles = torch.arange(directions) * (math.pi / directions)
    axes = torch.stack([angles.cos(), angles.sin()])
    return ((log_x.exp() @ axes).sort(0).values - (other.exp() @ axes).sort(0).values).abs().mean().item()


def of_exact_samples(distance, mixture, n):
    """The distance that as many exact samples have: mean and standard deviation over 20 draws."""
    found = [distance(mixture.sample_log(n, torch.Generator().manual_seed(100 + i))) for i in range(20)]
    return statistics.mean(found), statistics.stdev(found)


@pytest.mark.parametrize(
    ("sampler", "extra"),
    [("ambient", 0.0), *(("dale", extra) for extra in WRONG)],
    ids=["ambient", *(f"dale, {name}" for name in WRONG.values())],
)
def test_a_thousand_multiplicative_steps_sample_the_target(sampler, extra):
    """Within sampling error of exact sampling in Wasserstein-1, which every wrong reverse equation is far outside of.

    The drift of the logarithm is 3/2 sigma^2 and more. Without the divergence 2 sigma^2 x of the noise it lacks 2
    sigma^2, with half of it sigma^2; without Ito's correction it has sigma^2 / 2 too much.
    """
    n = 10_000
    mean, spread = of_exact_samples(distance, MIXTURE, n)
    found = distance(reverse(MIXTURE, noised(MIXTURE, n), 1000, extra, sampler=sampler, **UNIFORM))
    assert (found <= mean + 3 * spread) == (extra == 0), f"{found:.4f} beside {mean:.4f} +- {spread:.4f}"
    if extra:
        assert found > 20 * mean


@pytest.mark.parametrize("extra", WRONG, ids=WRONG.values())
def test_a_thousand_steps_in_two_dimensions(extra):
    """The same with dependent coordinates; the distance is that of all one-dimensional projections of x."""
    mixture, n = two_dimensional().to(torch.float32), 3_000
    reference = mixture.sample_log(n, torch.Generator().manual_seed(99))
    mean, spread = of_exact_samples(lambda log_x: sliced(log_x, reference), mixture, n)
    found = sliced(reverse(mixture, noised(mixture, n), 1000, extra, sampler="dale", **UNIFORM), reference)
    assert (found <= mean + 3 * spread) == (extra == 0), f"{found:.4f} beside {mean:.4f} +- {spread:.4f}"


@pytest.mark.parametrize(
    ("sampler", "mu", "order"),
    [("dale", None, 1.0), ("dale", 0.1, 1.0), ("ambient", 0.1, 1.0), ("exp_euler", None, 2.0)],
)
def test_first_order(sampler, mu, order):
    """Half the step, half the error: that of 50,000 exact samples is 0.005, and the smallest here 0.01."""
    start = noised(MIXTURE, 50_000, mu=mu)
    config = {"sampler": sampler, "mu": mu, "timestep_spacing": "t", "spacing_order": order}
    errors = [distance(reverse(MIXTURE, start, steps, **config)) for steps in (10, 20, 40)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 1.6 < coarse / fine < 2.5, errors


@pytest.mark.parametrize("mu", [None, 0.1])
def test_multistep_needs_few_steps(mu):
    """Of second order: three and more times as near in twice the steps, where first order halves the error."""
    config = {"mu": mu, "rho_max": 1.6, "timestep_spacing": "rho", "spacing_order": 3.0}
    start = noised(MIXTURE, 200_000, mu=mu, rho_max=1.6)  # 0.0025 for so many exact samples
    errors = [distance(reverse(MIXTURE, start, steps, sampler="multistep", **config)) for steps in (10, 20)]
    assert errors[0] > 3 * errors[1], errors
    assert errors[1] < distance(reverse(MIXTURE, start, 20, sampler="exp_euler", **config))


@pytest.mark.parametrize("sampler", ["dale", "exp_euler"])
def test_the_quadratic_grid_is_better(sampler):
    start = noised(MIXTURE, 50_000)
    uniform, quadratic = (
        distance(reverse(MIXTURE, start, 30, sampler=sampler, spacing_order=order)) for order in (1.0, 2.0)
    )
    assert quadratic < 0.5 * uniform


# --- closed forms ---


def gaussian_epsilon(log_x, shift, rho, mean, std):
    """E[eps | log_x] for log x0 ~ N(mean, std^2)."""
    return (log_x - shift - mean) * (rho / (rho**2 + std**2))


def follow(scheduler, log_x, epsilon, generator=None):
    """A loop with a network that knows the noise: ``epsilon(log_x, mean_shift, rho)``."""
    for i, t in enumerate(scheduler.timesteps):
        rho = scheduler.sigmas[i // scheduler.order].item()
        shift = scheduler.process.mean_shift(scheduler.process.time(rho))
        log_x = scheduler.step(epsilon(log_x, shift, rho), t, log_x, generator).prev_sample
    return log_x


@pytest.mark.parametrize("mu", [None, 0.1])
def test_the_flow_of_log_normal_data_has_a_closed_form(mu):
    """z(rho) = b + (z_T - b) sqrt((c^2 + rho^2) / (c^2 + rho_T^2)); at the end of a schedule rho = 0.

    Errors are of first order, so that the extrapolation 2 y(2n) - y(n) is of second, but for the last step: one from
    rho_min to 0 moves log x by rho_min^2 / (2 c^2) = 6e-6 of its distance from b too far.
    """
    mean, std = 0.4, 0.3
    scheduler = GBMScheduler(sampler="ode", prediction_type="epsilon", mu=mu, rho_max=1.6, rho_min=1e-3)
    start = torch.linspace(-3, 3, 9, dtype=torch.float64)
    shift = scheduler.process.mean_shift(scheduler.process.t_end)
    exact = mean + (start - shift - mean) * std / math.hypot(std, 1.6)
    ends = {}
    for steps in (200, 400, 800):
        scheduler.set_timesteps(steps)
        ends[steps] = follow(scheduler, start, lambda y, m, rho: gaussian_epsilon(y, m, rho, mean, std))
    errors = {n: (end - exact).abs().max().item() for n, end in ends.items()}
    assert 1.9 < errors[200] / errors[400] < 2.1
    assert (2 * ends[800] - ends[400] - exact).abs().max().item() < 1e-5


@pytest.mark.parametrize(("spacing", "order"), [("t", 1.0), ("t", 2.0), ("rho", 7.0), ("log", 1.0)])
@pytest.mark.parametrize("mu", [None, 0.1])
def test_exp_euler_is_exact_for_constant_noise(spacing, order, mu):
    """Beside the same draws without it, a constant prediction c moves log x by -2 (rho_T - rho_s) c, on any grid."""
    scheduler = GBMScheduler(
        sampler="exp_euler",
        prediction_type="epsilon",
        mu=mu,
        timestep_spacing=spacing,
        spacing_order=order,
        rho_max=3.0,
        denoise_final=False,
    )
    start, c = torch.zeros(5, dtype=torch.float64), torch.linspace(-2, 2, 5, dtype=torch.float64)
    for steps in (1, 7):
        ends = []
        for factor in (0.0, 1.0):
            scheduler.set_timesteps(steps)
            generator = torch.Generator().manual_seed(0)
            ends.append(follow(scheduler, start, lambda y, m, rho, factor=factor: factor * c, generator))
        torch.testing.assert_close(ends[1] - ends[0], -2 * 3.0 * c, rtol=1e-12, atol=1e-12)
        # and the draws have the variance that the forward process added
    many = torch.zeros(40_000, dtype=torch.float64)
    scheduler.set_timesteps(7)
    end = follow(scheduler, many, lambda y, m, rho: torch.zeros_like(y), torch.Generator().manual_seed(0))
    assert end.std().item() == pytest.approx(3.0, rel=4 / (2 * len(many)) ** 0.5)
    assert end.mean().item() == pytest.approx(-scheduler.process.mean_shift(scheduler.process.t_end), abs=4 * 3 / 200)


@pytest.mark.parametrize("sampler", ["dale", "ambient", "exp_euler", "ode", "multistep"])
def test_the_last_step_gives_the_denoised_logarithm(sampler):
    scheduler = GBMScheduler(sampler=sampler, prediction_type="epsilon", mu=0.1)
    scheduler.set_timesteps(1)
    log_x, epsilon = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = scheduler.step(epsilon, scheduler.timesteps[0], log_x)
    expected = log_x - scheduler.process.mean_shift(1.0) - 0.8 * epsilon
    torch.testing.assert_close(result.prev_sample, expected)
    torch.testing.assert_close(result.pred_original_sample, expected)


def test_multistep_forgets_another_run():
    """A run from the middle begins at first order; what is returned may be changed, and another shape is refused."""
    scheduler = GBMScheduler(sampler="multistep", prediction_type="epsilon", rho_max=4.0)
    log_x, *outputs = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(0))

    def run(begin, change=False):
        scheduler.set_begin_index(begin)
        state, generator = log_x, torch.Generator().manual_seed(1)
        for output, t in zip(outputs, scheduler.timesteps[begin:], strict=False):
            result = scheduler.step(output, t, state, generator)
            state = result.prev_sample.clone()
            if change:
                result.pred_original_sample.zero_()
        return state

    scheduler.set_timesteps(6)
    alone = run(3)
    scheduler.set_timesteps(6)
    run(0)
    scheduler.set_timesteps(6)
    torch.testing.assert_close(run(3), alone, rtol=0, atol=0)
    scheduler.set_timesteps(6)
    torch.testing.assert_close(run(3, change=True), alone, rtol=0, atol=0)
    scheduler.set_timesteps(6)
    run(0)
    with pytest.raises(ValueError, match="call set_timesteps to begin with another batch"):
        scheduler.step(torch.zeros(3, 6), scheduler.timesteps[3], torch.zeros(3, 6))


# --- independent implementations ---


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of numpy, to diffusers
@pytest.mark.parametrize("steps", [10, 20])
def test_multistep_is_the_sde_solver_of_diffusers_in_the_logarithm(steps):
    """SDE-DPM-Solver++(2M) with the same noise: diffusers' noise levels and logarithms are float32, 1e-6 of 10."""
    ours = GBMScheduler(
        sampler="multistep",
        prediction_type="epsilon",
        rho_max=10.0,
        rho_min=0.02,
        timestep_spacing="rho",
        spacing_order=7.0,
        to_positive="exp",
        exp_scale=1.0,
    )
    ours.set_timesteps(steps)
    theirs = EDMDPMSolverMultistepScheduler(
        sigma_min=0.02, sigma_max=10.0, rho=7.0, algorithm_type="sde-dpmsolver++", prediction_type="epsilon"
    )
    theirs.set_timesteps(steps)
    torch.testing.assert_close(theirs.sigmas, ours.sigmas, rtol=1e-5, atol=0)
    log_x = y = ours.sample_prior((64, 1), torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for i, (t, t_theirs) in enumerate(zip(ours.timesteps, theirs.timesteps, strict=True)):
        rho = ours.sigmas[i].item()
        log_x = ours.step(MIXTURE.epsilon(log_x, 0.0, rho), t, log_x, generators[0]).prev_sample
        denoised = y - rho * MIXTURE.epsilon(y, 0.0, rho)
        c_skip, c_out = 0.25 / (rho**2 + 0.25), rho * 0.5 / (rho**2 + 0.25) ** 0.5
        y = theirs.step((denoised - c_skip * y) / c_out, t_theirs, y, generators[1]).prev_sample
    torch.testing.assert_close(y, log_x, rtol=0, atol=2e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of numpy, to diffusers
@pytest.mark.parametrize("steps", [10, 20])
def test_ode_is_the_euler_scheduler_of_diffusers_in_the_logarithm(steps):
    """The same noise levels, on log images: diffusers casts the sample to float32, 1e-7 of 10 a step."""
    ours = GBMScheduler(
        sampler="ode",
        prediction_type="epsilon",
        rho_max=10.0,
        rho_min=0.02,
        timestep_spacing="rho",
        spacing_order=7.0,
        to_positive="exp",
        exp_scale=1.0,
    )
    ours.set_timesteps(steps)
    theirs = EulerDiscreteScheduler(prediction_type="epsilon")
    theirs.set_timesteps(sigmas=ours.sigmas.tolist())
    torch.testing.assert_close(theirs.sigmas, ours.sigmas, rtol=1e-6, atol=0)
    mixture = one_dimensional()
    log_x = ours.sample_prior((64, 1), torch.Generator().manual_seed(0), dtype=torch.float64)
    y = log_x.clone()
    for i, (t, t_theirs) in enumerate(zip(ours.timesteps, theirs.timesteps, strict=True)):
        rho = ours.sigmas[i].item()
        log_x = ours.step(mixture.epsilon(log_x, 0.0, rho), t, log_x).prev_sample
        epsilon = mixture.epsilon(y, 0.0, rho)
        theirs.scale_model_input(y, t_theirs)
        y = theirs.step(epsilon, t_theirs, y).prev_sample.double()
        torch.testing.assert_close(log_x, y, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_noised_images_are_those_of_the_euler_scheduler_in_the_logarithm():
    ours = GBMScheduler(rho_max=10.0, rho_min=0.02, to_positive="exp", exp_scale=1.0)
    ours.set_timesteps(8)
    theirs = EulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=ours.sigmas.tolist())
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.rand(8, 1, 4, 4, generator=generator), torch.randn(8, 1, 4, 4, generator=generator)
    noised = ours.add_noise(ours.to_log(images), noise, ours.timesteps)
    torch.testing.assert_close(noised, theirs.add_noise(2 * images - 1, noise, theirs.timesteps), rtol=2e-6, atol=2e-6)


SIZES = {  # step size, steps at each time, decay of the noise
    ("mnist", "dale"): (6.165e-4, 1, 0.995),
    ("mnist", "ambient"): (1.438e-4, 4, 0.995),
    ("fashion_mnist", "dale"): (5.863e-4, 1, 0.995),
    ("kmnist", "dale"): (2.113e-4, 3, 0.995),
    ("kmnist", "ambient"): (2.113e-4, 3, 1.0),
    ("cifar10", "dale"): (1.142e-4, 6, 0.9995),
    ("cifar10", "ambient"): (1.438e-4, 5, 0.9995),
}
STARTS = {
    "mnist": (0.1565, 0.8353),
    "fashion_mnist": (0.2771, 0.8428),
    "kmnist": (0.2140, 0.8290),
    "cifar10": ([0.4075, 0.3785, 0.3693], [0.8016, 0.8004, 0.8005]),
}


@pytest.mark.parametrize(("dataset", "sampler"), SIZES)
def test_the_papers_settings_are_the_papers_updates(dataset, sampler):
    """The first and the last thirty times of a loop beside the published rule on x, the same draws, in float64."""
    delta, inner_steps, factor = SIZES[dataset, sampler]
    scheduler = GBMScheduler.paper(dataset, sampler)
    assert scheduler.config.step_scale == pytest.approx(1000 * delta, rel=5e-4)
    scheduler.set_timesteps(1000)
    times = [k / 1000 for k in range(1000, 0, -1)]
    expected = torch.tensor([1000 * t for t in times for _ in range(inner_steps)])
    torch.testing.assert_close(scheduler.timesteps, expected, rtol=1e-6, atol=0)

    def stein(x, t):
        return -(1 + gaussian_epsilon(x.log(), 0.0, 0.8 * math.sqrt(t), 0.4, 0.3) / (0.8 * math.sqrt(t))) / x

    start = scheduler.sample_prior((4, 3), torch.Generator().manual_seed(1), dtype=torch.float64)
    for first in (0, 970):
        part = times[first : first + 30]
        exact = getattr(gbm_samplers, sampler)(
            start.exp(),
            stein,
            part,
            scheduler.config.step_scale / 1000,
            0.8,
            0.32,
            torch.Generator().manual_seed(2),
            inner_steps,
            factor,
            anneal=factor**first,
        )
        scheduler.set_timesteps(1000)
        scheduler.set_begin_index(first * inner_steps)
        log_x, generator = start, torch.Generator().manual_seed(2)
        for i, t in enumerate(scheduler.timesteps[first * inner_steps : (first + 30) * inner_steps]):
            x = scheduler.scale_model_input(log_x, t)
            log_x = scheduler.step(stein(x, part[i // inner_steps]), t, log_x, generator).prev_sample
        # some hundred roundings of numbers of size 1
        torch.testing.assert_close(log_x.exp(), exact, rtol=1e-11, atol=0)


@pytest.mark.parametrize("dataset", STARTS)
def test_the_papers_start_is_its_fit(dataset):
    scheduler = GBMScheduler.paper(dataset)
    mean, std = (m if isinstance(m, list) else [m] * 3 for m in STARTS[dataset])
    n = 100_000
    start = scheduler.sample_prior((n, 3), torch.Generator().manual_seed(0))
    for i in range(3):
        assert start[:, i].mean().item() == pytest.approx(mean[i], abs=4 * std[i] / n**0.5)
        assert start[:, i].std().item() == pytest.approx(std[i], rel=4 / (2 * n) ** 0.5)


def test_computed_moments_in_place_of_the_fit():
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) ** 3
    mean, std = log_moments(DataMap("shift").to_log(images))
    scheduler = GBMScheduler.paper("mnist", log_mean=mean, log_std=std)
    assert scheduler.init_noise_sigma == pytest.approx(math.hypot(std, 0.8), rel=1e-12)
    assert scheduler.config.step_scale == pytest.approx(0.6165, abs=1e-4)


# --- options ---


def test_ambient_floors_what_is_not_positive_and_counts_it():
    scheduler = GBMScheduler(sampler="ambient", prediction_type="epsilon", denoise_final=False, noise_anneal=0.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.1])
    scheduler.set_begin_index(1)  # where the noise is annealed away
    # from 0.8 to 0.1 the factor is 1 + v / 2 - v / 0.8 eps with v = 0.63
    factors = torch.tensor([2.0, 0.5, 1e-5, 0.0, -1.0], dtype=torch.float64)
    epsilon = (1 + 0.63 / 2 - factors) * 0.8 / 0.63
    result = scheduler.step(epsilon, scheduler.timesteps[1], torch.zeros(5, dtype=torch.float64)).prev_sample.exp()
    torch.testing.assert_close(result, torch.tensor([2.0, 0.5, 1e-4, 1e-4, 1e-4], dtype=torch.float64))
    assert scheduler.num_nonpositive in (1, 2)  # the factor 0 is one by a rounding


def test_ambient_meets_factors_that_are_not_positive_in_large_steps():
    start, counts = noised(MIXTURE, 50_000), {}
    for steps in (10, 60):
        scheduler = GBMScheduler(sampler="ambient", prediction_type="epsilon", **UNIFORM)
        scheduler.set_timesteps(steps)
        follow(scheduler, start, MIXTURE.epsilon, torch.Generator().manual_seed(1))
        counts[steps] = scheduler.num_nonpositive
    assert counts[10] > 10
    assert counts[60] == 0
    scheduler.set_timesteps(10)
    assert scheduler.num_nonpositive == 0


def test_annealed_noise_decays_at_each_time_and_not_at_inner_steps():
    scheduler = GBMScheduler(prediction_type="epsilon", noise_anneal=0.5, inner_steps=3, denoise_final=False)
    scheduler.set_timesteps(4)
    zeros = torch.zeros(20_000, dtype=torch.float64)
    levels = scheduler.sigmas.double()
    stds = (levels[:-1] ** 2 - levels[1:] ** 2).sqrt()
    generator = torch.Generator().manual_seed(0)
    for i, t in enumerate(scheduler.timesteps):
        moved = scheduler.step(zeros, t, zeros, generator).prev_sample
        expected = stds[i // 3].item() * 0.5 ** (i // 3)
        assert moved.std().item() == pytest.approx(expected, rel=4 / (2 * len(zeros)) ** 0.5)
    assert scheduler.order == 3


def test_signs_are_kept_for_a_thousand_random_steps():
    """Whatever a network says: positive in float32 and half precision, without a clamp."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scheduler = GBMScheduler(prediction_type="epsilon", denoise_final=False)
        scheduler.set_timesteps(1000)
        generator = torch.Generator().manual_seed(0)
        log_x = torch.zeros(64, dtype=dtype)
        for t in scheduler.timesteps:
            output = 5 * torch.randn(64, generator=generator)
            log_x = scheduler.step(output.to(dtype), t, log_x, generator).prev_sample
        assert (log_x.exp() > 0).all()


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.get("sampler") not in ("ambient", "multistep")], ids=str)
def test_a_fused_step_is_the_other(config):
    """With the same noise, from a list of generators: to the rounding of float32, which is once a number there."""
    generator = torch.Generator().manual_seed(0)
    results = []
    for fused in (False, True):
        scheduler = GBMScheduler(**{**config, "fused": fused})
        scheduler.set_timesteps(5)
        log_x = scheduler.sample_prior((2, 3, 8, 8), torch.Generator().manual_seed(0))
        output = torch.randn(log_x.shape, generator=generator.manual_seed(1))
        for t in scheduler.timesteps[:2]:
            generators = [torch.Generator().manual_seed(seed) for seed in (2, 3)]
            result = scheduler.step(output, t, log_x, generators)
            log_x = result.prev_sample
        results.append(result)
    for unfused, fused in zip(results[0].to_tuple(), results[1].to_tuple(), strict=True):
        torch.testing.assert_close(fused, unfused, rtol=2e-6, atol=2e-6)


def test_noise_levels_of_ones_own():
    scheduler = GBMScheduler(prediction_type="epsilon", sampler="ode")
    for sigmas in ([0.8, 0.3, 0.1], [0.8, 0.3, 0.1, 0.0]):
        scheduler.set_timesteps(sigmas=sigmas)
        assert scheduler.sigmas.tolist() == pytest.approx([0.8, 0.3, 0.1, 0.0])
        assert scheduler.num_inference_steps == 3
    for wrong in ([0.3, 0.8], [0.8, 0.8], [0.8, -0.1], [0.0], [], [math.inf, 0.8], [math.nan, 0.8]):
        with pytest.raises(ValueError, match="sigmas must be positive, finite and decrease"):
            scheduler.set_timesteps(sigmas=wrong)
    for kwargs in ({}, {"num_inference_steps": 3, "sigmas": [0.8]}):
        with pytest.raises(ValueError, match="give num_inference_steps or sigmas"):
            scheduler.set_timesteps(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_train_timesteps": 0}, "num_train_timesteps must be >= 1"),
        ({"sigma": -0.8}, "sigma must be > 0"),
        ({"rho_min": 0.9}, "rho_max where none is given"),
        ({"rho_max": 0.005}, "rho_max must be > 0.01"),
        ({"sampler": "dael"}, "Did you mean 'dale'"),
        ({"prediction_type": "sample"}, "'edm', 'epsilon', 'hyvarinen', 'stein'"),
        ({"sigma_schedule": "linear"}, "'constant', 'geometric'"),
        ({"to_positive": "log"}, "'shift', 'exp', 'identity'"),
        ({"timestep_spacing": "quadratic"}, "'t', 'rho', 'log'"),
        ({"spacing_order": -1.0}, "spacing_order must be > 0"),
        ({"log_std": 0.0}, "log_std must be > 0"),
        ({"shift": 0.0}, "shift must be > 0"),
        ({"step_scale": 0.0}, "step_scale must be > 0"),
        ({"inner_steps": 0}, "inner_steps must be >= 1"),
        ({"inner_steps": 1.5}, "inner_steps must be a whole number"),
        ({"fused": True, "sampler": "ambient"}, "fused must be False with sampler='ambient'"),
        ({"fused": True, "sampler": "multistep"}, "fused must be False with sampler='multistep'"),
        ({"inner_steps": 2, "sampler": "multistep"}, "inner_steps must be 1 with sampler='multistep'"),
        ({"step_scale": 0.5, "sampler": "multistep"}, "step_scale must be 1 with sampler='multistep'"),
        ({"noise_anneal": 1.1}, r"noise_anneal must be in \[0, 1\]"),
    ],
)
def test_wrong_values(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GBMScheduler(**kwargs)


def test_settings_that_the_paper_has_not():
    with pytest.raises(ValueError, match="dataset must be one of 'mnist'"):
        GBMScheduler.paper("imagenet")
    with pytest.raises(ValueError, match="sampler of 'fashion_mnist' must be one of 'dale'"):
        GBMScheduler.paper("fashion_mnist", "ambient")


def test_channels_must_agree():
    scheduler = GBMScheduler(log_mean=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"the moments have 3 channels, but the shape is \(4, 1, 8, 8\)"):
        scheduler.sample_prior((4, 1, 8, 8))
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="have 3 channels, but the sample has 1"):
        scheduler.step(torch.zeros(4, 1, 8, 8), scheduler.timesteps[0], torch.zeros(4, 1, 8, 8))
