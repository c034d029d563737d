"""What only a GPU can show; collected where there is one."""

import pytest
import torch

from lightning_opt.diffusion import GBMScheduler

CONFIGS = [
    {"log_mean": 0.1},
    {"sampler": "exp_euler", "fused": True},
    {"sampler": "ode", "mu": 0.1},
    {"sampler": "ambient", "prediction_type": "stein"},
]


@pytest.fixture
def _no_waiting():
    yield
    torch.cuda.set_sync_debug_mode("default")


def loop(scheduler, steps=8, nan_at=None):
    """A schedule on the device; the network says 0."""
    scheduler.set_timesteps(steps, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    sample = scheduler.sample_prior((4, 1, 8, 8), generator, device="cuda")
    output, bad = torch.zeros_like(sample), torch.full_like(sample, float("nan"))
    for i, t in enumerate(scheduler.timesteps):
        if i == 1 and nan_at is None:  # the first step compiles and fills caches
            torch.cuda.set_sync_debug_mode("error")
        if i == steps - 1:
            torch.cuda.set_sync_debug_mode("default")
        scheduler.scale_model_input(sample, t)
        sample = scheduler.step(bad if i == nan_at else output, t, sample, generator).prev_sample
    return sample


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_steps_do_not_wait_for_the_device(config):
    sample = loop(GBMScheduler(**config))
    assert sample.device.type == "cuda"
    assert torch.isfinite(sample).all()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_numbers_that_are_not_finite_are_reported_at_the_end_with_their_step(config):
    with pytest.raises(ValueError, match="not finite at step 3 of 8"):
        loop(GBMScheduler(**config), nan_at=3)


def test_a_fused_loop_is_that_of_the_cpu():
    """One seed, one noise on every device."""
    results = []
    for device in ("cpu", "cuda"):
        scheduler = GBMScheduler(fused=True)
        scheduler.set_timesteps(8, device=device)
        sample = torch.zeros(4, 1, 8, 8, device=device)
        for t in scheduler.timesteps:
            generator = torch.Generator().manual_seed(0)
            sample = scheduler.step(torch.zeros_like(sample), t, sample, generator).prev_sample
        results.append(sample.cpu())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
