"""The elementwise functions of the multiplicative model: mathematics, options, backends and wrong calls."""

import pytest
import torch

from lightning_opt.diffusion import (
    GeometricBrownianMotion,
    NoiseKey,
    Parametrization,
    log_step,
    multiplicative_update,
    noise_with_target,
    philox_normal,
)
from lightning_opt.fast_exp import fast_exp


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fused", [False, True])
def test_the_update_of_logarithms_is_the_logarithm_of_the_update(fused):
    x, p = normal(3, 50).exp(), normal(3, 50, seed=1)
    options = {"a": 0.1, "b": -0.3, "c": 0.5, "noise": NoiseKey(9), "fused": fused}
    logarithm = multiplicative_update(x.log(), p, log_state=True, **options)
    torch.testing.assert_close(multiplicative_update(x, p, **options), logarithm.exp(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_geometric_brownian_motion_in_many_steps_has_its_moments(fused):
    """200 exact steps of log-normal noise: log x(1) is normal with mean mu - sigma^2/2 and variance sigma^2."""
    mu, sigma, steps, n = 0.3, 0.8, 200, 40_000
    generator = torch.Generator().manual_seed(0)
    x = torch.ones(n)
    for _ in range(steps):
        options = {"a": (mu - sigma**2 / 2) / steps, "c": sigma * steps**-0.5, "fused": fused}
        multiplicative_update(x, noise=generator, out=x, **options)
    log_x = x.double().log()
    assert abs(log_x.mean() - (mu - sigma**2 / 2)) < 4 * sigma / n**0.5
    assert abs(log_x.var() - sigma**2) < 4 * sigma**2 * (2 / n) ** 0.5


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("prediction_type", ["edm", "epsilon", "hyvarinen"])
def test_noising_gives_what_the_parametrization_defines(prediction_type, fused):
    process = GeometricBrownianMotion(sigma=1.5, mu=0.2)
    parametrization = Parametrization(prediction_type, log_mean=[0.1, -0.4], log_std=[0.3, 0.6])
    log_x0, noise = 0.4 * normal(4, 2, 3, 3), normal(4, 2, 3, 3, seed=1)
    t = torch.tensor([0.001, 0.1, 0.5, 1.0])
    m, rho = process.mean_shift(t), process.rho(t)
    mean, std = parametrization.moments(log_x0)
    options = {"mean_shift": m, "rho": rho, "log_mean": mean, "log_std": std, "fused": fused}
    log_x = process.noised(log_x0, noise, t)
    wide = [v.reshape(-1, 1, 1, 1) for v in (m, rho)]
    target = parametrization.output(noise, log_x, *wide)
    scaled = noise_with_target(log_x0, noise, target=prediction_type, **options)
    torch.testing.assert_close(scaled.target, target, rtol=1e-5, atol=1e-4)  # theirs cancels where rho is small
    torch.testing.assert_close(scaled.state, parametrization.network_input(log_x, *wide), rtol=1e-5, atol=1e-6)
    log = noise_with_target(log_x0, noise, state="log", **options)
    torch.testing.assert_close(log.state, log_x, rtol=1e-6, atol=1e-6)
    positive = noise_with_target(log_x0.exp(), noise, state="positive", log_input=False, **options)
    torch.testing.assert_close(positive.state, log_x.exp(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_goes_to_the_denoised_state_and_adds_noise(fused):
    y, output, noise = normal(2, 9), normal(2, 9, seed=1), normal(2, 9, seed=2)
    whole = log_step(y, output, skip=0.5, gain=2.0, constant=0.1, fused=fused)
    torch.testing.assert_close(whole.denoised, 0.5 * y + 2 * output + 0.1)
    assert torch.equal(whole.state, whole.denoised)
    half = log_step(y, output, noise, skip=0.5, gain=2.0, constant=0.1, pull=0.5, shift=1.0, scale=3.0, fused=fused)
    torch.testing.assert_close(half.state, (y + whole.denoised) / 2 + 1 + 3 * noise)


def test_generators_draw_the_same_noise_on_every_backend_and_move_on():
    x = torch.zeros(5, 7)
    before = torch.get_rng_state()
    draws = []
    for fused in (False, True, None):
        generator = torch.Generator().manual_seed(3)
        draws.append([multiplicative_update(x, noise=generator, c=1.0, log_state=True, fused=fused) for _ in range(2)])
    for first, second in draws:
        torch.testing.assert_close(first, draws[0][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(second, draws[0][1], rtol=1e-6, atol=1e-6)
        assert (first - second).abs().min() > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fused", [False, True])
def test_noise_follows_the_elements_in_any_layout(fused):
    x = torch.zeros(6, 4, 5)
    expected = philox_normal(x.shape, (1, 2))
    layouts = [
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        torch.zeros(12, 4, 10)[::2, :, ::2],
        x[:1].expand(6, 4, 5),
    ]
    for sample in layouts:
        assert not sample.is_contiguous()
        y = multiplicative_update(sample, noise=(1, 2), c=1.0, log_state=True, fused=fused)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_out_may_be_the_sample_or_any_other_tensor(fused):
    x = normal(6, 4).exp()
    expected = multiplicative_update(x, a=0.5, fused=False)
    strided = torch.zeros(6, 8)[:, ::2]
    for out in (torch.zeros(6, 4), strided, x):
        version = out._version
        assert multiplicative_update(x, a=0.5, out=out, fused=fused) is out
        torch.testing.assert_close(out, expected)
        assert out._version > version


def test_gradients_go_through_the_reference_alone():
    x = normal(2, 3).exp().requires_grad_()
    b = torch.tensor([0.5, 1.0], requires_grad=True)
    y = multiplicative_update(x, torch.ones(2, 3), b=b)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.5], [1.0]]).exp().expand(2, 3))
    torch.testing.assert_close(b.grad, y.detach().sum(1))
    with pytest.raises(RuntimeError, match=r"multiplicative_update\(fused=True\) cannot be honoured: autograd"):
        multiplicative_update(x, fused=True)
    with torch.no_grad():
        assert not multiplicative_update(x, fused=True).requires_grad


def test_poly_is_the_polynomial():
    p = torch.linspace(-100, 88, 4001)
    for fused in (True, False):
        y = multiplicative_update(torch.ones(4001), p, b=1.0, exp_impl="poly", fused=fused)
        assert torch.equal(y, fast_exp(p))
    default = multiplicative_update(torch.ones(4001), p, b=1.0, fused=True)
    assert torch.equal(default, fast_exp(p))


def test_float64_is_computed_in_float64_by_the_reference():
    x = normal(3, 4).double()
    y = multiplicative_update(x, a=1e-12, log_state=True)
    torch.testing.assert_close(y - x, torch.full_like(x, 1e-12), rtol=1e-3, atol=0)
    with pytest.raises(RuntimeError, match=r"noise_with_target\(fused=True\) cannot be honoured.*not float64"):
        noise_with_target(x, x, rho=1.0, fused=True)
    with pytest.raises(ValueError, match="computes in float32, got a sample of float64"):
        multiplicative_update(x, exp_impl="poly")


def test_compiled_functions_use_the_reference():
    @torch.compile(backend="eager")
    def update(x: torch.Tensor) -> torch.Tensor:
        return multiplicative_update(x, noise=x, a=0.5, c=0.1)

    x = normal(3, 4)
    torch.testing.assert_close(update(x), multiplicative_update(x, noise=x, a=0.5, c=0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fused": "yes"}, "fused must be one of None, True, False"),
        ({"exp_impl": "fast"}, "exp_impl must be one of None, 'native', 'poly'"),
        ({"prediction": torch.zeros(4, 2)}, r"prediction must have shape \(4, 3\), got \(4, 2\)"),
        ({"noise": torch.zeros(3)}, r"noise must have shape \(4, 3\), got \(3,\)"),
        ({"noise": (-1, 0)}, r"seed must be in \[0, 2\*\*64\), got -1"),
        ({"noise": torch.zeros(4, 3, device="meta")}, "noise must be on cpu, got a tensor on meta"),
        ({"a": torch.zeros(3)}, r"a must be a number, a vector with one for each of 4 samples.* shape \(3, 1\)"),
        ({"c": torch.zeros(2, 1, 1)}, r"c must be a number.* got shape \(2, 1, 1\) beside \(4, 3\)"),
        ({"out": torch.zeros(4, 3).double()}, "out must be torch.float32, as the sample is, got torch.float64"),
    ],
)
def test_wrong_calls_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        multiplicative_update(torch.zeros(4, 3), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "stein"}, "target must be one of 'edm', 'epsilon', 'hyvarinen'"),
        ({"state": "x"}, "state must be one of 'scaled', 'log', 'positive'"),
        ({"noise": None}, "noise must be a tensor, a generator or a key, got None"),
    ],
)
def test_wrong_noising_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        noise_with_target(torch.zeros(4, 3), **{"noise": (0, 0), "rho": 1.0, **options})
