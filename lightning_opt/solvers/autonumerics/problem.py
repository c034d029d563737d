"""An approximation problem: a function on a domain with a measure of error, and the points it is measured at."""

import functools
from typing import Any

import mpmath
import numpy as np

from . import _kernels
from .functions import DIGITS, ErrorKind, Function, check_error_kind, target
from .program import Program

TRAINING_POINTS = 64
NOISE = 2e-14
_FLOAT32_POINTS = 4096  # rounding has no shape that fewer could follow
_CHECKED_POINTS = 1 << 20  # of what may be the best
EXACT_BELOW = 1e-11
"""Relative to the size of the function: smaller errors are measured in 40 digits, since float64 blurs them."""


class Problem:
    """What candidates are fitted to and measured by.

    Args:
        function: See :func:`functions.target`.
        domain: Its ends; None for the function's usual domain.
        error: ``"relative"``, ``"absolute"``, or ``"ulp32"``: units in the last place of float32, the program being
            run in float32. None for the function's usual measure.
        points: Training points, at Chebyshev's places. The error is validated on 20 times as many, ``"ulp32"`` on 4,096
            and those that may be best on a million.

    Raises:
        ValueError: If the domain is empty, the function is not finite on it, or the relative error is asked for and the
            function has a zero.
    """

    def __init__(
        self,
        function: Function,
        domain: tuple[float, float] | None = None,
        error: ErrorKind | None = None,
        points: int = TRAINING_POINTS,
    ) -> None:
        self.target = target(function)
        self.error: ErrorKind = self.target.error if error is None else error
        check_error_kind(self.error)
        low, high = map(float, self.target.domain if domain is None else domain)
        if not (low < high and np.isfinite([low, high]).all()):
            raise ValueError(f"domain must be two finite numbers, the lower first; got ({low}, {high})")
        self.domain = (low, high)
        self.x = _chebyshev(low, high, points)
        self.grid = np.unique(np.concatenate([np.linspace(low, high, 10 * points), _chebyshev(low, high, 10 * points)]))
        if self.error == "ulp32":
            self.x, self.grid = _rounded(self.x), np.unique(_rounded(np.linspace(low, high, _FLOAT32_POINTS)))
        else:
            self.grid[0], self.grid[-1] = low, high
        self.y, self.y_grid = self.target.values(self.x), self.target.values(self.grid)
        if not (np.isfinite(self.y_grid).all() and np.isfinite(self.y).all()):
            where = self.grid[~np.isfinite(self.y_grid)]
            at = f" at x = {where[0]:g}" if len(where) else ""
            raise ValueError(f"{self.target.name} must be finite on the domain [{low:g}, {high:g}]; it is not{at}")
        if self.error == "relative" and (np.abs(self.y_grid).min() == 0 or np.ptp(np.sign(self.y_grid)) > 0):
            raise ValueError(
                f"{self.target.name} has a zero in [{low:g}, {high:g}], where a relative error means nothing: take"
                " error='absolute', or approximate the function divided by what is zero there"
            )
        self.scale, self.grid_scale = self.scale_at(self.y), self.scale_at(self.y_grid)
        self._exact_values: np.ndarray | None = None
        self._checked: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self.magnitude = 1.0 if self.error == "relative" else float(np.median(np.abs(self.y_grid) * self.grid_scale))

    def scale_at(self, y: np.ndarray) -> np.ndarray:
        """What a difference from values y is multiplied with to be an error."""
        if self.error == "absolute":
            return np.ones_like(y)
        if self.error == "relative":
            return 1 / np.abs(y)
        return 1 / np.spacing(np.abs(y).astype(np.float32)).astype(np.float64)

    def errors(self, program: Program, coefficients: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The errors at points, in float64; for ``"ulp32"`` those of the program in float32."""
        if self.error == "ulp32":
            own = _kernels.values(program.encoded(), coefficients.astype(np.float32), x.astype(np.float32))
            own = own.astype(np.float64)
        else:
            own = _kernels.values(program.encoded(), coefficients, x)
        if x is self.grid:
            return (own - self.y_grid) * self.grid_scale
        y = self.target.values(x)
        return (own - y) * self.scale_at(y)

    def exact_errors(self, program: Program, coefficients: Any, x: np.ndarray) -> np.ndarray:
        """The errors at points in real arithmetic, to 40 digits, as ``mpmath.mpf``; coefficients may be such too."""
        with mpmath.workdps(DIGITS):
            points = np.array([mpmath.mpf(float(v)) for v in x], dtype=object)
            y = self._exact_grid() if x is self.grid else self.target.exact_values(x)
            own = program(points, [mpmath.mpf(c) for c in coefficients])
            return np.atleast_1d((own - y) / (abs(y) if self.error == "relative" else 1))

    def max_error(self, program: Program, coefficients: np.ndarray) -> float:
        """The largest error on the domain, infinite if a pole is in it.

        Measured on the dense grid and refined at its highest places; poles between the points are looked for at every
        change of sign and every dip of a denominator. Below 1e-11 in real arithmetic, to 40 digits.
        """
        largest, places = self._coarse_error(program, coefficients)
        if not np.isfinite(largest):
            return float("inf")
        if self.error == "ulp32":
            return max(largest, self._float32_error(program, coefficients))
        largest = max(largest, self._refined(program, coefficients, places), self._at_poles(program, coefficients))
        if self.error != "ulp32" and largest < EXACT_BELOW * self.magnitude:
            return self._exact_max_error(program, coefficients)
        return largest if np.isfinite(largest) else float("inf")

    def quick_error(self, program: Program, coefficients: np.ndarray) -> float:
        """The largest error on the dense grid in float64; where that is noise, on the training points to 40 digits."""
        error = self._coarse_error(program, coefficients)[0]
        if self.error != "ulp32" and error < NOISE * self.magnitude:
            error = max(map(float, abs(self.exact_errors(program, coefficients, self.x))))
        return error if np.isfinite(error) else float("inf")

    def _coarse_error(self, program: Program, coefficients: np.ndarray) -> tuple[float, np.ndarray]:
        if not np.isfinite(coefficients).all():
            return float("inf"), np.zeros(0, dtype=np.int64)
        errors = np.abs(self.errors(program, coefficients, self.grid))
        largest = float(errors.max())
        if not np.isfinite(errors).all():
            return float("inf"), np.zeros(0, dtype=np.int64)
        peaks = _peaks(errors)
        return largest, peaks[errors[peaks] > 0.9 * largest]

    def _refined(self, program: Program, coefficients: np.ndarray, places: np.ndarray) -> float:
        """The largest error near the given places of the grid: by 3 rounds of 16 points between the neighbors."""
        largest = 0.0
        for place in places:
            low = self.grid[max(place - 1, 0)]
            high = self.grid[min(place + 1, len(self.grid) - 1)]
            for _ in range(3 if self.error != "ulp32" else 1):
                x = np.linspace(low, high, 17)
                errors = np.abs(self.errors(program, coefficients, _rounded(x) if self.error == "ulp32" else x))
                errors[~np.isfinite(errors)] = np.inf
                best = int(errors.argmax())
                largest = max(largest, float(errors[best]))
                low, high = x[max(best - 1, 0)], x[min(best + 1, 16)]
        return largest

    def _at_poles(self, program: Program, coefficients: np.ndarray) -> float:
        """The largest error on the way to each place where a denominator may vanish."""
        denominators = _denominators(program, coefficients)
        visited: list[np.ndarray] = []
        for denominator in denominators:
            with np.errstate(all="ignore"):
                d = denominator(self.grid)
            for place in np.flatnonzero(np.signbit(d[1:]) != np.signbit(d[:-1])):
                visited.append(_bisected(denominator, self.grid[place], self.grid[place + 1]))
            size = np.abs(d)
            dips = np.flatnonzero((size[1:-1] < size[:-2]) & (size[1:-1] < size[2:])) + 1
            for place in dips[size[dips] < 1e-2 * np.median(size)]:
                visited.append(_descended(denominator, self.grid[place - 1], self.grid[place + 1]))
        if not visited:
            return 0.0
        x = np.unique(np.concatenate(visited))
        if self.error == "ulp32":
            x = np.unique(_rounded(x))
        errors = np.abs(self.errors(program, coefficients, x))
        return float(errors.max()) if np.isfinite(errors).all() else float("inf")

    def _float32_error(self, program: Program, coefficients: np.ndarray) -> float:
        """The largest error of the program in float32 on a million points."""
        if self._checked is None:
            x = np.unique(np.linspace(*self.domain, _CHECKED_POINTS).astype(np.float32))
            y = self.target.values(x.astype(np.float64))
            self._checked = x, y, self.scale_at(y)
        x, y, scale = self._checked
        own = _kernels.values(program.encoded(), coefficients.astype(np.float32), x)
        error = float(np.abs((own - y) * scale).max())
        return error if np.isfinite(error) else float("inf")

    def _exact_max_error(self, program: Program, coefficients: np.ndarray) -> float:
        errors = np.array([float(v) for v in abs(self.exact_errors(program, coefficients, self.grid))])
        if not np.isfinite(errors).all():
            return float("inf")
        largest = float(errors.max())
        peaks = _peaks(errors)
        for place in peaks[errors[peaks] > 0.98 * largest]:
            x = np.linspace(self.grid[max(place - 1, 0)], self.grid[min(place + 1, len(errors) - 1)], 17)
            largest = max(largest, *(float(v) for v in abs(self.exact_errors(program, coefficients, x))))
        return largest

    def _exact_grid(self) -> np.ndarray:
        if self._exact_values is None:
            self._exact_values = self.target.exact_values(self.grid)
        return self._exact_values


def _chebyshev(low: float, high: float, count: int) -> np.ndarray:
    """The zeros of Chebyshev's polynomial on the domain: inside it, so that x = 0 at an end asks for no division."""
    nodes = np.cos(np.pi * (np.arange(count)[::-1] + 0.5) / count)
    return low + (high - low) * 0.5 * (1 + nodes)


def _rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).astype(np.float64)


def _peaks(errors: np.ndarray) -> np.ndarray:
    padded = np.concatenate([[-1.0], errors, [-1.0]])
    return np.flatnonzero((padded[1:-1] >= padded[:-2]) & (padded[1:-1] >= padded[2:]))


def _denominators(program: Program, coefficients: np.ndarray) -> list[Any]:
    """The functions that the program divides by, each a program that ends there; x itself where it divides by x."""
    found = []
    for op, operands in program.steps:
        if op == "/" and operands[1] >= 0:
            part = Program(program.steps[: operands[1]])
            found.append(functools.partial(_value_of, part, np.asarray(coefficients[: part.num_coefficients])))
    return found


def _value_of(program: Program, coefficients: np.ndarray, x: np.ndarray) -> np.ndarray:
    return program(x, coefficients)


def _bisected(function: Any, low: float, high: float) -> np.ndarray:
    """The midpoints of a bisection for a change of sign, down to neighboring floats."""
    visited = []
    negative = np.signbit(function(np.array([low])))[0]
    for _ in range(60):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        visited.append(middle)
        if np.signbit(function(np.array([middle])))[0] == negative:
            low = middle
        else:
            high = middle
    return np.array([low, high, *visited])


def _descended(function: Any, low: float, high: float) -> np.ndarray:
    """The points of a narrowing search for the least magnitude."""
    visited = []
    for _ in range(12):
        x = np.linspace(low, high, 9)
        visited.append(x)
        best = int(np.abs(function(x)).argmin())
        low, high = x[max(best - 1, 0)], x[min(best + 1, 8)]
    return np.concatenate(visited)
