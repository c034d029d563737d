"""The sampling loop: against closed forms, guidance, swapped schedulers, and networks that go wrong."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from lightning_opt.diffusion import GBMDiffusion, GBMScheduler, SamplingError, sample, sampling_scheduler
from tests.diffusion.small_models import IMAGES, Told, small_unet

SHAPE = (5, 1, 8, 8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_gaussian_logarithms_come_out_with_their_moments():
    """For normal log x0 the output 0 is exact, and the flow ends at mean + (z - mean) sd / sqrt(sd^2 + rho_max^2)."""
    mean, std, rho_max = 0.35, 0.1, 2.0
    scheduler = GBMScheduler(
        rho_min=1e-3, rho_max=rho_max, sampler="ode", log_mean=mean, log_std=std, timestep_spacing="log",
        to_positive="identity",
    )  # fmt: skip
    images = sample(Told(lambda state, _: 0 * state), scheduler, SHAPE, num_inference_steps=2000, generator=generator())
    start = scheduler.sample_prior(SHAPE, generator=generator(), dtype=torch.float32)
    exact = mean + (start - mean) * std / math.hypot(std, rho_max)
    # first order in the step of log rho, log(2000) / 2000 = 0.0038, over a path of length one in units of std
    assert (images.log() - exact).abs().max() < 0.0038 * std * 4
    assert images.dtype == torch.float32


def test_guidance_combines_the_outputs_for_class_and_no_class():
    network = Told(lambda state, times, labels: labels.view(-1, 1, 1, 1) + 0 * state)
    seen = []
    scheduler = GBMScheduler(sampler="ode")
    step = scheduler.step
    scheduler.step = lambda output, *rest: (seen.append(output), step(output, *rest))[1]
    labels = torch.arange(5)
    sample(network, scheduler, SHAPE, num_inference_steps=2, class_labels=labels, null_label=10, guidance_scale=3.0)
    assert torch.equal(seen[0], (10 + 3.0 * (labels - 10.0)).view(-1, 1, 1, 1).expand(SHAPE))
    assert torch.equal(network.calls[0][2], torch.cat([labels, torch.full((5,), 10)]))
    assert torch.equal(network.calls[0][0][:5], network.calls[0][0][5:])
    with pytest.raises(ValueError, match="guidance_scale=3.0 needs class_labels and null_label"):
        sample(network, scheduler, SHAPE, guidance_scale=3.0)


@pytest.mark.parametrize("scheduler", [GBMScheduler(sampler="exp_euler"), DDPMScheduler()])
def test_samples_depend_on_the_generator_alone(scheduler):
    states = torch.get_rng_state()
    unet = small_unet()
    draws = [sample(unet, scheduler, SHAPE, num_inference_steps=3, generator=generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert all(images.min() >= 0 and images.max() <= 1 for images in draws)
    assert torch.equal(torch.get_rng_state(), states)


def fails_late(bad):
    """An output that is wrong from the third step on, which has the third of three times."""

    def output(state, times):
        seen.add(times[0].item())
        return bad(state) if len(seen) == 3 else state

    seen = set()
    return Told(output)


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (lambda state: state / 0, r"step 3 of 4: Told returned 320 of 320 numbers that are not finite"),
        (lambda state: state[:, :, 1:], r"step 3 of 4: Told returned the shape \[5, 1, 7, 8\] for .*\[5, 1, 8, 8\]"),
    ],
)
def test_a_network_that_goes_wrong_is_reported_with_its_step(bad, complaint):
    with pytest.raises(SamplingError, match=complaint):
        sample(fails_late(bad), GBMScheduler(), SHAPE, num_inference_steps=4)


def test_the_network_reads_what_it_was_trained_on(tmp_path):
    """At one noise level the loop gives the network the input and the time that the loss gives it."""
    network = Told(lambda state, _: 0 * state)
    module = GBMDiffusion(network, log_moments=(0.2, 0.25))
    module.losses(IMAGES[:1], None, generator(3))
    trained_input, trained_time, _ = network.calls.pop()
    level = torch.rand(1, generator=(draw := generator(3)))
    rho = 0.01 * 400.0 ** level.item()
    noise = torch.randn(IMAGES[:1].shape, generator=draw)
    scheduler = sampling_scheduler(module.scheduler)
    scheduler.set_timesteps(sigmas=[rho])
    scheduler.set_timesteps, scheduler.sample_prior = (
        lambda *_, **__: None,
        lambda *_, **__: scheduler.to_log(IMAGES[:1]) + rho * noise,
    )
    sample(network, scheduler, (1, 1, 8, 8))
    # float32 numbers of size 4 and 600, rounded in another order
    torch.testing.assert_close(network.calls[0][0], trained_input, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network.calls[0][1], trained_time, rtol=1e-6, atol=0)


def test_another_scheduler_takes_over_what_training_fixed():
    trained = GBMScheduler(rho_max=3.0, log_mean=0.1, log_std=0.4, to_positive="exp", sampler="ode", inner_steps=2)
    same = sampling_scheduler(trained, arguments={"sampler": "dale"})
    own = {key: value for key, value in trained.config.items() if not key.startswith("_")}
    assert {key: same.config[key] for key in own} == {**own, "sampler": "dale"}
    assert same is not trained
    betas = sampling_scheduler(DDPMScheduler(beta_end=0.03, prediction_type="sample"), "diffusers.DDIMScheduler")
    assert type(betas).__name__ == "DDIMScheduler"
    assert (betas.config.beta_end, betas.config.prediction_type) == (0.03, "sample")


@pytest.mark.parametrize(
    ("name", "arguments", "complaint"),
    [
        ("GBMShceduler", {}, "there is no scheduler named 'GBMShceduler'. Did you mean .*GBMScheduler"),
        ("torch.nn.Linear", {}, "there is no scheduler named 'torch.nn.Linear'"),
        ("no.such.Module", {}, "there is no scheduler named"),
        ("DDIMScheduler", {}, "DDIMScheduler samples from added noise, .* with multiplicative noise .GBMScheduler"),
        (None, {"samplr": "ode"}, "GBMScheduler has no argument 'samplr'. Did you mean .*sampler"),
        (None, {"sampler": "odd"}, "sampler must be one of"),
    ],
)
def test_wrong_schedulers(name, arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        sampling_scheduler(GBMScheduler(), name, arguments)
    with pytest.raises(ValueError, match="GBMScheduler samples from multiplicative noise, .* with added noise"):
        sampling_scheduler(DDPMScheduler(), "GBMScheduler")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"num": 0}, "num must be >= 1"),
        ({"num_inference_steps": 0}, "num_inference_steps must be >= 1"),
        ({"guidance_scale": -1.0}, "guidance_scale must be >= 0"),
        ({"guidance_scale": 2.0}, r"guidance_scale=2.0 needs a model that was trained with classes \(num_classes\)"),
        ({"class_labels": torch.zeros(4)}, "the model was trained without classes"),
    ],
)
def test_wrong_arguments_of_the_module(arguments, complaint):
    module = GBMDiffusion(small_unet(), log_moments=(0.2, 0.25))
    with pytest.raises(ValueError, match="GBMDiffusion has seen no data yet: fit it, or load a checkpoint"):
        module.sample(4)
    module.image_shape = (1, 8, 8)
    with pytest.raises(ValueError, match=complaint):
        module.sample(**{"num": 4, **arguments})


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [
        ([0, 1, 3, 0], "class_labels must be from 0 to 2, got 0 to 3"),
        ([0, -1, 1, 1], "class_labels must be from 0 to 2, got -1 to 1"),
        ([0, 1], "class_labels must be 4 whole numbers, got torch.int64 of shape .2."),
        ([0.5] * 4, "class_labels must be 4 whole numbers, got torch.float32"),
    ],
)
def test_wrong_labels(labels, complaint):
    module = GBMDiffusion(small_unet(num_class_embeds=4), log_moments=(0.2, 0.25), num_classes=3)
    module.image_shape = (1, 8, 8)
    with pytest.raises(ValueError, match=complaint):
        module.sample(4, class_labels=torch.tensor(labels))
    undropped = GBMDiffusion(small_unet(num_class_embeds=4), num_classes=3, label_dropout=0)
    with pytest.raises(ValueError, match="needs a model that was trained with label_dropout > 0"):
        undropped.check_sampling(guidance_scale=2.0)


def test_sampling_runs_in_evaluation_mode_and_leaves_modes_and_scheduler_alone():
    module = GBMDiffusion(small_unet(dropout=0.5), log_moments=(0.2, 0.25))
    module.image_shape = (1, 8, 8)
    module.denoiser.mid_block.eval()
    draws = [module.sample(2, num_inference_steps=2, generator=generator()) for _ in range(2)]
    assert torch.equal(*draws)
    assert module.denoiser.training
    assert not module.denoiser.mid_block.training
    assert module.scheduler.num_inference_steps is None
