import math

import pytest
import torch

from lightning_opt.diffusion import (
    Parametrization,
    denoised_log,
    epsilon_from_hyvarinen,
    hyvarinen_from_epsilon,
    loss_weight,
    preconditioning,
)

TYPES = ("edm", "epsilon", "hyvarinen", "stein")
types = pytest.mark.parametrize("prediction_type", TYPES)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(log_mean=0.3, log_std=0.4, shift=-0.2, rho=None):
    """Log states of four samples at four noise levels, and the noise in them."""
    rho = torch.tensor([0.01, 0.2, 0.8, 4.0], dtype=torch.float64).view(4, 1, 1, 1) if rho is None else rho
    noise = draw(4, 2, 3, 3)
    log_x0 = log_mean + log_std * draw(4, 2, 3, 3, seed=1)
    return log_x0, noise, log_x0 + shift + rho * noise, shift, rho


@types
def test_a_networks_output_stands_for_the_noise_it_was_made_from(prediction_type):
    p = Parametrization(prediction_type, 0.3, 0.4)
    _, noise, log_x, shift, rho = batch()
    output = p.output(noise, log_x, shift, rho)
    # Hyvarinen's score is -1 - eps / rho: at rho = 0.01 and back that loses a factor 100 of the rounding
    torch.testing.assert_close(p.epsilon(output, log_x, shift, rho), noise, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        p.output(p.epsilon(output, log_x, shift, rho), log_x, shift, rho), output, rtol=1e-11, atol=1e-11
    )


def test_each_output_is_what_its_name_says():
    log_x0, noise, log_x, shift, rho = batch()
    output = {name: Parametrization(name, 0.3, 0.4).output(noise, log_x, shift, rho) for name in TYPES}
    torch.testing.assert_close(output["epsilon"], noise)
    torch.testing.assert_close(output["hyvarinen"], -1 - noise / rho)
    torch.testing.assert_close(output["stein"], (-1 - noise / rho) / log_x.exp())
    # D = c_skip z + c_out F is the clean logarithm, where the noise is the one that was added
    c_skip, c_out, _ = preconditioning(rho, 0.4)
    z = log_x - shift - 0.3
    torch.testing.assert_close(c_skip * z + c_out * output["edm"], log_x0 - 0.3, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(denoised_log(noise, log_x, shift, rho), log_x0, rtol=1e-11, atol=1e-11)


def test_scores_of_the_noise():
    noise, rho = draw(5), 0.3
    torch.testing.assert_close(epsilon_from_hyvarinen(hyvarinen_from_epsilon(noise, rho), rho), noise)
    torch.testing.assert_close(hyvarinen_from_epsilon(noise, rho), -1 - noise / 0.3)


@pytest.mark.parametrize("rho", [0.01, 0.4, 4.0])
def test_preconditioned_inputs_and_targets_have_unit_variance(rho):
    """The point of the default: a network sees the same scale at every noise level."""
    p, n = Parametrization("edm", 0.3, 0.4), 200_000
    log_x0, noise = 0.3 + 0.4 * draw(n), draw(n, seed=1)
    log_x = log_x0 - 0.2 + rho * noise
    for values in (p.network_input(log_x, -0.2, rho), p.output(noise, log_x, -0.2, rho)):
        # four standard errors of a mean and of a standard deviation
        assert values.mean().item() == pytest.approx(0, abs=4 / math.sqrt(n))
        assert values.std().item() == pytest.approx(1, abs=4 / math.sqrt(2 * n))


def test_what_the_network_reads():
    _, _, log_x, shift, rho = batch()
    scaled = (log_x - shift - 0.3) / torch.sqrt(rho**2 + 0.4**2)
    for name in ("edm", "epsilon", "hyvarinen"):
        torch.testing.assert_close(Parametrization(name, 0.3, 0.4).network_input(log_x, shift, rho), scaled)
    torch.testing.assert_close(Parametrization("stein", 0.3, 0.4).network_input(log_x, shift, rho), log_x.exp())


@types
def test_moments_of_each_channel(prediction_type):
    """Lists are the floats of each channel, one by one."""
    both = Parametrization(prediction_type, [0.3, -0.1], [0.4, 0.7])
    _, noise, log_x, shift, rho = batch()
    outputs, inputs = both.output(noise, log_x, shift, rho), both.network_input(log_x, shift, rho)
    for i, (mean, std) in enumerate([(0.3, 0.4), (-0.1, 0.7)]):
        one = Parametrization(prediction_type, mean, std)
        y, e = log_x[:, i : i + 1], noise[:, i : i + 1]
        torch.testing.assert_close(outputs[:, i : i + 1], one.output(e, y, shift, rho))
        torch.testing.assert_close(inputs[:, i : i + 1], one.network_input(y, shift, rho))
    torch.testing.assert_close(both.epsilon(outputs, log_x, shift, rho), noise, rtol=1e-11, atol=1e-11)


def test_weights_are_those_of_hyvarinens_score():
    """lambda (h' - h)^2 is weight * (eps' - eps)^2, and "edm" the plain square of the preconditioned output."""
    p = Parametrization("edm", 0.3, 0.4)
    _, noise, log_x, shift, rho = batch()
    other = noise + draw(*noise.shape, seed=2)
    score_error = (hyvarinen_from_epsilon(other, rho) - hyvarinen_from_epsilon(noise, rho)) ** 2
    v = rho**2
    for name, factor in {"edm": v * (v + 0.16) / 0.16, "v": v, "v2": v**2}.items():
        torch.testing.assert_close(loss_weight(name, rho, 0.4) * (other - noise) ** 2, factor * score_error)
    output_error = (p.output(other, log_x, shift, rho) - p.output(noise, log_x, shift, rho)) ** 2
    torch.testing.assert_close(loss_weight("edm", rho, 0.4) * (other - noise) ** 2, output_error, rtol=1e-9, atol=1e-9)


def test_the_input_keeps_its_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        sample = torch.zeros(2, 3, dtype=dtype)
        assert Parametrization("edm", [0.1, 0.2, 0.3], 1.0).network_input(sample, 0.0, 0.5).dtype == dtype


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prediction_type": "epsilom"}, "Did you mean 'epsilon'"),
        ({"log_mean": float("inf")}, "log_mean must be finite"),
        ({"log_std": 0.0}, "log_std must be > 0"),
        ({"log_std": [1.0, -1.0]}, "log_std must be > 0"),
        ({"log_mean": [0.0, 0.0], "log_std": [1.0, 1.0, 1.0]}, "got 2 and 3"),
    ],
)
def test_wrong_values(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Parametrization(**kwargs)


def test_channels_of_the_moments_and_of_the_sample_must_agree():
    p = Parametrization("edm", [0.0, 0.0, 0.0], 1.0)
    with pytest.raises(ValueError, match="have 3 channels, but the sample has 1"):
        p.network_input(torch.zeros(4, 1, 8, 8), 0.0, 0.5)
    with pytest.raises(ValueError, match="'edm', 'v', 'v2'"):
        loss_weight("v3", 0.5, 1.0)
