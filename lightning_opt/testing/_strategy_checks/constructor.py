"""The constructor: typed, built from a config and by name, strict about values, picklable."""

import inspect
import pickle
import types
import typing
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import StrategyRegistry

from .._callback_checks.subject import quiet
from ..contract import ContractError, NotApplicable, require
from .subject import Subject, check

NO_SUCH_CHOICE = "no such choice"


@check
def arguments_are_typed(subject: Subject) -> None:
    """Every argument of the constructor has a type and a name."""
    for name, parameter in _parameters(subject).items():
        require(parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL), f"{name} has no name")
        untyped = parameter.annotation is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        require(not untyped, f"{name} has no type")


@check
def builds_from_a_config(subject: Subject) -> None:
    """LightningCLI builds it from ``trainer.strategy.class_path`` and ``init_args``, and again from what it saves."""
    path = f"{subject.cls.__module__}.{subject.cls.__qualname__}"
    with quiet():
        parser = LightningArgumentParser(exit_on_error=False)
        parser.add_argument("--strategy", type=subject.cls)
        config = parser.parse_object({"strategy": {"class_path": path, "init_args": dict(subject.kwargs)}})
        again = parser.parse_string(parser.dump(config))
        require(again == config, f"the config changes when it is saved and read: {config} becomes {again}")
        built = parser.instantiate_classes(again).strategy
    require(type(built) is subject.cls, f"the config builds {type(built).__name__}")
    taken = _trainer(built).strategy
    require(taken is built, f"the Trainer takes {type(taken).__name__} in its place")


@check
def has_a_name(subject: Subject) -> None:
    """``Trainer(strategy="<name>")`` builds it, by the name in Lightning's registry."""
    names = _names(subject)
    require(bool(names), f"Lightning's StrategyRegistry has no name for {subject.cls.__name__}")
    for name in names:
        if StrategyRegistry[name]["init_params"].get("start_method") == "fork":
            continue  # Lightning forbids it where a GPU is in use
        built = type(_trainer(name).strategy)
        require(built is subject.cls, f"Trainer(strategy={name!r}) builds {built.__name__}")


@check
def refuses_wrong_values(subject: Subject) -> None:
    """Its own arguments refuse NaN for a number and an unknown choice by a ValueError that names them."""
    tried = 0
    for name, wrong in _wrong_values(subject):
        tried += 1
        try:
            subject.build(**{name: wrong})
        except ValueError as error:
            require(name in str(error), f"{name}={wrong!r} raises a ValueError that does not name it: {error}")
        except Exception as error:
            raise ContractError(f"{name}={wrong!r} raises {type(error).__name__}, not ValueError: {error}") from error
        else:
            raise ContractError(f"{name}={wrong!r} is accepted")
    if not tried:
        raise NotApplicable(f"{subject.cls.__name__} has no argument that is a number or a choice")


@check
def pickles(subject: Subject) -> None:
    """A new strategy can be pickled, as ``start_method="spawn"`` does."""
    twin = pickle.loads(pickle.dumps(subject.build()))
    require(type(twin) is subject.cls, f"the pickle is a {type(twin).__name__}")


def _trainer(strategy: Any) -> pl.Trainer:
    with quiet():
        return pl.Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False)


def _names(subject: Subject) -> list[str]:
    return [name for name in StrategyRegistry.available_strategies() if _target(name) is subject.cls]


def _target(name: str) -> Any:
    """The class that a name stands for; the entry may hold a function that imports it."""
    strategy = StrategyRegistry[name]["strategy"]
    if isinstance(strategy, type):
        return strategy
    return type(StrategyRegistry.get(name))


def _parameters(subject: Subject) -> dict[str, inspect.Parameter]:
    init: Any = subject.cls.__init__
    return dict(list(inspect.signature(init).parameters.items())[1:])


def _wrong_values(subject: Subject) -> list[tuple[str, Any]]:
    hints = typing.get_type_hints(subject.cls.__init__)
    wrong: list[tuple[str, Any]] = []
    for name in _parameters(subject):
        hint = hints.get(name)
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        if int in kinds or float in kinds:
            wrong.append((name, float("nan")))
        if any(typing.get_origin(kind) is typing.Literal for kind in kinds):
            wrong.append((name, NO_SUCH_CHOICE))
    return wrong
