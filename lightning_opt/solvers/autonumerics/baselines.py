"""What a program must beat: Taylor and minimax polynomials and minimax rationals, by operations.

All arithmetic is to 40 digits (mpmath).
"""

import dataclasses
import functools
from typing import Any

import mpmath
import numpy as np

from lightning_opt._checks import check_interval

from .functions import DIGITS
from .problem import Problem

_GRID = 400  # points that the extrema are looked for on, then refined


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A polynomial, or a quotient of two, in powers of x.

    Attributes:
        kind: ``"taylor"``, ``"minimax polynomial"`` or ``"minimax rational"``.
        numerator: Coefficients, constant first.
        denominator: Coefficients, constant first; ``(1.0,)`` of a polynomial.
        max_error: The largest error on the domain, in real arithmetic.
        extrema: Where the error is largest, with alternating signs, for minimax.
    """

    kind: str
    numerator: tuple[float, ...]
    denominator: tuple[float, ...]
    max_error: float
    extrema: tuple[float, ...] = ()

    @property
    def ops(self) -> int:
        """Operations by Horner's rule: two a degree; a denominator saves its first factor and costs the division."""
        m, n = len(self.numerator) - 1, len(self.denominator) - 1
        return 2 * m if n == 0 else 2 * m + 2 * n

    @property
    def ops_as_fraction(self) -> int:
        """Operations as a continued fraction, the cheapest form known: 3 n of degrees n/n, 3 n + 2 of n + 1/n.

        It can lose digits to cancellation. Others, and polynomials, are counted by Horner's rule.
        """
        m, n = len(self.numerator) - 1, len(self.denominator) - 1
        if n == 0 or m not in (n, n + 1):
            return self.ops
        return 3 * n + (2 if m > n else 0)


def taylor(problem: Problem, degree: int) -> Baseline:
    """The Taylor polynomial about the middle of the domain.

    Raises:
        ValueError: If the function is known in float64 only, which is too coarse for derivatives.
    """
    check_interval("degree", degree, 0)
    if problem.target.exact is None:
        raise ValueError(f"{problem.target.name} is known in float64 only: too coarse for its derivatives")
    with mpmath.workdps(DIGITS):
        low, high = map(mpmath.mpf, problem.domain)
        about = mpmath.taylor(problem.target.exact, (low + high) / 2, degree)
        powers = _shifted(about, -(low + high) / 2, mpmath.mpf(1))
        return Baseline("taylor", *_floats(powers), (1.0,), _largest(problem, powers, [mpmath.mpf(1)])[0])


def minimax_polynomial(problem: Problem, degree: int, *, constant: float | None = None) -> Baseline:
    """The polynomial with the least largest error, by the exchange of Remez.

    Args:
        problem: The function, domain and error; of ``"ulp32"`` the relative error is minimized.
        degree: Of the polynomial.
        constant: Value at 0 to keep, which costs no coefficient: a polynomial without constant term is fitted to the
            rest.

    Raises:
        ValueError: If the degree is negative, or 0 with the constant kept.

    Example:
        >>> problem = Problem("exp2", (-0.5, 0.5))
        >>> float(f"{minimax_polynomial(problem, 3, constant=1.0).max_error:.1e}")
        0.0001
    """
    check_interval("degree", degree, 0 if constant is None else 1)
    with mpmath.workdps(DIGITS):
        numerator, denominator, extrema = _remez(problem, degree, 0, constant)
        error, _ = _largest(problem, numerator, denominator)
        return Baseline("minimax polynomial", *_floats(numerator), (1.0,), error, tuple(map(float, extrema)))


def minimax_rational(problem: Problem, degree: int, denominator_degree: int) -> Baseline:
    """The quotient of polynomials with the least largest error, by the exchange of Remez; see ``minimax_polynomial``.

    Raises:
        ValueError: If a degree is out of range, or the exchange finds no quotient without poles.

    Example:
        >>> problem = Problem("exp2", (0.0, 1.0))
        >>> minimax_rational(problem, 2, 2).max_error < 1e-6
        True
    """
    check_interval("degree", degree, 0)
    check_interval("denominator_degree", denominator_degree, 1)
    with mpmath.workdps(DIGITS):
        numerator, denominator, extrema = _remez(problem, degree, denominator_degree, None)
        error, _ = _largest(problem, numerator, denominator)
        if not np.isfinite(error):
            raise ValueError(f"no rational of degrees {degree} and {denominator_degree} without poles was found")
        powers = *_floats(numerator), *_floats(denominator)
        return Baseline("minimax rational", *powers, error, tuple(map(float, extrema)))


def baselines(problem: Problem, max_ops: int) -> list[Baseline]:
    """Taylor and minimax polynomials and minimax rationals of degrees n/n and n+1/n that cost at most ``max_ops``."""
    found = []
    for degree in range(1, max_ops // 2 + 1):
        if problem.target.exact is not None:
            found.append(taylor(problem, degree))
        found.append(minimax_polynomial(problem, degree))
    for n in range(1, max_ops // 3 + 1):
        for m in (n, n + 1):
            try:
                rational = minimax_rational(problem, m, n)
            except (ValueError, ZeroDivisionError):  # singular, where the function is itself simpler
                continue
            if rational.ops_as_fraction <= max_ops:
                found.append(rational)
    return found


def _remez(problem: Problem, m: int, n: int, constant: float | None) -> tuple[list[Any], list[Any], list[Any]]:
    """Numerator, denominator and extrema; polynomials in t = (x - middle) / half, unless the constant is kept.

    With the constant c kept, x p(x) is fitted to f - c: behind 0 the sign of the alternation turns.
    """
    low, high = map(mpmath.mpf, problem.domain)
    middle, half = ((low + high) / 2, (high - low) / 2) if constant is None else (mpmath.mpf(0), mpmath.mpf(1))
    first = 0 if constant is None else 1
    known = mpmath.mpf(0 if constant is None else constant)
    count = m + 1 - first + n + 1
    nodes = np.cos(np.pi * np.arange(count)[::-1] / (count - 1)) if count > 1 else np.zeros(1)
    points = [low + (high - low) * (1 + mpmath.mpf(float(node))) / 2 for node in nodes]
    level = mpmath.mpf(0)
    for _ in range(30):
        solution = _levelled(problem, points, m, n, constant, middle, half, level)
        level = solution[count - 1]
        coefficients = [solution[k] for k in range(count - 1)]
        numerator = [*([known] if first else []), *coefficients[: m + 1 - first]]
        denominator = [mpmath.mpf(1), *coefficients[m + 1 - first :]]
        powers = _shifted(numerator, -middle, half), _shifted(denominator, -middle, half)
        largest, extrema = _largest(problem, *powers, count=count, turned=bool(first))
        if len(extrema) < count:
            break
        points = extrema
        if largest - abs(level) <= 1e-6 * largest or largest < 1e-30:
            break
    return *powers, points


def _levelled(
    problem: Problem, points: list[Any], m: int, n: int, constant: float | None, middle: Any, half: Any, level: Any
) -> Any:
    """The coefficients, and last the level, for which the errors at the points are the level with alternating signs.

    The level times the denominator is not linear: the equations are repeated with the last level until it holds still.
    """
    first, known = (0, 0) if constant is None else (1, constant)
    count = len(points)
    values = [problem.target.exact_value(x) for x in points]
    for _ in range(20 if n else 1):
        rows, right = mpmath.matrix(count, count), mpmath.matrix(count, 1)
        for i, (x, y) in enumerate(zip(points, values, strict=True)):
            t = (x - middle) / half
            sign = (-1) ** i * (mpmath.sign(x) if first else 1) * _unit(problem, y)
            for k in range(first, m + 1):
                rows[i, k - first] = t**k
            for k in range(1, n + 1):
                rows[i, m + k - first] = -(y - known + sign * level) * t**k
            rows[i, count - 1] = -sign
            right[i] = y - known
        solution = mpmath.lu_solve(rows, right)
        former, level = level, solution[count - 1]
        if abs(level - former) <= abs(level) * mpmath.mpf(10) ** -12:
            break
    return solution


def _largest(
    problem: Problem, numerator: list[Any], denominator: list[Any], count: int = 0, turned: bool = False
) -> tuple[float, list[Any]]:
    """The largest error, and ``count`` extrema of alternating sign with the largest errors."""
    grid, values = _samples(problem)

    def error(x: Any, y: Any = None) -> Any:
        y = problem.target.exact_value(x) if y is None else y
        quotient = mpmath.polyval(numerator[::-1], x) / mpmath.polyval(denominator[::-1], x)
        return (quotient - y) / _unit(problem, y) * (mpmath.sign(x) if turned else 1)

    signs = {mpmath.sign(mpmath.polyval(denominator[::-1], x)) for x in grid}
    if len(signs) > 1:
        return float("inf"), []
    errors = [error(x, y) for x, y in zip(grid, values, strict=True)]
    peaks: list[tuple[Any, Any]] = []  # one for each stretch of one sign
    for k, value in enumerate(errors):
        at_peak = all(
            abs(value) >= abs(errors[j]) or mpmath.sign(value) != mpmath.sign(errors[j])
            for j in (k - 1, k + 1)
            if 0 <= j <= _GRID
        )
        if not at_peak or value == 0:
            continue
        x, value = _vertex(error, grid, errors, k)
        if peaks and mpmath.sign(peaks[-1][1]) == mpmath.sign(value):
            if abs(value) > abs(peaks[-1][1]):
                peaks[-1] = (x, value)
        else:
            peaks.append((x, value))
    largest = max((abs(value) for _, value in peaks), default=mpmath.mpf(0))
    while len(peaks) > count > 0:
        peaks.pop(0 if abs(peaks[0][1]) < abs(peaks[-1][1]) else -1)
    return float(largest), [x for x, _ in peaks]


@functools.lru_cache(maxsize=4)
def _samples(problem: Problem) -> tuple[list[Any], list[Any]]:
    """Points, closer at the ends, and the function there."""
    with mpmath.workdps(DIGITS):
        low, high = map(mpmath.mpf, problem.domain)
        grid = [low + (high - low) * (1 - mpmath.cos(mpmath.pi * k / _GRID)) / 2 for k in range(_GRID + 1)]
        return grid, [problem.target.exact_value(x) for x in grid]


def _vertex(error: Any, grid: list[Any], errors: list[Any], k: int) -> tuple[Any, Any]:
    """The extremum near a grid point by three parabolas; the point itself at the ends."""
    x, value = grid[k], errors[k]
    if not 0 < k < len(grid) - 1:
        return x, value
    left, right = grid[k - 1] - x, grid[k + 1] - x
    for _ in range(2):
        a, b = error(x + left) - value, error(x + right) - value
        below = 2 * (a * right - b * left)
        if below == 0:
            break
        shift = (a * right**2 - b * left**2) / below
        if not left < shift < right:
            break
        moved = error(x + shift)
        if abs(moved) < abs(value):
            break
        x, value = x + shift, moved
        left, right = left / 16, right / 16
    return x, value


def _shifted(coefficients: list[Any], shift: Any, scale: Any) -> list[Any]:
    """The coefficients in x of a polynomial in (x + shift) / scale."""
    result = [mpmath.mpf(0)]
    for c in reversed(coefficients):
        shorter = [mpmath.mpf(0), *result]
        for k, value in enumerate(result):
            shorter[k] += value * shift
        result = [value / scale for value in shorter]
        result[0] += c
    return result[: len(coefficients)]


def _unit(problem: Problem, y: Any) -> Any:
    return mpmath.mpf(1) if problem.error == "absolute" else abs(y)


def _floats(powers: list[Any]) -> tuple[tuple[float, ...]]:
    return (tuple(map(float, powers)),)
