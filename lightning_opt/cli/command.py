"""``lightning-opt``: the words of the command line to a subcommand, and its errors to messages and exit statuses."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator

from lightning_opt import __version__, registry

from .errors import UserError, did_you_mean

_TRAINER_COMMANDS = {
    "fit": "train a model; without --config the recipe digits/quickstart",
    "validate": "evaluate a checkpoint on the validation data",
    "test": "evaluate a checkpoint on the test data",
    "predict": "save a checkpoint's predictions",
}


def main(argv: list[str] | None = None) -> int:
    """Run ``lightning-opt``.

    A user's mistake gives one message on stderr and status 2, data that are missing or damaged status 1, Ctrl-C 130. A
    defect keeps its traceback; ``--debug`` or ``LIGHTNING_OPT_DEBUG=1`` shows the traceback of a mistake too.

    Args:
        argv: The words after the program's name; by default those of the process.

    Returns:
        The exit status.

    Example:
        >>> main(["--version"])  # doctest: +ELLIPSIS
        lightning-opt ...
        0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or os.environ.get("LIGHTNING_OPT_DEBUG", "0") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    try:
        with _working_folder_importable():
            return _dispatch(words)
    except SystemExit as error:  # argparse's help and errors, and what Lightning makes of Ctrl-C
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:  # outside training, where Lightning turns it into SystemExit
        print("lightning-opt: interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        status = _status(error)
        if debug or status is None:
            raise
        print(f"lightning-opt: {error}", file=sys.stderr)
        return status


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        registry.load_all()
        print(_help())
        return 0 if words else 2
    name, rest = words[0], words[1:]
    if name == "--version":
        print(f"lightning-opt {__version__}")
        return 0
    if name in _TRAINER_COMMANDS:
        from .lightning_cli import LightningOptCLI

        LightningOptCLI(words)
        return 0
    if name.startswith("-"):
        raise UserError(f"{name}: the command comes first, `lightning-opt COMMAND [options]`.")
    importlib.import_module(".recipes", __package__)  # the one command that need not wait for torch

    commands = {command.name: command for command in registry.commands()}
    if name not in commands:
        registry.load_all()
        commands = {command.name: command for command in registry.commands()}
    if name not in commands:
        from lightning_opt._checks import nearest

        near = nearest(name, [*_TRAINER_COMMANDS, *commands])
        raise UserError(f"there is no command {name!r}.{did_you_mean(near)} `lightning-opt --help` lists them.")
    return commands[name].run(rest)


def _help() -> str:
    summaries = _TRAINER_COMMANDS | {command.name: command.summary for command in registry.commands()}
    width = max(map(len, summaries))
    return "\n".join(
        [
            "usage: lightning-opt COMMAND [options]",
            "",
            "Published optimization research as PyTorch Lightning plugins.",
            "",
            *(f"  {name:<{width}}  {summary}" for name, summary in summaries.items()),
            "",
            "examples:",
            "  lightning-opt fit",
            "  lightning-opt fit --config fashion_mnist/adabelief --optimizer=DiffGrad --optimizer.lr=1e-3",
            "  lightning-opt fit --config fashion_mnist/adabelief --ckpt_path=last",
            "  lightning-opt recipes list",
            "",
            "`lightning-opt COMMAND --help` shows a command's options; --debug shows the traceback of a mistake.",
        ]
    )


def _status(error: Exception) -> int | None:
    """The exit status of an error that needs no traceback, or None for a defect."""
    if isinstance(error, UserError):
        return error.status
    if "lightning.pytorch" not in sys.modules:
        return None
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from lightning_opt.data import CorruptDataError, DataNotFoundError

    if isinstance(error, (DataNotFoundError, CorruptDataError)):
        return 1
    return 2 if isinstance(error, MisconfigurationException) else None


@contextlib.contextmanager
def _working_folder_importable() -> Iterator[None]:
    """Let ``--model=my_module.MyModel`` find a module in the working folder, as ``python -m`` does."""
    folder = os.getcwd()
    added = folder not in sys.path
    if added:
        sys.path.append(folder)
    try:
        yield
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)
