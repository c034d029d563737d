from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_opt._checks import check_choice, check_interval
from lightning_opt._lightning.weight_averaging import averaged_weights
from lightning_opt.diffusion.image_grid import image_grid, save_picture
from lightning_opt.diffusion.sampling import evaluating
from lightning_opt.registry import register

from ._arguments import described_by_arguments
from ._held_out_images import held_out_images
from ._image_loggers import log_picture
from ._report_panel import Panel
from ._run_directory import run_directory
from ._side_bar import side_bar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRY_RUN = 4  # images under fast_dev_run
AT_ONCE = 256  # images in a batch where there are many


@register(
    "callback",
    summary="Draws a grid of samples of a generative model while it trains, and measures their distance",
    log_prefix="sample",
    capabilities=("observer",),
)
class SampleGrid(pl.Callback):
    """Draws images with the model in training, and shows them as one picture, every few epochs and at the end.

    The picture goes to every logger that takes pictures (TensorBoard, Weights & Biases, MLflow, Comet, Neptune), as PNG
    into the folder ``samples`` of the run, and the last one into the :class:`RunReport`. The noise is the same every
    time, so that pictures of two epochs differ by the training alone. If a ``WeightAveraging`` callback holds averaged
    weights, the images are drawn with those.

    The module draws by its method ``sample(num, generator=..., progress=...)``, which returns images
    ``[num, C, H, W]`` from 0 to 1 and wraps its steps with ``progress`` as with ``tqdm``.
    :class:`lightning_opt.diffusion.GBMDiffusion` and ``GaussianDiffusion`` have it and take the options below, and any
    other generative module may.

    With ``frechet_num`` it also draws so many images every ``every_n_epochs`` and logs ``sample/frechet``, their
    distance to as many images of validation in the features of a small net
    (:func:`lightning_opt.metrics.frechet_distance`). Compare values of equal numbers only, and take 500 or more.

    It only watches: training is bit for bit the same with it and without. Rank zero draws alone. If the network gives
    numbers that no image can be made of, the picture is left out, and that is said once. ``fast_dev_run`` draws few
    images and writes nothing.

    Args:
        num: Images.
        every_n_epochs: Epochs between two pictures.
        num_inference_steps: Steps of the scheduler; ``None`` leaves it to the module.
        scheduler: Class of the scheduler to sample with, for example ``GBMDEISScheduler``; ``None`` for that of the
            training.
        scheduler_args: What is to be different from the settings of the training.
        class_labels: For a model of classes, one label for each image; ``None`` for each class in turn.
        guidance_scale: For a model of classes, 1 is the class alone, above 1 exaggerates it.
        columns: Images in a row; ``None`` for a square.
        frechet_num: Images to measure the distance of; ``None`` measures nothing.
        features: Of which net: ``"auto"`` for the shipped one of 8x8 or 28x28 gray images, or its name.
        seed: Of the noise.

    Raises:
        ValueError: If a value is out of its range.
        MisconfigurationException: In ``setup``, if the module cannot sample in this way, or its weights are sharded.

    Cost: at a picture, what the module needs to draw ``num`` images: for diffusion a call of the network a step. The
        distance costs as much for ``frechet_num`` images.

    Example:
        >>> import lightning.pytorch as pl
        >>> grid = SampleGrid(scheduler="GBMDEISScheduler", num_inference_steps=10, every_n_epochs=5)
        >>> trainer = pl.Trainer(callbacks=[grid], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        *,
        num: int = 64,
        every_n_epochs: int = 1,
        num_inference_steps: int | None = None,
        scheduler: str | None = None,
        scheduler_args: dict[str, Any] | None = None,
        class_labels: list[int] | None = None,
        guidance_scale: float = 1.0,
        columns: int | None = None,
        frechet_num: int | None = None,
        features: Literal["auto", "digits8", "grey28", "inception"] = "auto",
        seed: int = 0,
    ) -> None:
        check_interval("num", num, 1)
        check_interval("every_n_epochs", every_n_epochs, 1)
        check_interval("guidance_scale", guidance_scale, 0)
        check_interval("seed", seed, 0)
        check_choice("features", features, ("auto", "digits8", "grey28", "inception"))
        wholes = (("num_inference_steps", num_inference_steps), ("columns", columns), ("frechet_num", frechet_num))
        for name, value in wholes:
            if value is not None:
                check_interval(name, value, 1)
        if class_labels is not None and len(class_labels) != num:
            raise ValueError(f"class_labels must have num={num} entries, got {len(class_labels)}")
        self.num = num
        self.every_n_epochs = every_n_epochs
        self.num_inference_steps = num_inference_steps
        self.scheduler = scheduler
        self.scheduler_args = scheduler_args
        self.class_labels = class_labels
        self.guidance_scale = guidance_scale
        self.columns = columns
        self.frechet_num = frechet_num
        self.features = features
        self.seed = seed
        self._begin()

    def __repr__(self) -> str:
        return described_by_arguments(self)

    def _begin(self) -> None:
        self._stage = "fit"
        self._folder: Path | None = None
        self._picture: Tensor | None = None
        self._step = -1  # of the picture
        self._warned = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stage = stage
        if stage != "fit":
            return
        self._begin()
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise MisconfigurationException(
                f"SampleGrid draws with the whole module, and {type(trainer.strategy).__name__} may hold parts of it;"
                " use a single device or DDP."
            )
        if not callable(getattr(pl_module, "sample", None)):
            raise MisconfigurationException(
                f"SampleGrid draws by the module's method sample(num, generator=...), which {type(pl_module).__name__}"
                " does not have."
            )
        check: Callable[..., None] | None = getattr(pl_module, "check_sampling", None)
        if check is not None:
            try:
                check(**self._options())
            except ValueError as error:
                raise MisconfigurationException(f"SampleGrid: {error}") from error
        self._folder = run_directory(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._draw(trainer, pl_module)
            if self.frechet_num is not None and trainer.is_global_zero and self._folder is not None:
                self._measure(trainer, pl_module, self.frechet_num)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._step == trainer.global_step or not trainer.is_global_zero:
            return
        num = min(self.num, DRY_RUN) if trainer.fast_dev_run else self.num  # type: ignore[attr-defined]
        options = self._options()
        if "class_labels" in options:
            options["class_labels"] = torch.tensor(options["class_labels"][:num])
        try:
            generator = torch.Generator(pl_module.device).manual_seed(self.seed)
            picture = image_grid(_draw(trainer, pl_module, num, generator, options), self.columns)
        except (RuntimeError, ValueError) as error:
            self._complain(f"SampleGrid drew nothing at step {trainer.global_step}: {error}")
            return
        self._picture, self._step = picture, trainer.global_step
        if self._folder is None:
            return
        try:
            save_picture(picture, self._folder / "samples" / f"step={self._step}.png")
            for logger in trainer.loggers:
                log_picture(logger, "samples", picture, self._step)
        except Exception as error:  # a run must not be lost because a picture cannot be shown
            self._complain(f"SampleGrid could not show the samples: {type(error).__name__}: {error}")

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, count: int) -> None:
        from lightning_opt.metrics import frechet_distance

        options = {name: value for name, value in self._options().items() if name != "class_labels"}
        try:
            generator = torch.Generator(pl_module.device).manual_seed(self.seed + 1)
            parts = [min(AT_ONCE, count - first) for first in range(0, count, AT_ONCE)]
            images = torch.cat([_draw(trainer, pl_module, part, generator, options).cpu() for part in parts])
            distance = frechet_distance(images, held_out_images(trainer, count, self.seed), features=self.features)
        except (RuntimeError, ValueError) as error:
            self._complain(f"SampleGrid measured nothing at step {trainer.global_step}: {error}")
            return
        pl_module.log("sample/frechet", distance, rank_zero_only=True)

    def _options(self) -> dict[str, Any]:
        given = {
            "num_inference_steps": self.num_inference_steps,
            "scheduler": self.scheduler,
            "scheduler_args": self.scheduler_args,
            "class_labels": self.class_labels,
            "guidance_scale": None if self.guidance_scale == 1.0 else self.guidance_scale,
        }
        return {name: value for name, value in given.items() if value is not None}

    def _complain(self, message: str) -> None:
        if not self._warned:
            rank_zero_warn(message)
        self._warned = True

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"picture": self._picture, "step": self._step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage == "fit":  # validate and test restore callbacks too
            self._picture, self._step = state_dict["picture"], state_dict["step"]

    def report_panels(self) -> list[Panel]:
        """The last picture, for :class:`RunReport`."""
        if self._picture is None:
            return []
        return [Panel(f"Samples after {self._step:,} steps", _Picture(self._picture))]


def _draw(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    num: int,
    generator: torch.Generator,
    options: dict[str, Any],
) -> Tensor:
    draw: Any = pl_module.sample
    with averaged_weights(trainer, pl_module), evaluating(pl_module):
        return draw(num, generator=generator, progress=side_bar(trainer, "samples"), **options)


class _Picture:
    """Draws a picture pixel by pixel."""

    def __init__(self, picture: Tensor) -> None:
        self.picture = picture

    def __call__(self, axes: "Axes") -> None:
        axes.imshow(self.picture.numpy(), interpolation="nearest")
        axes.set_axis_off()
