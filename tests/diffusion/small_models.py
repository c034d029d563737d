"""The smallest denoisers, data and fits on which the modules can be tested."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from diffusers import UNet2DModel
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_opt.data import ResumableLoader
from lightning_opt.diffusion import GaussianDiffusion, GBMDiffusion

IMAGES = torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(0)).square()
LABELS = torch.arange(48) % 3


def small_unet(**changes: Any) -> UNet2DModel:
    """12,000 parameters."""
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "add_attention": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(**{**config, **changes})


class Told(nn.Module):
    """A denoiser whose output is a given function of its input, times and labels; keeps what it was called with."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output
        self.weight = nn.Parameter(torch.zeros(()))
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, state: Tensor, times: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.calls.append((state, times, class_labels))
        given = self.output(state, times) if class_labels is None else self.output(state, times, class_labels)
        return given + self.weight


class Rows(Logger):
    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[tuple[str, int], float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.update({(name, step or 0): float(value) for name, value in metrics.items()})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Trained(GBMDiffusion):
    """With an optimizer, as a user's subclass has."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class TrainedGaussian(GaussianDiffusion):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def loader(batch_size: int = 8, images: Tensor = IMAGES, *, shuffle: bool = True) -> ResumableLoader:
    return ResumableLoader(TensorDataset(images, LABELS[: len(images)]), batch_size, shuffle=shuffle, seed=1)


def fit(
    module: pl.LightningModule,
    folder: Path,
    *callbacks: pl.Callback,
    data: Any = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> pl.Trainer:
    """Fit for an epoch of six batches, and validate on three, on one CPU."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "logger": Rows(),
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    trainer = pl.Trainer(**{**defaults, **options}, callbacks=list(callbacks))
    trainer.fit(module, data if data is not None else loader(), loader(16, shuffle=False), ckpt_path=ckpt_path)
    return trainer
