import abc
import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import is_compiled_module
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_opt import __version__
from lightning_opt._checks import check_interval

from .sampling import FIXED, call_denoiser, sample, sampling_scheduler

FORMAT = 1  # of what is written into a checkpoint
QUARTERS = 4
_TRAINING, _EVALUATION = 0, 1


class Losses(NamedTuple):
    """The loss of each image of a batch, and where its noise level lies.

    Attributes:
        loss: ``[B]``.
        level: ``[B]``, from 0 for the least noise to 1 for the most.
    """

    loss: Tensor
    level: Tensor


class DiffusionModule(pl.LightningModule, abc.ABC):
    """What training a denoiser has in common, whatever the noise; see :class:`GBMDiffusion` for arguments and logs.

    A subclass says what the loss of an image is (:meth:`losses`), what it samples with (``scheduler``) and as which
    pipeline it is exported (:meth:`pipeline`).

    Attributes:
        scheduler: Of the training: the noise, and what the network predicts.
        image_shape: ``(C, H, W)`` of the images, ``None`` until the first batch.
    """

    scheduler: SchedulerMixin

    def __init__(
        self, denoiser: nn.Module, *, num_classes: int | None = None, label_dropout: float = 0.1, seed: int = 0
    ) -> None:
        super().__init__()
        check_interval("label_dropout", label_dropout, 0, 1, closed="[)")
        check_interval("seed", seed, 0)
        if num_classes is not None:
            check_interval("num_classes", num_classes, 1)
        _check_class_embedding(denoiser, num_classes)
        self.denoiser = denoiser
        self.num_classes = num_classes
        self.label_dropout = label_dropout
        self.seed = seed
        self.image_shape: tuple[int, ...] | None = None
        self._not_finite: Tensor | None = None  # whether a loss of this epoch was; read once an epoch
        for stage in ("val", "test"):
            quarters = nn.ModuleList(MeanMetric(nan_strategy="ignore") for _ in range(QUARTERS))
            self.add_module(f"{stage}_quarters", quarters)

    @abc.abstractmethod
    def losses(self, images: Tensor, labels: Tensor | None, generator: torch.Generator) -> Losses:
        """Noise each image of a batch at a level of its own, and compare what the denoiser makes of it.

        Args:
            images: ``[B, C, H, W]``, float32, from 0 to 1.
            labels: int64 ``[B]`` for a model of classes.
            generator: Of levels and noise.
        """

    @abc.abstractmethod
    def check_images(self, images: Tensor) -> None:
        """Raise ValueError if images are not in the range that the model is for."""

    @abc.abstractmethod
    def pipeline(self) -> DiffusionPipeline:
        """The denoiser and the scheduler as a pipeline of diffusers, for use without Lightning.

        Raises:
            ValueError: If the denoiser is no model of diffusers, or there is no pipeline for this model.
        """

    def setup(self, stage: str) -> None:
        """Refuse what the Trainer cannot do with this module.

        Raises:
            MisconfigurationException: For ``predict``, and for a precision in which noise would not be of float32.
        """
        name, precision = type(self).__name__, self.trainer.precision
        if stage == "predict":
            raise MisconfigurationException(
                f"{name} predicts nothing: draw with its method sample, or `lightning-opt sample`."
            )
        if precision not in ("32-true", "16-mixed", "bf16-mixed"):
            raise MisconfigurationException(
                f"{name} draws noise in float32: precision must be 32-true, 16-mixed or bf16-mixed, got {precision}."
            )

    @property
    def null_label(self) -> int | None:
        """The label that stands for no class, ``None`` where the model was not trained with it."""
        return self.num_classes if self.num_classes is not None and self.label_dropout > 0 else None

    def forward(self, state: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The output of the denoiser for states ``[B, C, H, W]`` and times ``[B]``.

        Raises:
            ValueError: If it has another shape than the states: a loss would broadcast it.
        """
        output = call_denoiser(self.denoiser, state, time, class_labels)
        if output.shape != state.shape:
            name = type(uncompiled(self.denoiser)).__name__
            raise ValueError(f"{name} returned the shape {list(output.shape)} for an input of {list(state.shape)}")
        return output

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch, mean over its images."""
        images, labels = self._read(batch)
        if self.device.type != "cpu" and batch_idx == 0:  # losses looks at no value that is on an accelerator
            self.check_images(images)
            self._check_labels(labels)
        generator = self._generator(_TRAINING, self.global_step, batch_idx)
        if labels is not None and self.null_label is not None:
            dropped = torch.rand(len(labels), generator=generator, device=self.device) < self.label_dropout
            labels = torch.where(dropped, self.null_label, labels)
        loss = self.losses(images, labels, generator).loss.mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        broken = ~loss.detach().isfinite()
        self._not_finite = broken if self._not_finite is None else self._not_finite | broken
        return loss

    def on_train_epoch_end(self) -> None:
        """Stop a run whose losses are not numbers, before a checkpoint of it is written.

        Raises:
            FloatingPointError: On all ranks, if the loss of one was NaN or infinite.
        """
        broken, self._not_finite = self._not_finite, None
        if self.trainer.strategy.reduce_boolean_decision(broken is not None and bool(broken), all=False):
            raise FloatingPointError(
                f"{type(self).__name__}: a loss of epoch {self.current_epoch} was not finite, so the weights are lost:"
                " go on from an earlier checkpoint with a lower learning rate, or gradient_clip_val"
            )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss of a batch, with noise that is the same in every epoch."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Loss of a batch, with noise that is always the same."""
        self._evaluate(batch, batch_idx, "test")

    def sample(
        self,
        num: int,
        *,
        num_inference_steps: int = 50,
        scheduler: str | None = None,
        scheduler_args: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
    ) -> Tensor:
        """Draw images.

        Args:
            num: How many.
            num_inference_steps: Steps of the scheduler.
            scheduler: Class to sample with, for example ``"GBMDEISScheduler"``; ``None`` for that of the training.
            scheduler_args: What is to be different from its settings.
            class_labels: int64 ``[num]``; by default each class in turn.
            guidance_scale: 1 is the class alone; above 1 exaggerates it.
            generator: Of all noise; by default the global one.
            progress: Wraps the time steps, for example ``tqdm``.

        Returns:
            ``[num, C, H, W]``, float32, from 0 to 1, on the module's device.

        Raises:
            ValueError: If an argument is out of its range, or the model has not been trained.
            SamplingError: If the network returns another shape, or numbers that are not finite.
        """
        check_interval("num", num, 1)
        if self.image_shape is None:
            raise ValueError(f"{type(self).__name__} has seen no data yet: fit it, or load a checkpoint of a fit")
        labels = default_labels(num, self.num_classes, class_labels)
        check_guidance(guidance_scale, self.num_classes, self.null_label)
        return sample(
            self.denoiser,
            sampling_scheduler(self.scheduler, scheduler, scheduler_args),
            (num, *self.image_shape),
            num_inference_steps=num_inference_steps,
            generator=generator,
            class_labels=labels,
            null_label=self.null_label,
            guidance_scale=guidance_scale,
            progress=progress,
        )

    def check_sampling(
        self,
        *,
        num_inference_steps: int = 50,
        scheduler: str | None = None,
        scheduler_args: dict[str, Any] | None = None,
        class_labels: Any = None,
        guidance_scale: float = 1.0,
    ) -> None:
        """Raise the ValueError that :meth:`sample` would raise for these arguments, without drawing anything."""
        sampling_scheduler(self.scheduler, scheduler, scheduler_args).set_timesteps(num_inference_steps)
        if class_labels is not None:
            default_labels(len(class_labels), self.num_classes, class_labels)
        check_guidance(guidance_scale, self.num_classes, self.null_label)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write down what the weights alone do not tell, so that the file is enough to sample from."""
        checkpoint["diffusion"] = {
            "format": FORMAT,
            "version": __version__,
            "module": class_path(self),
            "arguments": self.arguments(),
            "denoiser": {"class_path": class_path(self.denoiser), "config": builtin_config(self.denoiser)},
            "scheduler": {"class_path": class_path(self.scheduler), "config": builtin_config(self.scheduler)},
            "image_shape": None if self.image_shape is None else list(self.image_shape),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back the shape of the images, and the noise, prediction and data map of the training.

        Raises:
            ValueError: If the checkpoint is of another kind of module.
        """
        record = checkpoint.get("diffusion")
        kind = "no diffusion model" if record is None else f"a {record['module'].rpartition('.')[2]}"
        scheduler = {} if record is None else record["scheduler"]["config"]
        if record is None or ("rho_min" in scheduler) != ("rho_min" in self.scheduler.config):
            raise ValueError(f"the checkpoint holds {kind}, and this is a {type(self).__name__}")
        shape = record["image_shape"]
        self.image_shape = None if shape is None else tuple(shape)
        fixed = {key: value for key, value in scheduler.items() if key in FIXED}
        self.scheduler = sampling_scheduler(self.scheduler, arguments=fixed)

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments beside denoiser and scheduler."""
        return {"num_classes": self.num_classes, "label_dropout": self.label_dropout, "seed": self.seed}

    def _read(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        images, labels = images_and_labels(batch)
        self.image_shape = tuple(images.shape[1:])
        if self.num_classes is None:
            return images.float(), None
        if labels is None:
            raise ValueError(f"num_classes={self.num_classes} needs batches of images and labels")
        if labels.device.type == "cpu":
            self._check_labels(labels)
        return images.float(), labels

    def _check_labels(self, labels: Tensor | None) -> None:
        if self.num_classes is not None and labels is not None:  # the next label stands for no class
            default_labels(len(labels), self.num_classes, labels)

    def _evaluate(self, batch: Any, batch_idx: int, stage: str) -> None:
        images, labels = self._read(batch)
        if self.device.type != "cpu":
            self.check_images(images)
            self._check_labels(labels)
        losses = self.losses(images, labels, self._generator(_EVALUATION, batch_idx))
        count = len(images)
        self.log(f"{stage}/loss", losses.loss.mean(), prog_bar=True, batch_size=count, sync_dist=True)
        quarter = (losses.level * QUARTERS).long().clamp_max(QUARTERS - 1)
        for number, metric in enumerate(self.get_submodule(f"{stage}_quarters").children()):
            assert isinstance(metric, MeanMetric)
            metric.update(losses.loss, weight=(quarter == number).float())
            self.log(f"{stage}/loss_q{number}", metric, batch_size=count)

    def _generator(self, *key: int) -> torch.Generator:
        """Noise that depends on the seed, the place in the run and the rank alone, so that a resume repeats it."""
        words = np.random.SeedSequence((self.seed, self.global_rank, *key)).generate_state(1, np.uint64)
        return torch.Generator(self.device).manual_seed(int(words[0] >> 1))


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Images and, where there are some, labels of a batch.

    Raises:
        ValueError: If the batch is neither images nor begins with them.
    """
    if isinstance(batch, Tensor):
        batch = [batch]
    if not isinstance(batch, list | tuple) or not batch or not isinstance(batch[0], Tensor):
        raise ValueError(f"a batch must be images, or images and labels, got a {type(batch).__name__}")
    if batch[0].ndim != 4:
        raise ValueError(
            f"images must be of shape [B, C, H, W], got {list(batch[0].shape)}; images[:, None] adds a channel"
        )
    return batch[0], batch[1] if len(batch) > 1 else None


def default_labels(num: int, num_classes: int | None, class_labels: Tensor | None) -> Tensor | None:
    """The labels to sample: as given and checked, or each class in turn; ``None`` for a model without classes.

    Raises:
        ValueError: If the model has no classes, or not these.
    """
    if num_classes is None:
        if class_labels is not None:
            raise ValueError("class_labels were given, but the model was trained without classes (num_classes)")
        return None
    if class_labels is None:
        return torch.arange(num) % num_classes
    labels = torch.as_tensor(class_labels)
    if labels.shape != (num,) or labels.is_floating_point():
        raise ValueError(f"class_labels must be {num} whole numbers, got {labels.dtype} of shape {list(labels.shape)}")
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"class_labels must be from 0 to {num_classes - 1}, got {labels.min()} to {labels.max()}")
    return labels.long()


def check_guidance(scale: float, num_classes: int | None, null_label: int | None) -> None:
    """Raise ValueError unless a model can be guided as far as this."""
    check_interval("guidance_scale", scale, 0)
    if scale != 1.0 and null_label is None:
        why = "classes (num_classes)" if num_classes is None else "label_dropout > 0"
        raise ValueError(f"guidance_scale={scale} needs a model that was trained with {why}")


def class_path(thing: Any) -> str:
    """Where the class of an object is defined; of the network inside for one that was compiled."""
    cls = type(uncompiled(thing))
    return f"{cls.__module__}.{cls.__qualname__}"


def builtin_config(thing: Any) -> dict[str, Any] | None:
    """The arguments that a model or a scheduler of diffusers was built with, or ``None`` for anything else."""
    thing = uncompiled(thing)
    if not hasattr(thing, "to_json_string"):
        return None
    return {key: value for key, value in json.loads(thing.to_json_string()).items() if not key.startswith("_")}


def uncompiled(thing: Any) -> Any:
    """The network inside one that was compiled; anything else as it is."""
    return thing.get_submodule("_orig_mod") if is_compiled_module(thing) else thing


def pipeline_denoiser(module: DiffusionModule) -> ModelMixin:
    """The denoiser for a pipeline, which reads the size of its images from ``config.sample_size``.

    Raises:
        ValueError: If it is no model of diffusers, or the module has seen no data.
    """
    denoiser = uncompiled(module.denoiser)
    if not isinstance(denoiser, ModelMixin):
        raise ValueError(
            f"a pipeline holds a model of diffusers, and the denoiser is a {type(denoiser).__name__}; sample from the"
            " checkpoint"
        )
    if module.image_shape is None:
        raise ValueError(f"{type(module).__name__} has seen no data yet: fit it, or load a checkpoint of a fit")
    height, width = module.image_shape[-2:]
    denoiser.register_to_config(sample_size=height if height == width else [height, width])
    return denoiser


def _check_class_embedding(denoiser: nn.Module, num_classes: int | None) -> None:
    config: Any = getattr(denoiser, "config", None)
    if config is None:
        return
    embeds = config.get("num_class_embeds")
    name = type(denoiser).__name__
    if num_classes is None and embeds is not None:
        raise ValueError(f"{name} has num_class_embeds={embeds} and wants labels: give num_classes={embeds - 1}")
    if num_classes is not None and embeds != num_classes + 1:
        raise ValueError(
            f"num_classes={num_classes} needs {name}(num_class_embeds={num_classes + 1}), the last one for no class;"
            f" got {embeds}"
        )
