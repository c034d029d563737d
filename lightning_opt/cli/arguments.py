"""The words of the command line, put in an order that does not depend on how they were typed."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .errors import UserError
from .recipes import recipe_path

DEFAULT_RECIPE = "digits/quickstart"
_CLASS_KEYS = ("model", "data", "optimizer", "lr_scheduler")


class Option(NamedTuple):
    """One option and its value as typed: ``("--optimizer.lr", ["--optimizer.lr", "0.1"])``."""

    key: str
    words: list[str]

    @property
    def value(self) -> str:
        """What was given, without its key."""
        head, equals, tail = self.words[0].partition("=")
        return tail if equals else "".join(self.words[1:])


def arrange(words: list[str], class_paths: Mapping[str, str]) -> tuple[list[str], str | None]:
    """Put configs first and a class before its arguments, and turn names of recipes and classes into paths.

    A later word overrides an earlier one, so without this ``--optimizer.lr=1 --config x`` would lose the learning rate.

    Args:
        words: What follows the subcommand.
        class_paths: Short names that mean one class, whatever else was imported.

    Returns:
        The words for the parser, with the default recipe as ``--config`` where none is given, and the first recipe
        among the configs.

    Raises:
        UserError: If a config is neither a file nor a recipe.
    """
    options = _split(words)
    configs = [option for option in options if option.key in ("--config", "-c")]
    others = [option for option in options if option.key not in ("--config", "-c")]
    values = [option.value for option in configs] or [DEFAULT_RECIPE]
    paths = [_config_path(value) for value in values]
    recipe = next((name for name, path in zip(values, paths, strict=True) if path != name), None)
    ordered = [word for option in sorted(others, key=_rank) for word in _with_full_path(option, class_paths)]
    return [f"--config={path}" for path in paths] + ordered, recipe


def load_config(path: str | Path) -> dict[str, Any]:
    """The content of a config file.

    Raises:
        UserError: If it is no YAML, or no mapping of options to values.
    """
    try:
        config = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"--config {path}: cannot be read as YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(config, dict | None):
        raise UserError(f"--config {path}: must map options to values; it holds {str(config)[:60]!r}.")
    return config or {}


def chosen_classes(words: list[str]) -> dict[str, str]:
    """The classes named by plain ``--optimizer=X`` words, by key."""
    return {o.key[2:]: o.value for o in _split(words) if o.key[2:] in _CLASS_KEYS}


def without(words: list[str], key: str) -> list[str]:
    """The words less one option and its value."""
    return [word for option in _split(words) if option.key != key for word in option.words]


def _split(words: list[str]) -> list[Option]:
    options: list[Option] = []
    for word in words:
        takes_value = options and len(options[-1].words) == 1 and "=" not in options[-1].words[0]
        if takes_value and options[-1].key.startswith("-") and not re.match(r"-(?![.\d])", word):
            options[-1].words.append(word)
        else:
            options.append(Option(word.partition("=")[0], [word]))
    return options


def _rank(option: Option) -> int:
    """The depth of a key below a class, 0 for all other options: they keep their order."""
    root, _, rest = option.key.removeprefix("--").partition(".")
    return 1 + rest.count(".") + bool(rest) if root in _CLASS_KEYS and not option.key.endswith("+") else 0


def _with_full_path(option: Option, class_paths: Mapping[str, str]) -> list[str]:
    takes_class = option.key.startswith(("--trainer.callbacks", *(f"--{key}" for key in _CLASS_KEYS)))
    if takes_class and option.value in class_paths:
        return [f"{option.key}={class_paths[option.value]}"]
    return option.words


def _config_path(value: str) -> str:
    if Path(value).is_file():
        load_config(value)
        return value
    try:
        return str(recipe_path(value))
    except UserError as error:
        raise UserError(f"--config {value}: no such file, and {error}") from error
