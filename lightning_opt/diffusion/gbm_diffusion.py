from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_opt._checks import check_choice
from lightning_opt._lightning.loader_source import train_loader
from lightning_opt.registry import register

from ._log_state_scheduler import check_multiplicative
from .diffusion_module import DiffusionModule, Losses, images_and_labels, pipeline_denoiser
from .gbm_pipeline import GBMPipeline
from .gbm_scheduler import GBMScheduler
from .losses import denoising_score_matching
from .parametrization import LOSS_WEIGHTS, LossWeight
from .process import per_sample
from .sampling import sampling_scheduler


def default_scheduler() -> GBMScheduler:
    """Noise up to the level 4, which forgets the image, and ``multistep`` on a grid that is even in the root rho^(1/3).

    The scheduler's own grid is made for the paper's noise: from 4, most of its steps are where nothing is to be seen.
    """
    return GBMScheduler(rho_max=4.0, sampler="multistep", timestep_spacing="rho", spacing_order=3.0)


@register(
    "module",
    summary="Multiplicative denoising diffusion of positive images (geometric Brownian motion)",
    paper="2510.02730",
    card="gbm-diffusion",
)
class GBMDiffusion(DiffusionModule):
    r"""Trains a denoiser on positive images with noise that multiplies them: "Dale meets Langevin" (arXiv:2510.02730).

    An image from 0 to 1 is made positive by the scheduler's data map, and its logarithm is noised at a level
    :math:`\rho` drawn log-uniformly from the process's range. The loss is multiplicative denoising score matching,
    :func:`denoising_score_matching`, of the noise that the network's output stands for; by default in the log-domain
    preconditioning, in which inputs and targets have unit scale at every level. For the paper's own form give a
    :class:`GBMScheduler` with ``prediction_type="stein"`` and ``rho_max=None``, and ``loss_weight="v2"``.

    It defines no optimizer and takes no learning rate: those come from the command line, a config, or a
    ``configure_optimizers`` of a subclass. Batches are ``(images, labels)`` or images, from 0 to 1: data modules of
    this package give them with ``normalize=False``. For averaged weights add Lightning's ``EMAWeightAveraging``:
    validation, samples and the checkpoint's ``state_dict`` then have them.

    Mean and standard deviation of :math:`\log x_0` over the training data are measured before the first step, by rank
    zero, and become ``log_mean`` and ``log_std`` of the scheduler. They are in the checkpoint, with everything that
    sampling needs: see :func:`load_diffusion`.

    Noise comes from a generator seeded by ``seed``, step, micro-batch and rank: a resumed run repeats it, no global
    random state is used, and evaluation has the same noise in every epoch.

    Logs ``train/loss`` by step; ``val/loss`` and ``val/loss_q0`` to ``val/loss_q3`` by epoch, the latter over the
    quarters of the range of :math:`\log \rho` from the least noise to the most; the same under ``test/``.

    Args:
        denoiser: Called with inputs ``[B, C, H, W]``, times float ``[B]`` and, for classes, ``class_labels`` ``[B]``;
            returns a tensor of the inputs' shape or an object whose ``sample`` is one. For example
            ``diffusers.UNet2DModel``.
        scheduler: The noise, the data map, what the network predicts, and how to sample; by default
            :func:`default_scheduler`.
        loss_weight: Of the noise levels: ``"edm"``, ``"v"`` or ``"v2"``, see :func:`loss_weight`.
        log_moments: ``[mean, standard deviation]`` of :math:`\log x_0`; ``None`` measures them.
        num_classes: Train on labels too, with a denoiser that embeds one more (``num_class_embeds`` of a
            ``UNet2DModel``); ``None`` for images alone.
        label_dropout: Share of the labels that are replaced by that for no class, which guidance needs.
        seed: Of noise levels, noise and label dropout.

    Raises:
        ValueError: If a value is out of its range, the denoiser does not fit ``num_classes``, or, in training, images
            are not from 0 to 1.
        MisconfigurationException: Before the first step, if the data cannot be measured.

    Cost: the denoiser's, one forward and backward pass a batch; once, a pass over the training data.

    Example:
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        ...     layers_per_block=1, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ... )
        >>> model = GBMDiffusion(unet, log_moments=(0.2, 0.25))
        >>> model.losses(torch.rand(4, 1, 8, 8), None, torch.Generator().manual_seed(0)).loss.shape
        torch.Size([4])
    """

    scheduler: GBMScheduler

    def __init__(
        self,
        denoiser: nn.Module,
        scheduler: GBMScheduler | None = None,
        *,
        loss_weight: LossWeight = "edm",
        log_moments: tuple[float, float] | None = None,
        num_classes: int | None = None,
        label_dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(denoiser, num_classes=num_classes, label_dropout=label_dropout, seed=seed)
        check_choice("loss_weight", loss_weight, LOSS_WEIGHTS)
        if scheduler is not None:
            check_multiplicative(scheduler)
        if log_moments is not None and not (isinstance(log_moments, list | tuple) and len(log_moments) == 2):
            raise ValueError(f"log_moments must be [mean, standard deviation] of log x0, got {log_moments!r}")
        self.loss_weight = loss_weight
        self.log_moments = log_moments
        self.scheduler = default_scheduler() if scheduler is None else scheduler
        self._measured = log_moments is not None
        if log_moments is not None:
            self._set_moments(*log_moments)

    def on_fit_start(self) -> None:
        """Measure the training data, unless a checkpoint or the arguments have told."""
        if self._measured:
            return
        answer: tuple[Any, str] = (None, "")
        if self.trainer.is_global_zero:
            try:
                with torch.random.fork_rng(devices=[]):  # images that are augmented draw from it
                    answer = (self._moments_of(train_loader(self.trainer)), "")
            except (ValueError, MisconfigurationException) as error:  # told to all ranks, or they would wait for it
                answer = (None, str(error))
        moments, problem = self.trainer.strategy.broadcast(answer)
        if problem:
            hint = (
                " Data modules of this package give images from 0 to 1 with normalize=False."
                if "[0, 1]" in problem
                else ""
            )
            raise MisconfigurationException(f"{type(self).__name__} cannot measure the training data: {problem}.{hint}")
        self._set_moments(*moments)
        rank_zero_info(f"log x0 of the training data: mean {moments[0]}, standard deviation {moments[1]}")

    def losses(self, images: Tensor, labels: Tensor | None, generator: torch.Generator) -> Losses:
        """Denoising score matching of each image, at levels that are uniform in log rho."""
        scheduler = self.scheduler
        process, parametrization = scheduler.process, scheduler.parametrization
        with torch.autocast(images.device.type, enabled=False):
            level = torch.rand(len(images), generator=generator, device=images.device)
            rho = process.rho_min * (process.largest_rho / process.rho_min) ** level
            noise = torch.randn(images.shape, generator=generator, device=images.device)
            times = scheduler.timestep_at(rho)
            log_x0 = scheduler.data_map.to_log(images, check=images.device.type == "cpu")
            state = scheduler.add_noise(log_x0, noise, times)
            network_input = scheduler.scale_model_input(state, times)
        output = self(network_input, times, labels)
        with torch.autocast(images.device.type, enabled=False):
            wide_rho = per_sample(rho, state)
            shift = process.mean_shift(process.time(wide_rho))
            epsilon = parametrization.epsilon(output.float(), state, shift, wide_rho)
            _, log_std = parametrization.moments(state)
            loss = denoising_score_matching(epsilon, noise, rho, self.loss_weight, log_std)
        return Losses(loss, level)

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError if images are not in the range of the data map."""
        self.scheduler.data_map.check(images)

    def pipeline(self) -> GBMPipeline:
        """A :class:`GBMPipeline`.

        Raises:
            ValueError: If the denoiser is no model of diffusers.
        """
        return GBMPipeline(
            pipeline_denoiser(self), sampling_scheduler(self.scheduler), num_classes=self.num_classes,
            guidance=self.null_label is not None,
        )  # fmt: skip

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments beside denoiser and scheduler."""
        moments = None if self.log_moments is None else list(self.log_moments)
        return {"loss_weight": self.loss_weight, "log_moments": moments, **super().arguments()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back the moments of the data and the shape of the images."""
        super().on_load_checkpoint(checkpoint)
        self._measured = True

    def _set_moments(self, mean: float | list[float], std: float | list[float]) -> None:
        self.scheduler = sampling_scheduler(self.scheduler, arguments={"log_mean": mean, "log_std": std})
        self._measured = True

    def _moments_of(self, loader: Any) -> tuple[Any, Any]:
        """Mean and standard deviation of log x0, of each channel where there are several."""
        source = next(iter(CombinedLoader(loader).flattened))
        dataset = getattr(source, "dataset", None)
        if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            kind = type(source if dataset is None else dataset).__name__
            raise MisconfigurationException(
                f"it needs a dataset with a length, and the data are a {kind}; give log_moments=[mean, standard"
                " deviation] of log x0"
            )
        own = torch.Generator()  # a loader without one draws from the global random state, even in order
        again = DataLoader(dataset, batch_size=512, collate_fn=source.collate_fn, generator=own)
        count, total, squares = 0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for batch in again:
            images, _ = images_and_labels(batch)
            logs = self.scheduler.to_log(images.float()).double().transpose(0, 1).flatten(1)
            count, total, squares = count + logs.shape[1], total + logs.sum(1), squares + logs.square().sum(1)
        if not count:
            raise MisconfigurationException("there are none")
        mean = total / count
        std = (squares / count - mean**2).clamp_min(0).sqrt()
        if not (std > 0).all():
            raise MisconfigurationException("all pixels are alike, so that there is nothing to learn")
        return (mean.item(), std.item()) if len(mean) == 1 else (mean.tolist(), std.tolist())
