"""The constructor: typed, built from a config, open about its options."""

import inspect
from typing import Any

import jsonargparse

from ..contract import require
from .subject import Subject, check, described


@check
def arguments_are_typed(subject: Subject) -> None:
    """Every argument of the constructor has a type and a name."""
    for name, parameter in _parameters(subject).items():
        require(parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL), f"{name} has no name")
        untyped = parameter.annotation is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        require(not untyped, f"{name} has no type")


@check
def builds_from_a_config(subject: Subject) -> None:
    """jsonargparse, and so LightningCLI, builds it from the settings, and after a round trip through a file."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(subject.cls, "callback")
    config = parser.parse_object({"callback": subject.kwargs})
    again = parser.parse_string(parser.dump(config))
    require(again == config, f"the config changes when it is saved and read: {config} becomes {again}")
    built = parser.instantiate(again)["callback"]
    require(described(built) == described(subject.build()), f"from a config it is {built!r}, not {subject.build()!r}")


@check
def repr_names_the_arguments(subject: Subject) -> None:
    """``repr`` shows the class and every argument, and no address."""
    text = repr(subject.build())
    names = [name for name, p in _parameters(subject).items() if p.kind is not p.VAR_KEYWORD]
    missing = [name for name in (subject.cls.__name__, *names) if name not in text]
    require(not missing, f"not in {text}: {', '.join(missing)}")
    require(" at 0x" not in text, f"an address in {text}")


@check
def leaves_the_name_log_free(subject: Subject) -> None:
    """No attribute is named ``log`` or ``log_dict``: Lightning overwrites them."""
    taken = [name for name in ("log", "log_dict") if hasattr(subject.build(), name)]
    require(not taken, f"it has {' and '.join(taken)}")


def _parameters(subject: Subject) -> dict[str, inspect.Parameter]:
    init: Any = subject.cls.__init__
    return {} if init is object.__init__ else dict(list(inspect.signature(init).parameters.items())[1:])
