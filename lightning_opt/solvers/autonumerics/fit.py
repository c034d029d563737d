"""Fitting the coefficients of one program."""

from typing import Literal

import numpy as np

from . import _kernels
from .cma import cma_es
from .minimax import minimax
from .problem import Problem
from .program import Program

Trainer = Literal["lm", "cma"]
STARTS = 6
LAWSON_ROUNDS = 40


def fit(
    problem: Problem,
    program: Program,
    start: np.ndarray | None,
    rng: np.random.Generator,
    *,
    trainer: Trainer = "lm",
    promising: float = float("inf"),
) -> tuple[np.ndarray, float]:
    """Fit the coefficients.

    Args:
        problem: What is approximated.
        program: The program.
        start: Coefficients to start from, such as the parent's; ``"cma"`` does not use them, as in the paper.
        rng: Where random starts come from.
        trainer: ``"lm"``: least squares by Levenberg and Marquardt from several starts, then Lawson's reweighting
            towards the least maximum. ``"cma"``: the evolution strategy of the paper, some thousand times as costly.
        promising: Least squares whose largest error is 4 times above this are not reweighted.

    Returns:
        The coefficients, and the largest real-valued error on the training points.
    """
    count = program.num_coefficients
    if count == 0:
        values = np.zeros(0)
        return values, float(_largest(problem, program, values))
    if trainer == "cma":
        return _by_cma(problem, program, rng)
    starts = random_starts(count, start, rng)
    code = program.encoded()
    best, error = _kernels.multistart(code, starts, problem.x, problem.y, problem.scale, 12, 40, 2, 1e3)
    if error < 4 * promising:
        best, error = _kernels.lawson(code, best, problem.x, problem.y, problem.scale, LAWSON_ROUNDS)
    return best, float(error)


def refine(problem: Problem, program: Program, coefficients: np.ndarray, error: float) -> tuple[np.ndarray, float]:
    """Bring a fit to the least maximum error and measure that error on the domain.

    Args:
        problem: What is approximated.
        program: The program.
        coefficients: A fit of it.
        error: The error that is known of it.

    Returns:
        The coefficients and their error: the better ones, if refining made them worse between the points.
    """
    refined = minimax(problem, program, coefficients)
    refined_error = problem.max_error(program, refined)
    return (refined, refined_error) if refined_error < error else (coefficients, error)


def fit_float32(
    problem: Problem, program: Program, coefficients: np.ndarray, rng: np.random.Generator, *, tries: int = 150
) -> tuple[np.ndarray, float]:
    """Round a fit to float32 and try its neighbors: one or two coefficients changed by a few units in the last place.

    Args:
        problem: With the error ``"ulp32"``.
        program: The program.
        coefficients: A real-valued fit.
        rng: Where the moves come from.
        tries: How many neighbors are tried; none if rounding is not what limits the precision.

    Returns:
        Coefficients that are float32 values, and the largest error of the program run in float32 on the dense grid.
    """
    with np.errstate(over="ignore"):
        best = coefficients.astype(np.float32)
    error = problem.quick_error(program, best.astype(np.float64))
    count = len(best)
    if not (count and 0.5 < error < 16):
        return best.astype(np.float64), error
    for _ in range(tries):
        trial = best.copy()
        for k in rng.integers(count, size=int(rng.integers(1, 3))):
            units = int(rng.geometric(0.3)) * (1 if rng.random() < 0.5 else -1)
            trial[k] += units * np.spacing(trial[k])
        trial_error = problem.quick_error(program, trial.astype(np.float64))
        if trial_error <= error:
            best, error = trial, trial_error
    return best.astype(np.float64), error


def random_starts(count: int, start: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """Starts ``[STARTS, coefficients]``: the given one, it disturbed by some and by much, and random magnitudes."""
    draws = 10.0 ** rng.uniform(-2, 2, (STARTS, count)) * rng.choice((-1.0, 1.0), (STARTS, count))
    if start is not None and np.isfinite(start).all():
        draws[0] = start
        draws[1] = start * (1 + 0.1 * rng.standard_normal(count))
        draws[2] = np.where(rng.random(count) < 0.5, start, draws[2])
    return draws


def _by_cma(problem: Problem, program: Program, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """As in the paper: magnitudes 10^U(-16, 0) to start from; programs with one coefficient are not trained."""
    count = program.num_coefficients
    start = 10.0 ** rng.uniform(-16, 0, count) * rng.choice((-1.0, 1.0), count)
    if count == 1:
        return start, float(_largest(problem, program, start))
    code = program.encoded()

    def largest(candidates: np.ndarray) -> np.ndarray:
        return _kernels.largest_errors(code, candidates, problem.x, problem.y, problem.scale)

    return cma_es(largest, start, rng)


def _largest(problem: Problem, program: Program, coefficients: np.ndarray) -> float:
    return _kernels.largest_errors(
        program.encoded(), coefficients[None], problem.x, problem.y, problem.scale
    )[0]  # fmt: skip
