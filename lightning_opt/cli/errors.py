"""A user's mistake, and how jsonargparse's reports of it become one clear message."""

import re
from collections.abc import Iterator
from importlib import import_module
from types import TracebackType
from typing import Any

from lightning_opt.registry import extra_of

_WORDS = {
    "NoneType": "null",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "list": "a list",
    "tuple": "a list, written [a, b]",
    "tuple with 2": "a list of two, written [a, b]",
    "dict": "a mapping",
}
_WRAPPERS = ("Does not validate against any of the Union subtypes", "Problem with given class_path")


class UserError(Exception):
    """Something that the user can put right; the command prints the message alone.

    Args:
        message: Names the thing, and what would be accepted.
        status: Exit status: 2 for a mistake in the arguments or the config, 1 for what failed while running.
    """

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def explain(report: str, known_keys: list[str]) -> str:
    """The useful line of a report by jsonargparse, with the nearest right names.

    Args:
        report: The text of its ``ArgumentError``: nested unions with every type that did not fit.
        known_keys: The dotted keys that the parser accepts.

    Returns:
        One line; the report itself where it is of no known kind.
    """
    key = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', report)))
    block = _block(re.split(r'Parser key "[^"]+":', report)[-1])
    return (
        _class_argument(block, key) or _option(block, known_keys) or _class_name(block, key) or _value(block, key)
    ) or report


def culprit(error: Exception) -> BaseException:
    """What to raise for an error in building what a config describes.

    Constructors refuse a value with ``ValueError`` or ``MisconfigurationException``: the user's mistake. Anything else
    is a defect, and is returned as it was raised. jsonargparse wraps both into its report on the types that did not
    fit.
    """
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    cause: BaseException = error
    while str(cause).startswith(_WRAPPERS) and cause.__cause__ is not None:
        cause = cause.__cause__
    if not isinstance(cause, (ValueError, MisconfigurationException)):
        return cause
    return UserError(_strategy_name(str(cause)) or f"{_builder(cause)}: {cause}".removeprefix(": "))


def sentence(error: Exception) -> str:
    """The message of an error with a mark at its end: a question keeps its own."""
    message = str(error)
    return message if message.endswith((".", "?", "!")) else f"{message}."


def did_you_mean(names: list[str]) -> str:
    """``" Did you mean a or b?"``, or nothing for no names."""
    return f" Did you mean {' or '.join(names)}?" if names else ""


def import_class(class_path: str) -> Any:
    """The object at a dotted path.

    Raises:
        ImportError: If there is no such module.
        AttributeError: If the module has no such name.
    """
    module, _, name = class_path.rpartition(".")
    return getattr(import_module(module), name)


def _strategy_name(message: str) -> str:
    """What is wrong with the name of a strategy, which Lightning answers with a few of its own; else ``""``."""
    from lightning.pytorch.strategies import StrategyRegistry

    match = re.search(r"invalid strategy name: `strategy='([^']*)'`", message)
    if not match:
        return ""
    names = sorted(StrategyRegistry.available_strategies())
    hint = did_you_mean(_nearest(match[1], names)) or f" There are {', '.join(names)}."
    return f"trainer.strategy: there is no strategy named {match[1]!r}.{hint}"


def _builder(error: BaseException) -> str:
    """The innermost public class whose constructor raised; ``""`` if none did."""
    name = ""
    traceback: TracebackType | None = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_name == "__init__" and "self" in frame.f_locals:
            cls = type(frame.f_locals["self"]).__name__
            name = name if cls.startswith("_") else cls
        traceback = traceback.tb_next
    return name


def _block(text: str) -> str:
    """The first indented block: what follows it belongs to an outer key."""
    lines = text.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    end = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith(" " * indent)), len(lines))
    return "\n".join(lines[:end])


def _class_argument(report: str, key: str) -> str:
    """An argument that a class does not take, or one that it needs."""
    match = re.search(r"given class_path '([^']+)':\s+Option '([^']+)' is not accepted", report)
    if match:
        class_path, option = match[1], match[2].partition(".")[0]
        if _nearest(option, ["class_path", "init_args"]):
            return f"{key} has no entry {option!r}: a class is given by class_path and init_args."
        if import_class(class_path) in _union(report)[0]:
            return f"{key}: name a class before its argument {option!r}: --{key}=CLASS, or class_path in a config."
        accepted = _parameters(class_path)
        hint = did_you_mean(_nearest(option, accepted)) or f" It takes {', '.join(accepted)}."
        return f"{key}: {class_path.rpartition('.')[2]} has no argument {option!r}.{hint}"
    match = re.search(r"(given class_path '([^']+)':\s+)?the following arguments are required: ([^\n]+)", report)
    if match and match[2]:
        return f"{key}: {match[2].rpartition('.')[2]} needs a value for {match[3]}."
    missing = match[3].partition(".")[2] if match else ""  # behind the subcommand
    return f"{missing} is missing: give --{missing}, or an entry {missing!r} in a config." if missing else ""


def _option(report: str, known_keys: list[str]) -> str:
    """A dotted key that the parser does not know."""
    match = re.search(r"does not accept option '([^']+)'|unrecognized arguments: (\S+)", report)
    if not match:
        return ""
    if match[2] and not match[2].startswith("-"):
        return f"unexpected word {match[2]!r}: options are written --key=value."
    right, rest = "", (match[1] or match[2].lstrip("-")).partition("=")[0].removesuffix("+").split(".")
    while len(rest) > 1 and any(known.startswith(f"{right}{rest[0]}.") for known in known_keys):
        right += rest.pop(0) + "."
    siblings = {known.removeprefix(right).partition(".")[0] for known in known_keys if known.startswith(right)}
    hint = did_you_mean([right + name for name in _nearest(rest[0], sorted(siblings))])
    return f"there is no option {right + rest[0]!r}.{hint or ' `lightning-opt fit --help` lists them.'}"


def _class_name(report: str, key: str) -> str:
    """A class that does not exist, or is not of the kind that is asked for."""
    bases, plain = _union(report)
    kind = bases[0].__name__ if bases else "class"
    names, ours = _class_names(bases)
    fallback = f" Those of lightning-opt are {', '.join(ours)}; any other goes by its full path." if ours else ""
    match = re.search(r"does not correspond to a subclass[\s\S]*Given value: (\S+)", report)
    if match:
        return f"{key}: {match[1].rpartition('.')[2]} is no {kind}.{fallback}"
    match = re.search(r"given class_path '([^']+)':\s+(\S[^\n]*)", report)
    if not match and not plain:
        match = re.search(r"Expected a dot import path string: (\S+)()", report)
    if match:
        module, _, name = match[1].rpartition(".")
        lacking = re.match(r"No module named '([^']+)'", match[2])
        if lacking and (extra := extra_of(lacking[1])):
            return f"{key}: {match[1]} needs {lacking[1]}; install it with `pip install 'lightning-opt[{extra}]'`."
        near = [f"{module}.{n}" for n in _nearest(name, _public_names(module))] if module else []
        reason = f" ({match[2]})" if match[2].startswith("No module named") else ""
        hint = did_you_mean(near or _nearest(name, names)) or fallback
        return f"{key}: there is no {kind} named {match[1]!r}{reason}.{hint}"
    if "Not a valid subclass of" in report:
        return f"{key} is a class: give its name, or class_path and init_args."
    return ""


def _value(report: str, key: str) -> str:
    """A value of the wrong type."""
    given = re.search(r"(?:Got value|Given value): (.*)", report)
    union = re.search(r"Subtypes: \[(.*)\]", report)
    expected = union[1] if union else "".join(re.findall(r"Expected an? (.*?)\. Got value", report))
    accepted = re.findall(r"Literal\[(.*?)\]|(?<=<class ')(\w+)(?='>)|(tuple with \d+|list|tuple|dict)\b", expected)
    if not given or not accepted:
        return ""
    choices = ", ".join(literal for literal, _, _ in accepted if literal)
    words = [f"one of {choices}"] if choices else []
    words += [_WORDS.get(name, name) for _, *names in accepted for name in names if name]
    return f"{key} must be {' or '.join(dict.fromkeys(words))}; got {given[1].strip()!r}."


def _union(report: str) -> tuple[list[type], bool]:
    """The classes of the first union in the report, and whether it takes plain values too."""
    match = re.search(r"Subtypes: \[(.*)\]", report)
    if not match:
        return [], False
    paths = re.findall(r"(?:<class '|list\[)((?:\w+\.)+\w+)", match[1])
    plain = re.search(r"<class '(bool|int|float|str)'>|Literal\[", match[1]) is not None
    return [import_class(path) for path in paths], plain


def _class_names(bases: list[type]) -> tuple[list[str], list[str]]:
    """The short names that would fit, and those of them that this package brings."""
    from lightning_opt import registry

    entries = {entry.name: entry.target for entry in registry.entries()}
    if not bases:
        return sorted(entries), []
    ours = [name for name, target in entries.items() if isinstance(target, type) and issubclass(target, tuple(bases))]
    public = [cls.__name__ for base in bases for cls in _subclasses(base) if "._" not in f".{cls.__qualname__}"]
    return sorted({*ours, *public}), sorted(ours)


def _public_names(module: str) -> list[str]:
    try:
        return [name for name in dir(import_module(module)) if not name.startswith("_")]
    except ImportError:
        return []


def _subclasses(base: type) -> Iterator[type]:
    subclasses: list[type] = base.__subclasses__()
    for cls in subclasses:
        yield cls
        yield from _subclasses(cls)


def _parameters(class_path: str) -> list[str]:
    """The constructor's arguments as the parser sees them."""
    from jsonargparse import ArgumentParser

    names = ArgumentParser().add_class_arguments(import_class(class_path), fail_untyped=False)
    return [name for name in names if name not in ("params", "optimizer")]


def _nearest(word: str, words: list[str]) -> list[str]:
    from lightning_opt._checks import nearest  # imports torch

    return nearest(word, words)
