from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin

from lightning_opt import __version__

from .diffusion_module import FORMAT, DiffusionModule


def load_diffusion(path: str | Path, map_location: str | torch.device = "cpu") -> DiffusionModule:
    """The module of a checkpoint, with its denoiser and scheduler: nothing else is needed.

    It has the averaged weights if a ``WeightAveraging`` callback made some, and is in evaluation mode.

    Args:
        path: A checkpoint of a :class:`GBMDiffusion` or :class:`GaussianDiffusion`.
        map_location: Where the weights go.

    Raises:
        ValueError: If the checkpoint is damaged or of no such module, or its denoiser is no model of diffusers; then
            ``GBMDiffusion.load_from_checkpoint(path, denoiser=...)`` loads it.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (OSError, EOFError, KeyError, RuntimeError, UnpicklingError) as error:  # what torch says of other files
        raise ValueError(f"{path} is no checkpoint, or is damaged ({type(error).__name__}: {error})") from error
    record = checkpoint.get("diffusion") if isinstance(checkpoint, dict) else None
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds no diffusion model of lightning-opt, but a checkpoint of another module")
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{path} was written by lightning-opt {record.get('version')} in format {record.get('format')} of diffusion"
            f" checkpoints; lightning-opt {__version__} reads format {FORMAT}"
        )
    try:
        module = _built(checkpoint, record, path).eval()
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{path}, written by lightning-opt {record.get('version')}, does not fit lightning-opt {__version__}, or is"
            f" damaged ({type(error).__name__}: {error})"
        ) from error
    return module.to(map_location)


def _built(checkpoint: dict[str, Any], record: dict[str, Any], path: str | Path) -> DiffusionModule:
    denoiser, scheduler = record["denoiser"], record["scheduler"]
    if denoiser["config"] is None:
        raise ValueError(
            f"{path} has a {denoiser['class_path']} for a denoiser, which is no model of diffusers and cannot be built"
            " from the checkpoint; in Python,"
            f" {record['module'].rpartition('.')[2]}.load_from_checkpoint(path, denoiser=...) takes one"
        )
    module_class = _import(record["module"], DiffusionModule, path)
    module: DiffusionModule = module_class(
        denoiser=_import(denoiser["class_path"], ModelMixin, path)(**denoiser["config"]),
        scheduler=_import(scheduler["class_path"], SchedulerMixin, path)(**scheduler["config"]),
        **record["arguments"],
    )
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict({key.replace("._orig_mod.", "."): v for key, v in checkpoint["state_dict"].items()})
    return module


def _import(class_path: str, base: type, path: str | Path) -> Any:
    """A class that a checkpoint names, which must be of the kind that is expected there."""
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path} needs the class {class_path}, which cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{path} names {class_path} as its {base.__name__}, which it is not")
    return found
