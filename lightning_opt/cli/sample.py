"""``lightning-opt sample``: images of a trained diffusion model, from nothing but its checkpoint."""

import argparse
import contextlib
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from lightning_opt.registry import register_command

from .errors import UserError, sentence
from .runs import checkpoint_of

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_opt.diffusion import DiffusionModule


@register_command("sample", summary="draw images with a trained diffusion model")
def sample(arguments: list[str]) -> int:
    """Run ``lightning-opt sample CHECKPOINT``.

    Args:
        arguments: The words after ``sample``.

    Returns:
        The exit status: 130 if it was interrupted; what was finished is written then too.

    Raises:
        UserError: If the checkpoint holds no diffusion model, an option does not fit it, or its network gives numbers
            that are not finite.
    """
    parser = argparse.ArgumentParser(
        "lightning-opt sample",
        allow_abbrev=False,
        description="Draw images with a trained diffusion model. Ctrl-C writes the batches that are finished.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a run folder")
    parser.add_argument("--steps", type=int, default=50, help="steps of the scheduler; default: 50")
    parser.add_argument("--scheduler", help="class to sample with; default: that of the training")
    parser.add_argument(
        "--scheduler-arg", action="append", default=[], metavar="NAME=VALUE", help="of the scheduler; may be repeated"
    )
    parser.add_argument("--num", type=int, default=64, help="number of images; default: 64")
    parser.add_argument("--batch-size", type=int, default=256, help="images drawn at once; default: 256")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; default: 0")
    parser.add_argument("--class-label", type=int, help="draw this class; default: each in turn")
    parser.add_argument("--guidance", type=float, default=1.0, help="above 1 exaggerates the class; default: 1")
    parser.add_argument("--columns", type=int, help="images in a row; default: a square")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument(
        "--out", type=Path, default=Path("samples.png"), help="a picture (.png), or the images as a tensor (.pt)"
    )
    options = parser.parse_args(arguments)

    if options.out.suffix not in (".png", ".pt"):
        raise UserError(f"--out={options.out}: must end in .png (a picture) or .pt (a tensor of images).")
    for name in ("num", "batch_size", "steps", "columns"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be >= 1, got {value}.")
    if not -(2**63) <= options.seed < 2**63:
        raise UserError(f"--seed must be a whole number of 64 bits, got {options.seed}.")
    module = load_module(options.checkpoint, options.device)
    if options.out.suffix == ".png" and module.image_shape is not None and module.image_shape[0] not in (1, 3):
        raise UserError(
            f"--out={options.out}: a picture has 1 or 3 channels, and the model's images have {module.image_shape[0]};"
            " --out=samples.pt writes them as a tensor."
        )
    settings = {
        "num_inference_steps": options.steps,
        "scheduler": options.scheduler,
        "scheduler_args": _parse(options.scheduler_arg),
        "guidance_scale": options.guidance,
    }
    try:
        labels = None if options.class_label is None else [options.class_label]
        module.check_sampling(class_labels=labels, **settings)
    except ValueError as error:
        raise UserError(sentence(error)) from error

    batches, interrupted = _draw(module, options, settings)
    if not batches:
        print("lightning-opt: interrupted before the first batch was finished.", file=sys.stderr)
        return 130
    images = torch.cat(batches)
    _write(options.out, images, options.columns)
    if interrupted:
        print(f"lightning-opt: interrupted; {len(images)} of {options.num} images are finished.", file=sys.stderr)
    print(f"samples: {options.out}")
    return 130 if interrupted else 0


def load_module(path: Path, device: str | None = None) -> "DiffusionModule":
    """The diffusion model of a checkpoint.

    Args:
        path: A checkpoint, a run folder, or the folder of a name.
        device: Where to put it; by default on the GPU if there is one.

    Raises:
        UserError: If there is none, or the extra is not installed.
    """
    try:
        from lightning_opt.diffusion import load_diffusion
    except ModuleNotFoundError as error:
        raise UserError(f"needs {error.name}: install lightning-opt[diffusion].") from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device={device}: {sentence(error)}") from error
    try:
        return load_diffusion(checkpoint_of(path), device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except ValueError as error:
        raise UserError(sentence(error)) from error


def _draw(
    module: "DiffusionModule", options: argparse.Namespace, settings: dict[str, Any]
) -> "tuple[list[Tensor], bool]":
    """The finished batches, and whether Ctrl-C cut them short."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    from lightning_opt.diffusion import SamplingError
    from lightning_opt.diffusion.diffusion_module import default_labels

    given = None if options.class_label is None else torch.full((options.num,), options.class_label)
    labels = default_labels(options.num, module.num_classes, given)
    generator = torch.Generator(module.device).manual_seed(options.seed)
    batches: list[Tensor] = []
    with contextlib.suppress(KeyboardInterrupt):
        for first in range(0, options.num, options.batch_size):
            count = min(options.batch_size, options.num - first)
            part = None if labels is None else labels[first : first + count]
            bar = functools.partial(tqdm, desc=f"images {first + 1} to {first + count}", leave=False)
            try:
                images = module.sample(count, class_labels=part, generator=generator, progress=bar, **settings)
                batches.append(images.cpu())
            except (SamplingError, ValueError) as error:
                raise UserError(sentence(error), status=1) from error
        return batches, False
    return batches, True


def _parse(words: list[str]) -> dict[str, Any]:
    parsed = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--scheduler-arg {word}: must be NAME=VALUE, for example solver_order=3.")
        try:
            parsed[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--scheduler-arg {word}: {value!r} cannot be read as YAML.") from error
    return parsed


def _write(path: Path, images: "Tensor", columns: int | None) -> None:
    from lightning_opt.diffusion.image_grid import image_grid, save_picture

    try:
        if path.suffix == ".png":
            save_picture(image_grid(images, columns), path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(images, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.", status=1) from error
