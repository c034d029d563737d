"""``lightning-opt export``: a checkpoint of a diffusion model as a folder that diffusers reads."""

import argparse
from pathlib import Path

from lightning_opt.registry import register_command

from .errors import UserError, sentence
from .sample import load_module


@register_command("export", summary="write a trained diffusion model as a pipeline of diffusers")
def export(arguments: list[str]) -> int:
    """Run ``lightning-opt export CHECKPOINT --out FOLDER``.

    Args:
        arguments: The words after ``export``.

    Returns:
        The exit status.

    Raises:
        UserError: If the checkpoint holds no diffusion model, there is no pipeline for it, or the folder is not empty.
    """
    parser = argparse.ArgumentParser(
        "lightning-opt export",
        allow_abbrev=False,
        description="Write a trained diffusion model as a pipeline of diffusers, with averaged weights if it has some.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a run folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to; made if need be")
    parser.add_argument("--force", action="store_true", help="write into a folder that is not empty")
    options = parser.parse_args(arguments)

    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out={options.out} is a file; give a folder.")
    if options.out.is_dir() and any(options.out.iterdir()) and not options.force:
        raise UserError(f"--out={options.out} is not empty; --force writes into it.")
    module = load_module(options.checkpoint, "cpu")
    try:
        pipeline = module.pipeline()
    except ValueError as error:
        raise UserError(sentence(error)) from error
    try:
        pipeline.save_pretrained(options.out)
    except OSError as error:
        raise UserError(f"cannot write {options.out}: {error.strerror}.", status=1) from error
    name = type(pipeline).__name__
    package = "lightning_opt.diffusion" if name == "GBMPipeline" else "diffusers"
    print(f"pipeline: {options.out}")
    print(f"load it:  from {package} import {name}; {name}.from_pretrained({str(options.out)!r})")
    return 0
