"""The best programs found, one for each number of operations."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_opt._checks import check_interval

from .export import function_name, python_source, triton_source
from .functions import ErrorKind
from .program import Program

_FORMAT = 1
_UNITS = {"relative": "relative error", "absolute": "absolute error", "ulp32": "error in float32 ULP"}


@dataclasses.dataclass(frozen=True)
class Approximation:
    """A program with its coefficients.

    Attributes:
        program: The operations.
        coefficients: Their coefficients, in the order in which the steps use them.
        max_error: The largest error on the domain; with these coefficients, in real arithmetic unless the error is
            ``"ulp32"``.
        function: What it approximates.
        domain: Where.
        error: The measure.
    """

    program: Program
    coefficients: tuple[float, ...]
    max_error: float
    function: str
    domain: tuple[float, float]
    error: ErrorKind

    @property
    def ops(self) -> int:
        """The number of operations."""
        return self.program.ops

    @property
    def digits(self) -> float:
        """``-log10`` of the largest error."""
        return -math.log10(self.max_error) if self.max_error > 0 else math.inf

    def __call__(self, x: Any) -> Any:
        """The values at x, in its dtype (float64 or float32)."""
        return self.program(np.asarray(x, dtype=None if hasattr(x, "dtype") else np.float64), self.coefficients)

    def to_python(self, name: str | None = None) -> str:
        """The source of a Python function for floats, numpy arrays and torch tensors; see ``export.python_source``."""
        return python_source(self.program, self.coefficients, self._name(name), self._summary())

    def to_triton(self, name: str | None = None) -> str:
        """The source of a module with a Triton device function for float32; see ``export.triton_source``."""
        return triton_source(self.program, self.coefficients, self._name(name), self._summary())

    def _name(self, name: str | None) -> str:
        return name or f"{function_name(self.function)}_{self.ops}ops"

    def _summary(self) -> str:
        low, high = self.domain
        what = f"Approximate {self.function} on [{low:g}, {high:g}] with {self.ops} operations"
        return f"{what}; largest {_UNITS[self.error]} {self.max_error:.3g}."


@dataclasses.dataclass(frozen=True)
class ParetoFront:
    """Programs none of which has both more operations and a larger error than another, fewest operations first.

    Attributes:
        items: The programs.
        evals: Programs fitted, repetitions included.
        seconds: CPU seconds of the search.
        seed: Of the search.
        interrupted: Whether Ctrl-C ended the search.
    """

    items: tuple[Approximation, ...]
    evals: int
    seconds: float
    seed: int
    interrupted: bool = False

    def __iter__(self) -> Iterator[Approximation]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Approximation:
        return self.items[index]

    def best(self, max_ops: int) -> Approximation:
        """The most precise program with at most so many operations.

        Raises:
            ValueError: If there is none.
        """
        check_interval("max_ops", max_ops, self.items[0].ops if self.items else 1)
        return [item for item in self.items if item.ops <= max_ops][-1]

    def save(self, path: str | Path) -> None:
        """Write the front as JSON."""
        first = self.items[0]
        record = {
            "format": _FORMAT,
            "function": first.function,
            "domain": list(first.domain),
            "error": first.error,
            "seed": self.seed,
            "evals": self.evals,
            "seconds": round(self.seconds, 3),
            "items": [
                {
                    "ops": item.ops,
                    "max_error": item.max_error,
                    "coefficients": list(item.coefficients),
                    "steps": [[op, list(operands)] for op, operands in item.program.steps],
                }
                for item in self.items
            ],
        }
        Path(path).write_text(json.dumps(record, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "ParetoFront":
        """Read what ``save`` wrote.

        Raises:
            ValueError: If the file is no front, or of a newer format.
        """
        try:
            record = json.loads(Path(path).read_text())
            if record["format"] != _FORMAT:
                raise ValueError(f"{path} has format {record['format']}, this version reads {_FORMAT}")
            shared = record["function"], tuple(record["domain"]), record["error"]
            items = [
                Approximation(Program(i["steps"]), tuple(i["coefficients"]), i["max_error"], *shared)
                for i in record["items"]
            ]
            return cls(tuple(items), record["evals"], record["seconds"], record["seed"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no saved front ({type(error).__name__}: {error})") from error


def pareto(candidates: Sequence[Approximation]) -> tuple[Approximation, ...]:
    """Those that no other beats with as few operations and as small an error, fewest operations first."""
    kept: list[Approximation] = []
    order: Callable[[Approximation], tuple[int, float]] = lambda item: (item.ops, item.max_error)  # noqa: E731
    for item in sorted(candidates, key=order):
        if math.isfinite(item.max_error) and (not kept or item.max_error < kept[-1].max_error):
            kept.append(item)
    return tuple(kept)
