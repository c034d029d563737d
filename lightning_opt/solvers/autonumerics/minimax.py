"""From a good fit to the best: least maximum error over the coefficients of any program."""

from typing import Any

import mpmath
import numpy as np
from scipy.optimize import linprog

from . import _kernels
from .functions import DIGITS
from .problem import EXACT_BELOW, Problem
from .program import Program


def minimax(
    problem: Problem, program: Program, coefficients: np.ndarray, *, rounds: int = 12, tolerance: float = 1e-4
) -> np.ndarray:
    """Lower the largest error by linear programs on the linearized residuals (Osborne and Watson, 1969).

    Where errors are below 1e-11 they are computed to 40 digits and so are the coefficients: a Jacobian in float64 is
    good enough for steps, residuals in float64 would be noise. In the end the coefficients are rounded to float64 one
    by one, the most sensitive first, and those left make up for it.

    Args:
        problem: What is approximated; of its ``"ulp32"`` the real-valued error is lowered.
        program: The program.
        coefficients: A good start.
        rounds: Linear programs to solve at most, a few milliseconds each.
        tolerance: Stop when a round gains less than this share.

    Returns:
        Coefficients in float64.
    """
    if program.num_coefficients == 0:
        return coefficients
    error = np.abs(_errors(problem, program, coefficients, problem.x)).max()
    if problem.error == "ulp32" or not error < 10 * EXACT_BELOW * problem.magnitude:
        free = np.ones(len(coefficients), dtype=bool)
        return _lowered(problem, program, coefficients, free, rounds, tolerance)
    with mpmath.workdps(DIGITS):
        return _lowered_exactly(problem, program, _exact(coefficients), rounds, tolerance)


def _lowered_exactly(
    problem: Problem, program: Program, coefficients: np.ndarray, rounds: int, tolerance: float
) -> np.ndarray:
    free = np.ones(len(coefficients), dtype=bool)
    current = _lowered(problem, program, coefficients, free, rounds, tolerance)
    _, size = _jacobian(problem, program, current.astype(np.float64), problem.x)
    sensitivity = size * np.abs(current.astype(np.float64))
    for k in np.argsort(-sensitivity):
        current[k] = mpmath.mpf(float(current[k]))
        free[k] = False
        if free.any():
            current = _lowered(problem, program, current, free, 2, tolerance)
    return current.astype(np.float64)


def _lowered(
    problem: Problem, program: Program, current: Any, free: np.ndarray, rounds: int, tolerance: float
) -> np.ndarray:
    """Coefficients, float64 or ``mpf`` as those given, with a lower largest error; only the free ones are changed."""
    x = np.union1d(problem.x, _places(problem, program, current))
    errors = _errors(problem, program, current, x)
    largest = np.abs(errors).max()
    radius = np.inf
    for _ in range(rounds):
        if not (np.isfinite(largest) and largest > 0):
            break
        jacobian, size = _jacobian(problem, program, current.astype(np.float64), x)
        directions, triangle = np.linalg.qr((jacobian / size)[:, free])
        step, predicted = _linear_step(errors / largest, directions, radius)
        if step is None or 1 - predicted < tolerance:
            break
        change = np.zeros(len(free))
        change[free] = _solved(triangle, step) * largest / size[free]
        trial = current + (_exact(change) if current.dtype == object else change)
        with_places = np.union1d(x, _places(problem, program, trial))
        trial_errors = _errors(problem, program, trial, with_places)
        trial_largest = np.abs(trial_errors).max()
        if trial_largest < largest:
            gain = 1 - trial_largest / largest
            x, current, errors, largest = with_places, trial, trial_errors, trial_largest
            if gain > 0.5 * (1 - predicted):
                radius = max(radius, 2 * np.abs(step).max())
            if gain < tolerance:
                break
        else:
            if len(x) < len(with_places) < 400:  # extrema that the points had missed
                x = with_places
                errors = _errors(problem, program, current, x)
                largest = np.abs(errors).max()
            radius = 0.25 * float(np.abs(step).max())
    return current


def _errors(problem: Problem, program: Program, coefficients: Any, x: np.ndarray) -> np.ndarray:
    """The real-valued errors: computed in the arithmetic of the coefficients, given in float64."""
    if coefficients.dtype == object:
        return problem.exact_errors(program, coefficients, x).astype(np.float64)
    y = problem.target.values(x)
    return (_kernels.values(program.encoded(), coefficients, x) - y) * problem.scale_at(y)


def _places(problem: Problem, program: Program, coefficients: Any) -> np.ndarray:
    """Where the error is a local maximum on the dense grid; none for exact coefficients, where that would be slow."""
    if coefficients.dtype == object:
        return np.zeros(0)
    magnitude = np.abs(_errors(problem, program, coefficients, problem.grid))
    if not np.isfinite(magnitude).all():
        return np.zeros(0)
    padded = np.concatenate([[-1.0], magnitude, [-1.0]])
    peaks = (padded[1:-1] >= padded[:-2]) & (padded[1:-1] >= padded[2:]) & (magnitude > 0.5 * magnitude.max())
    found = problem.grid[peaks]
    return found if len(found) <= 40 else np.zeros(0)


def _jacobian(
    problem: Problem, program: Program, coefficients: np.ndarray, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The derivatives of the errors ``[points, coefficients]``, and the norms of the columns."""
    code = program.encoded()
    table = np.empty((1 + len(coefficients) + len(code), len(x)))
    table[0] = x
    _kernels.forward(code, coefficients, table)
    adjoint = np.empty_like(table)
    _kernels.backward(code, table, adjoint)
    jacobian = (adjoint[1 : 1 + len(coefficients)] * problem.scale_at(problem.target.values(x))).T
    return jacobian, np.linalg.norm(jacobian, axis=0) + 1e-300


def _linear_step(errors: np.ndarray, directions: np.ndarray, radius: float) -> tuple[np.ndarray | None, float]:
    """The step along orthonormal directions that minimizes the largest linearized error, and that error."""
    if not np.isfinite(directions).all():
        return None, 1.0
    count = directions.shape[1]
    ones = np.ones((len(errors), 1))
    scaled = directions * np.sqrt(len(errors))  # entries of the size of one
    limit = radius / np.sqrt(len(errors)) if np.isfinite(radius) else None
    result = linprog(
        np.eye(count + 1)[-1],
        A_ub=np.block([[scaled, -ones], [-scaled, -ones]]),
        b_ub=np.concatenate([-errors, errors]),
        bounds=[(None if limit is None else -limit, limit)] * count + [(0, None)],
        method="highs",
    )
    if not result.success:
        return None, 1.0
    return result.x[:-1] * np.sqrt(len(errors)), float(result.x[-1])


def _solved(triangle: np.ndarray, step: np.ndarray) -> np.ndarray:
    """R^-1 step; directions that the program does not have, coefficients being redundant, are left out."""
    diagonal = np.abs(np.diag(triangle))
    if diagonal.min() > 1e-13 * diagonal.max():
        return np.linalg.solve(triangle, step)
    return np.linalg.lstsq(triangle, step, rcond=1e-13)[0]


def _exact(values: np.ndarray) -> np.ndarray:
    return np.array([mpmath.mpf(float(value)) for value in values], dtype=object)
