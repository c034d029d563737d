import inspect
from typing import Any


def described_by_arguments(plugin: Any) -> str:
    """``Class(argument=value, ...)``, from the attributes that have the names of the constructor's arguments."""
    names = list(inspect.signature(type(plugin)).parameters)
    values = [f"{name}={_described(getattr(plugin, name))}" for name in names]
    return f"{type(plugin).__name__}({', '.join(values)})"


def _described(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}" if inspect.isroutine(value) else repr(value)
