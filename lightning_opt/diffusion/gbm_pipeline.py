import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from torch import Tensor

from lightning_opt import __version__
from lightning_opt._checks import check_choice, check_interval

# diffusers reads a folder only where the modules that it names are imported: those of both schedulers
from . import gbm_deis_scheduler, gbm_scheduler  # noqa: F401
from ._log_state_scheduler import check_multiplicative
from .diffusion_module import check_guidance, default_labels
from .sampling import sample

FORMAT = 1


class GBMPipeline(DiffusionPipeline):
    """Draws images with a trained multiplicative diffusion model, as any pipeline of diffusers.

    ``lightning-opt export CHECKPOINT --out FOLDER`` makes one of a checkpoint, ``GBMPipeline.from_pretrained(FOLDER)``
    loads it, and ``GBMDiffusion.pipeline()`` is one at once. Another sampler is a matter of one line, ::

        pipeline.scheduler = GBMDEISScheduler.from_config(pipeline.scheduler.config)

    Args:
        unet: The denoiser, whose ``config`` has ``in_channels`` and ``sample_size``.
        scheduler: A :class:`GBMScheduler` or a :class:`GBMDEISScheduler` with the moments of the data in its config.
        num_classes: Classes that it was trained with, if any.
        guidance: Whether it was trained with labels dropped, so that it can be guided.
        saved_by: Filled in when it is saved.
        format: Of the folder; a folder of a later format is refused.

    Raises:
        ValueError: If the scheduler is of added noise; when loading a folder that holds another pipeline, or one of a
            later format.

    Example:
        >>> from diffusers import UNet2DModel
        >>> from lightning_opt.diffusion import GBMScheduler
        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        ...     layers_per_block=1, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ... )
        >>> pipeline = GBMPipeline(unet, GBMScheduler(rho_max=4.0))
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> pipeline(batch_size=2, num_inference_steps=3, output_type="np").images.shape
        (2, 8, 8, 1)
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        num_classes: int | None = None,
        guidance: bool = False,
        saved_by: str = __version__,
        format: int = FORMAT,
    ) -> None:
        super().__init__()
        check_multiplicative(scheduler)
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(num_classes=num_classes, guidance=guidance, saved_by=saved_by, format=format)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 50,
        class_labels: Tensor | list[int] | int | None = None,
        guidance_scale: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            batch_size: How many.
            generator: Of all noise; by default the global one.
            num_inference_steps: Steps of the scheduler.
            class_labels: One for all, or one for each image; by default each class in turn.
            guidance_scale: 1 is the class alone; above 1 exaggerates it.
            output_type: ``"pil"``, ``"np"`` (``[B, H, W, C]``) or ``"pt"`` (``[B, C, H, W]``), from 0 to 1.
            return_dict: Return an object with ``images``, not a tuple.

        Raises:
            ValueError: If an argument is out of its range, or does not fit the model.
            SamplingError: If the network returns numbers that are not finite.
        """
        check_multiplicative(self.scheduler)
        check_interval("batch_size", batch_size, 1)
        check_choice("output_type", output_type, ("pil", "np", "pt"))
        labels = [class_labels] * batch_size if isinstance(class_labels, int) else class_labels
        num_classes = self.config.num_classes
        null_label = num_classes if self.config.guidance else None
        check_guidance(guidance_scale, num_classes, null_label)
        size = self.unet.config.sample_size
        images = sample(
            self.unet,
            self.scheduler,
            (batch_size, self.unet.config.in_channels, *([size, size] if isinstance(size, int) else size)),
            num_inference_steps=num_inference_steps,
            generator=generator,
            class_labels=default_labels(batch_size, num_classes, labels),  # type: ignore[arg-type]
            null_label=null_label,
            guidance_scale=guidance_scale,
            progress=self.progress_bar,
        )
        result: Any = images
        if output_type != "pt":
            result = images.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            result = self.numpy_to_pil(result)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the folder, with this version's name in it."""
        self.register_to_config(saved_by=__version__, format=FORMAT)
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "GBMPipeline":
        """Read a folder that :meth:`save_pretrained` wrote.

        Raises:
            ValueError: If it holds another pipeline, or was written in a later format.
        """
        index = Path(pretrained_model_name_or_path) / "model_index.json"
        if index.is_file():
            _check_index(index, json.loads(index.read_text()), cls.__name__)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)


def _check_index(path: Path, index: dict[str, Any], expected: str) -> None:
    if index.get("_class_name") != expected:
        raise ValueError(f"{path} is of a {index.get('_class_name')}, not of a {expected}")
    if index.get("format", 0) != FORMAT:
        raise ValueError(
            f"{path} was saved by lightning-opt {index.get('saved_by', '(unknown)')} in format {index.get('format')};"
            f" lightning-opt {__version__} reads format {FORMAT}. Export the checkpoint again, or use that version"
        )
