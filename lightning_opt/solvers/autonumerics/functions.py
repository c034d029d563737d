"""The function to approximate: in float64, and to 40 digits where that is known."""

import dataclasses
import importlib
import math
import types
from collections.abc import Callable
from typing import Any, Literal

import mpmath
import numpy as np

from lightning_opt._checks import check_choice, nearest

DIGITS = 40
ErrorKind = Literal["relative", "absolute", "ulp32"]
Function = str | Callable[[np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Target:
    """A function of one variable.

    Attributes:
        name: What it is called: a name, an expression, or ``module:name``.
        function: From a float64 array to a float64 array.
        exact: From ``mpmath.mpf`` to ``mpmath.mpf`` under any working precision; None for a function that is known in
            float64 only, where errors below 1e-14 mean little.
        domain: Where it is usually approximated, range reduction doing the rest.
        error: How its error is usually measured.
    """

    name: str
    function: Callable[[np.ndarray], Any]
    exact: Callable[[Any], Any] | None = None
    domain: tuple[float, float] = (0.0, 1.0)
    error: ErrorKind = "relative"

    def values(self, x: np.ndarray) -> np.ndarray:
        """The values in float64, as a new array of the shape of x."""
        with np.errstate(all="ignore"):
            result = np.asarray(self.function(np.array(x, dtype=np.float64)), dtype=np.float64)
        return np.array(np.broadcast_to(result, x.shape))

    def exact_values(self, x: np.ndarray) -> np.ndarray:
        """The values to 40 digits, as an array of ``mpmath.mpf``; those of float64 where no better are known."""
        with mpmath.workdps(DIGITS):
            if self.exact is None:
                return np.array([mpmath.mpf(float(v)) for v in self.values(x)], dtype=object)
            return np.array([mpmath.mpf(self.exact(mpmath.mpf(float(v)))) for v in x], dtype=object)

    def exact_value(self, x: Any) -> Any:
        """The value at an ``mpmath.mpf``, to the working precision where that is known."""
        if self.exact is None:
            return mpmath.mpf(float(self.values(np.array([float(x)]))[0]))
        return mpmath.mpf(self.exact(x))


def target(function: Function) -> Target:
    """What the user means by a function.

    Args:
        function: A known name (``"exp2"``, ``"log2"``, ...), an expression of x such as ``"sin(x) / x"`` or
            ``"1 / (1 + exp(-x))"``, ``"module:name"`` of a function on numpy arrays, or such a function itself.

    Raises:
        ValueError: If it is none of these.

    Example:
        >>> target("log2").domain
        (1.0, 2.0)
        >>> target("x * exp(x)").values(np.array([0.0, 1.0])).round(4).tolist()
        [0.0, 2.7183]
    """
    if callable(function):
        return Target(getattr(function, "__name__", repr(function)), function)
    if not isinstance(function, str):
        raise ValueError(f"function must be a name, an expression of x or a callable, got {function!r}")
    if function in _NAMED:
        return _NAMED[function]
    if ":" in function:
        return Target(function, _imported(function))
    return _expression(function)


def _imported(path: str) -> Callable[[np.ndarray], Any]:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"function: there is no {name!r} in a module {module!r} ({error})") from error
    if not callable(found):
        raise ValueError(f"function: {path} is not callable")
    return found


def _expression(text: str) -> Target:
    """A target from Python's arithmetic on x and the functions below, in numpy and in mpmath alike."""
    try:
        code = compile(text, "function", "eval")
    except SyntaxError as error:
        raise ValueError(f"function {text!r} is no expression: {error.msg}") from error
    unknown = [name for name in code.co_names if name not in _FUNCTIONS and name != "x"]
    if unknown or any(isinstance(constant, types.CodeType) for constant in code.co_consts):
        near = nearest(unknown[0], [*_FUNCTIONS, *_NAMED]) if unknown else []
        hint = f" Did you mean {near[0]!r}?" if near else f" It may use x and {', '.join(_FUNCTIONS)}."
        raise ValueError(f"function {text!r} is no known name and no expression of x.{hint}")
    if "x" not in code.co_names:
        raise ValueError(f"function {text!r} does not depend on x")
    in_numpy = {name: pair[0] for name, pair in _FUNCTIONS.items()} | {"__builtins__": {}}

    def exact(x: Any) -> Any:  # constants anew each time, to the precision at hand
        in_mpmath = {name: pair[1]() if name in ("pi", "e") else pair[1] for name, pair in _FUNCTIONS.items()}
        return eval(code, {**in_mpmath, "__builtins__": {}}, {"x": x})

    return Target(text, lambda x: eval(code, in_numpy, {"x": x}), exact)


def check_error_kind(error: str) -> None:
    """Raise ``ValueError`` for an unknown measure."""
    check_choice("error", error, ("relative", "absolute", "ulp32"))


def _exp2(x: Any) -> Any:
    return mpmath.mpf(2) ** x


def _log2(x: Any) -> Any:
    return mpmath.log(x) / mpmath.log(2)


_FUNCTIONS: dict[str, tuple[Any, Any]] = {
    "exp": (np.exp, mpmath.exp),
    "exp2": (np.exp2, _exp2),
    "expm1": (np.expm1, mpmath.expm1),
    "log": (np.log, mpmath.log),
    "log2": (np.log2, _log2),
    "log1p": (np.log1p, mpmath.log1p),
    "sqrt": (np.sqrt, mpmath.sqrt),
    "sin": (np.sin, mpmath.sin),
    "cos": (np.cos, mpmath.cos),
    "tan": (np.tan, mpmath.tan),
    "arctan": (np.arctan, mpmath.atan),
    "sinh": (np.sinh, mpmath.sinh),
    "cosh": (np.cosh, mpmath.cosh),
    "tanh": (np.tanh, mpmath.tanh),
    "pi": (math.pi, lambda: +mpmath.pi),
    "e": (math.e, lambda: +mpmath.e),
}

_NAMED = {
    "exp2": Target("exp2", np.exp2, _exp2),
    "exp": Target("exp", np.exp, mpmath.exp),
    "log2": Target("log2", np.log2, _log2, (1.0, 2.0), "absolute"),
    "log": Target("log", np.log, mpmath.log, (1.0, 2.0), "absolute"),
    "sin": Target("sin", np.sin, mpmath.sin, (0.0, math.pi / 2), "absolute"),
    "cos": Target("cos", np.cos, mpmath.cos, (0.0, math.pi / 4)),
    "tanh": Target("tanh", np.tanh, mpmath.tanh, (0.0, 1.0), "absolute"),
    "sqrt": Target("sqrt", np.sqrt, mpmath.sqrt, (1.0, 4.0)),
}
