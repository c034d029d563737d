"""The Gaussian baseline: its loss against the paper's equations, training, sampling by diffusers' schedulers."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from lightning_opt.diffusion import GaussianDiffusion
from tests.diffusion.small_models import IMAGES, Told, TrainedGaussian, fit, small_unet

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # in schedulers of diffusers 0.42
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_loss_is_the_squared_error_of_the_prediction(prediction):
    def network(state, times):
        return torch.tanh(state) + times[:, None, None, None] / 1000

    module = GaussianDiffusion(Told(network), DDPMScheduler(prediction_type=prediction))
    losses = module.losses(IMAGES[:6], None, generator(2))
    draw = generator(2)
    times = torch.randint(1000, (6,), generator=draw)
    noise = torch.randn(IMAGES[:6].shape, generator=draw).double()
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[times].view(-1, 1, 1, 1)
    clean = 2 * IMAGES[:6].double() - 1
    state = alphas.sqrt() * clean + (1 - alphas).sqrt() * noise
    target = {"epsilon": noise, "sample": clean, "v_prediction": alphas.sqrt() * noise - (1 - alphas).sqrt() * clean}
    expected = (network(state.float(), times).double() - target[prediction]).square().flatten(1).mean(1)
    # diffusers multiplies 1,000 alphas in float32: 1,000 * 6e-8 relative
    torch.testing.assert_close(losses.loss.double(), expected, rtol=3e-4, atol=1e-6)
    assert torch.equal(losses.level, times / 1000)


def test_trains_samples_and_becomes_a_pipeline_of_diffusers(tmp_path):
    module = TrainedGaussian(small_unet())
    trainer = fit(module, tmp_path)
    assert {"train/loss", "val/loss", "val/loss_q0", "val/loss_q3"} <= trainer.callback_metrics.keys()
    for scheduler, steps in (
        (None, 5),
        ("DDIMScheduler", 4),
        ("DPMSolverMultistepScheduler", 4),
        ("EulerDiscreteScheduler", 4),
    ):
        images = module.sample(3, num_inference_steps=steps, scheduler=scheduler, generator=generator())
        assert images.shape == (3, 1, 8, 8)
        assert images.min() >= 0
        assert images.max() <= 1
    pipeline = module.pipeline()
    assert type(pipeline) is DDPMPipeline
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(batch_size=3, num_inference_steps=5, generator=generator(), output_type="np").images
    ours = module.sample(3, num_inference_steps=5, generator=generator()).permute(0, 2, 3, 1).numpy()
    assert abs(theirs - ours).max() == 0


def test_wrong_values():
    with pytest.raises(ValueError, match="prediction_type must be one of 'epsilon', 'sample', 'v_prediction'"):
        GaussianDiffusion(small_unet(), DDPMScheduler(prediction_type="flow"))
    with pytest.raises(ValueError, match=r"images must be in \[0, 1\], got values from 0.0 to 2.0"):
        GaussianDiffusion(small_unet()).losses(2 * torch.eye(8).view(1, 1, 8, 8), None, generator())
    module = GaussianDiffusion(small_unet(num_class_embeds=4), num_classes=3)
    with pytest.raises(ValueError, match="diffusers has no pipeline for a Gaussian model of classes"):
        module.pipeline()
