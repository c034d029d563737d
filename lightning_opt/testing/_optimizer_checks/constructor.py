"""The constructor: typed, built from a config, strict about values, open about its options."""

import inspect
import json
from functools import partial
from typing import Any

import jsonargparse
import torch
from torch import nn

from ..contract import ContractError, NotApplicable, require
from .subject import Subject, check, refusal, require_near, run, tensors

_NAN = float("nan")


@check
def arguments_are_typed(subject: Subject) -> None:
    """Every argument of the constructor has a type."""
    untyped = [name for name, hint in subject.options.items() if hint is inspect.Parameter.empty]
    require(not untyped, f"untyped: {', '.join(untyped)}")


@check
def builds_from_a_config(subject: Subject) -> None:
    """jsonargparse, and so LightningCLI, builds it from its defaults and from the settings, and after a round trip."""
    for settings in ({}, subject.kwargs):
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(subject.cls, "optimizer", skip={"params"}, fail_untyped=False, instantiate=False)
        config = parser.parse_object({"optimizer": dict(settings)})
        again = parser.parse_string(json.dumps(config.as_dict()))
        require(again == config, f"the config changes when it is saved and read: {config} becomes {again}")
        group = subject.cls(tensors(), **config.optimizer).param_groups[0]
        expected = subject.cls(tensors(), **settings).param_groups[0]
        for name in expected.keys() - {"params"}:
            require(
                _equal(group[name], expected[name]), f"{name}={group[name]!r} from a config, not {expected[name]!r}"
            )


@check
def repr_names_the_options(subject: Subject) -> None:
    """``repr`` shows the class and every option."""
    text = repr(subject.build(tensors()))
    missing = [name for name in (subject.cls.__name__, *subject.options) if name not in text]
    require(not missing, f"not in repr: {', '.join(missing)}")


@check
def refuses_no_parameters(subject: Subject) -> None:
    """An empty list of parameters is refused at construction."""
    require(refusal(lambda: subject.build([]), "parameter") is not None, "accepted")


@check
def refuses_wrong_lr(subject: Subject) -> None:
    """A negative or NaN learning rate is a ValueError at construction that names it."""
    _refuses(subject, "lr", [-1.0, _NAN], "lr", "learning rate")


@check
def refuses_wrong_betas(subject: Subject) -> None:
    """A beta outside [0, 1) is a ValueError at construction that names it."""
    if "betas" not in subject.options:
        raise NotApplicable(f"{subject.cls.__name__} takes no option 'betas'")
    betas = list(subject.build(tensors()).param_groups[0]["betas"])
    for i in range(len(betas)):
        for wrong in (-0.1, 1.0, 1.5, _NAN):
            _refuses(subject, "betas", [tuple(betas[:i] + [wrong] + betas[i + 1 :])], "beta")


@check
def refuses_wrong_eps(subject: Subject) -> None:
    """A negative or NaN ``eps`` is a ValueError at construction that names it."""
    _refuses(subject, "eps", [-1.0, _NAN], "eps")


@check
def refuses_wrong_weight_decay(subject: Subject) -> None:
    """A negative or NaN weight decay is a ValueError at construction that names it."""
    _refuses(subject, "weight_decay", [-1.0, _NAN], "weight_decay", "weight decay")


@check
def refuses_wrong_momentum(subject: Subject) -> None:
    """A negative or NaN momentum is a ValueError at construction that names it."""
    _refuses(subject, "momentum", [-1.0, _NAN], "momentum")


@check
def refuses_wrong_values_in_groups(subject: Subject) -> None:
    """A wrong value in one parameter group is refused, at construction and when a group is added."""
    first, second = tensors()
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": [second], "lr": -1.0}]
    _is_value_error(lambda: subject.build(groups), "lr=-1 in a group", "lr", "learning rate")
    optimizer = subject.build([first])
    _is_value_error(lambda: optimizer.add_param_group(groups[1]), "lr=-1 in an added group", "lr", "learning rate")
    require(len(optimizer.param_groups) == 1, "the refused group was added nevertheless")


@check
def takes_named_parameters(subject: Subject) -> None:
    """Named parameters train as unnamed ones do, and ``state_dict`` keeps the names."""
    plain, named = tensors(dtype=torch.float64), tensors(dtype=torch.float64)
    optimizer = subject.build([(f"layer.{i}", p) for i, p in enumerate(named)])
    require_near(run(optimizer, named), run(subject.build(plain), plain), "named against unnamed")
    names = optimizer.state_dict()["param_groups"][0].get("param_names")
    require(names == ["layer.0", "layer.1"], f"param_names in state_dict: {names}")


@check
def groups_of_a_module_are_complete(subject: Subject) -> None:
    """``param_groups_for(module)`` has every trainable parameter once, with its name."""
    if not hasattr(subject.cls, "param_groups_for"):
        raise NotApplicable(f"{subject.cls.__name__} has no param_groups_for")
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    module[2].bias.requires_grad_(False)
    groups = subject.cls.param_groups_for(module)
    named = [(name, p) for group in groups for name, p in group["params"]]
    expected = {name: p for name, p in module.named_parameters() if p.requires_grad}
    require(len(named) == len(expected) and {name for name, _ in named} == expected.keys(), f"{[n for n, _ in named]}")
    require(all(expected[name] is p for name, p in named), "a name stands beside another parameter")
    refusal(partial(subject.build, groups), "shape", "dimension")  # some methods take matrices only


def _refuses(subject: Subject, option: str, values: list[Any], *words: str) -> None:
    subject.needs(option)
    for value in values:
        _is_value_error(lambda value=value: subject.build(tensors(), **{option: value}), f"{option}={value!r}", *words)


def _is_value_error(build: Any, what: str, *words: str) -> None:
    error = refusal(build, *words)
    if error is None:
        raise ContractError(f"{what} is accepted")
    require(isinstance(error, (ValueError, AssertionError)), f"{what} raises {type(error).__name__}, not ValueError")


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)
