"""The constructor: typed, built from a config, strict, open about its options and its interval."""

from typing import Any

import jsonargparse

from ..contract import NotApplicable, require
from .subject import Subject, check, make_optimizer, rates, require_rates


@check
def arguments_are_typed(subject: Subject) -> None:
    """Every argument of the constructor has a type and a name."""
    for name, parameter in subject.parameters.items():
        require(parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL), f"{name} has no name")
        require(parameter.annotation is not parameter.empty, f"{name} has no type")


@check
def builds_from_a_config(subject: Subject) -> None:
    """jsonargparse, and so LightningCLI, builds it from the settings, and after a round trip through a file."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(subject.cls, "scheduler", skip={"optimizer"})
    config = parser.parse_object({"scheduler": subject.kwargs})
    again = parser.parse_string(parser.dump(config))
    require(again == config, f"the config changes when it is saved and read: {config} becomes {again}")
    built = subject.cls(make_optimizer(), **vars(again.scheduler))
    require_rates(rates(built), rates(subject.build()), "built from a config")


@check
def repr_names_the_arguments(subject: Subject) -> None:
    """``repr`` shows the class and every argument but ``last_epoch``, and no address."""
    text = repr(subject.build())
    names = [name for name in subject.parameters if name != "last_epoch"]
    missing = [name for name in (subject.cls.__name__, *names) if name not in text]
    require(not missing, f"not in {text}: {', '.join(missing)}")
    require(" at 0x" not in text, f"an address in {text}")


@check
def says_its_interval(subject: Subject) -> None:
    """The class attribute ``interval`` says when to step it: ``"step"`` or ``"epoch"``."""
    interval = getattr(subject.cls, "interval", None)
    require(interval in ("step", "epoch"), f"interval is {interval!r}")


@check
def refuses_wrong_numbers_of_steps(subject: Subject) -> None:
    """Numbers of steps or samples refuse -1, 2.5, NaN and infinity by a ValueError that says so."""
    counts = {"total_steps", "warmup_steps", "total_iters", "T_max", "batch_size", "warmup_samples", "lr_decay_samples"}
    names = [name for name in subject.parameters if name in counts]
    if not names:
        raise NotApplicable(f"{subject.cls.__name__} takes no number of steps")
    for name in names:
        for value in (-1, 2.5, float("nan"), float("inf")):
            _refuses(subject, name, value)


@check
def refuses_a_wrong_last_epoch(subject: Subject) -> None:
    """``last_epoch`` refuses -2 by a ValueError that says so."""
    _refuses(subject, "last_epoch", -2)


def _refuses(subject: Subject, name: str, value: Any) -> None:
    optimizer = make_optimizer()
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    try:
        subject.build(optimizer, **{name: value})
    except ValueError as error:
        says = name in str(error) and str(value).removesuffix("inite") in str(error)
        require(says, f"{name}={value} raises ValueError({str(error)!r}), which names neither")
    except Exception as error:
        require(False, f"{name}={value} raises {type(error).__name__}, not ValueError")
    else:
        require(False, f"{name}={value} is accepted")
