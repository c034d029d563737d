from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torch import Tensor, nn

from lightning_opt._checks import check_choice
from lightning_opt.registry import register

from .data_map import check_unit_range
from .diffusion_module import DiffusionModule, Losses, pipeline_denoiser
from .sampling import sampling_scheduler

PREDICTIONS = ("epsilon", "sample", "v_prediction")


@register("module", summary="Gaussian denoising diffusion (DDPM) of images, the baseline", paper="2006.11239")
class GaussianDiffusion(DiffusionModule):
    r"""Trains a denoiser on images with Gaussian noise added, the usual way: the baseline of :class:`GBMDiffusion`.

    The same denoiser, data, optimizer and callbacks serve both, so ``--model=GaussianDiffusion`` on the command line of
    a recipe for one is the comparison. An image from -1 to 1 is noised at a time drawn uniformly, and the loss is the
    mean squared error of what the scheduler's ``prediction_type`` names: the noise, as in arXiv:2006.11239 (equation
    14), the image, or the velocity. Any scheduler of diffusers for such a model samples from it.

    Logs, arguments and checkpoints are as those of :class:`GBMDiffusion`; the quarters of the validation loss are
    quarters of the time.

    Args:
        denoiser: Called with states ``[B, C, H, W]`` and times int64 ``[B]``.
        scheduler: Noise and prediction; by default those of the paper, 1,000 steps with ``beta`` from 1e-4 to 0.02.
        num_classes: Train on labels too; ``None`` for images alone.
        label_dropout: Share of the labels that are replaced by that for no class, which guidance needs.
        seed: Of noise and label dropout.

    Raises:
        ValueError: If a value is out of its range, or the denoiser does not fit ``num_classes``.

    Cost: the denoiser's, one forward and backward pass a batch.

    Example:
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        ...     layers_per_block=1, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ... )
        >>> model = GaussianDiffusion(unet)
        >>> images = torch.rand(4, 1, 8, 8)
        >>> model.losses(images, None, torch.Generator().manual_seed(0)).loss.shape
        torch.Size([4])
    """

    scheduler: DDPMScheduler

    def __init__(
        self,
        denoiser: nn.Module,
        scheduler: DDPMScheduler | None = None,
        *,
        num_classes: int | None = None,
        label_dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(denoiser, num_classes=num_classes, label_dropout=label_dropout, seed=seed)
        if scheduler is not None and not isinstance(scheduler, DDPMScheduler):
            raise ValueError(
                f"scheduler must be a DDPMScheduler, got a {type(scheduler).__name__}; another one draws by"
                " sample(scheduler=...)"
            )
        self.scheduler = DDPMScheduler() if scheduler is None else scheduler
        check_choice("prediction_type", self.scheduler.config.prediction_type, PREDICTIONS)

    def losses(self, images: Tensor, labels: Tensor | None, generator: torch.Generator) -> Losses:
        """Squared error of the prediction, mean over the pixels of each image."""
        if images.device.type == "cpu":
            self.check_images(images)
        steps = self.scheduler.config.num_train_timesteps
        times = torch.randint(steps, (len(images),), generator=generator, device=images.device)
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        clean = 2 * images - 1
        state = self.scheduler.add_noise(clean, noise, times)
        target = {
            "epsilon": lambda: noise,
            "sample": lambda: clean,
            "v_prediction": lambda: self.scheduler.get_velocity(clean, noise, times),
        }[self.scheduler.config.prediction_type]()
        output = self(state, times, labels).float()
        return Losses((output - target).square().flatten(1).mean(dim=1), times / steps)

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError if images are not from 0 to 1."""
        check_unit_range(images)

    def pipeline(self) -> Any:
        """A ``DDPMPipeline``; for a model of classes diffusers has none.

        Raises:
            ValueError: If the model is one of classes, or the denoiser is no model of diffusers.
        """
        if self.num_classes is not None:
            raise ValueError("diffusers has no pipeline for a Gaussian model of classes; sample from the checkpoint")
        return DDPMPipeline(pipeline_denoiser(self), sampling_scheduler(self.scheduler))
