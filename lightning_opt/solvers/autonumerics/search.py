"""The search: evolution of program structures, each with its coefficients fitted (arXiv:2312.08472)."""

import copy
import dataclasses
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

from . import _kernels
from .fit import Trainer, fit, fit_float32, refine
from .front import Approximation, ParetoFront, pareto
from .functions import ErrorKind, Function
from .graph import ARITY
from .mutations import PAPER_WEIGHTS, WEIGHTS, mutate
from .problem import NOISE, Problem
from .program import Program
from .selection import survivors
from .state import load_state, save_state

_CHILDREN = 32
_TRIES = 6  # times that one structure is fitted, from new random starts
_SAVE_EVERY = 10.0  # seconds


@dataclasses.dataclass(frozen=True)
class Individual:
    """A program of the population with its fitted coefficients and its largest error."""

    program: Program
    coefficients: np.ndarray
    error: float


@register(
    "solver", summary="evolves short programs that approximate a function", paper="2312.08472", card="autonumerics"
)
def evolve(
    fn: Function = "exp2",
    domain: tuple[float, float] | None = None,
    *,
    max_ops: int = 8,
    error: ErrorKind | None = None,
    budget_s: float | None = 60.0,
    max_evals: int | None = None,
    seed: int = 0,
    ops: str | Sequence[str] = "+-*/",
    trainer: Trainer = "lm",
    population: int = 64,
    state: str | Path | None = None,
    progress: bool = False,
) -> ParetoFront:
    """Search for programs that approximate a function of one variable with few operations.

    Args:
        fn: A known name (``"exp2"``, ``"log2"``, ``"exp"``, ``"log"``, ``"sin"``, ``"cos"``, ``"tanh"``, ``"sqrt"``),
            an expression of x, ``"module:name"``, or a function on numpy arrays.
        domain: Where to approximate it; None for the usual one of a known name, else (0, 1).
        max_ops: The most operations of a program.
        error: ``"relative"``, ``"absolute"``, or ``"ulp32"``: units in the last place of the float32 result, of the
            program run in float32. None: what is usual for a known name, else relative.
        budget_s: CPU seconds of this process, those of earlier runs that ``state`` continues included.
        max_evals: Programs to fit. With a seed and this (and a budget that is not reached) the result is reproducible.
        seed: Of all random choices.
        ops: The operations, of ``+ - * / fma sqrt``, as a text or a list.
        trainer: How coefficients are fitted; ``"cma"`` and its mutations are the paper's, a thousand times as costly.
        population: Programs kept from one generation to the next.
        state: A file to continue from if it exists, written every 10 seconds and at the end.
        progress: Show a progress bar.

    Returns:
        The best program for each number of operations. Ctrl-C ends the search early and keeps what was found.

    Raises:
        ValueError: If an argument is out of its range, the function is not finite on the domain, or the state is that
            of another search.

    Cost:
        About 1 ms a fit; memory for some 100 bytes a structure seen.

    Example:
        >>> front = evolve("exp2", max_ops=3, max_evals=300, budget_s=None)
        >>> front.best(3).max_error < 1e-3
        True
    """
    check_interval("max_ops", max_ops, 1, 100)
    check_interval("population", population, 2)
    check_choice("trainer", trainer, ("lm", "cma"))
    if budget_s is None and max_evals is None:
        raise ValueError("budget_s or max_evals must be given, else the search has no end")
    if budget_s is not None:
        check_interval("budget_s", budget_s, 0, closed="()")
    if max_evals is not None:
        check_interval("max_evals", max_evals, 1)
    search = Search(Problem(fn, domain, error), max_ops, operations(ops), trainer, population, seed)
    search.compile()
    if state is not None and Path(state).exists():
        load_state(Path(state), search)
    interrupted = not _run(search, budget_s, max_evals, Path(state) if state is not None else None, progress)
    return dataclasses.replace(search.front(), interrupted=interrupted)


class Search:
    """A population and what is known besides; changed by whole generations only, so that it can always be saved."""

    def __init__(
        self, problem: Problem, max_ops: int, ops: tuple[str, ...], trainer: Trainer, population: int, seed: int
    ) -> None:
        self.problem = problem
        self.max_ops = max_ops
        self.ops = ops
        self.trainer: Trainer = trainer
        self.size = population
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        self.population: list[Individual] = [self._identity()]
        self.best: dict[int, Individual] = {}
        self.tries: dict[int, int] = {}
        self.evals = 0
        self.seconds = 0.0

    def settings(self) -> dict[str, object]:
        """What a saved state must agree on to be continued."""
        return {
            "function": self.problem.target.name,
            "domain": list(self.problem.domain),
            "error": self.problem.error,
            "max_ops": self.max_ops,
            "ops": list(self.ops),
            "trainer": self.trainer,
            "population": self.size,
            "seed": self.seed,
        }

    def compile(self) -> None:
        """Compile the evaluator, so that no budget is spent on that."""
        probe = Program([("/", (-1, 0)), ("+", (1, -1))])
        rng = np.random.default_rng(0)
        values, error = fit(self.problem, probe, None, rng, trainer="lm")
        if self.problem.error == "ulp32":
            fit_float32(self.problem, probe, values, rng, tries=1)
        _kernels.largest_errors(probe.encoded(), values[None], self.problem.x, self.problem.y, self.problem.scale)
        refine(self.problem, probe, values, error)

    def generation(self, children: int) -> None:
        """Make, fit and select; nothing is changed before the end."""
        rng = copy.deepcopy(self.rng)
        tries, best = dict[int, int](), dict(self.best)
        promising = self._promising()
        born = []
        for _ in range(children):
            program, start = self._child(rng, tries)
            individual = self._fitted(program, start, promising.get(program.ops, math.inf), rng)
            if not math.isfinite(individual.error):
                continue
            known = best.get(program.ops)
            if known is None or individual.error < self._worth_refining(individual) * known.error:
                individual = self._refined(individual, math.inf if known is None else known.error)
                if math.isfinite(individual.error) and (known is None or individual.error < known.error):
                    best[program.ops] = individual
            if math.isfinite(individual.error):
                born.append(individual)
        self.population = self._selected([*self.population, *born])
        for key, count in tries.items():
            self.tries[key] = self.tries.get(key, 0) + count
        self.best, self.rng = best, rng
        self.evals += children

    def front(self) -> ParetoFront:
        """The best programs so far."""
        shared = self.problem.target.name, self.problem.domain, self.problem.error
        items = [
            Approximation(i.program, tuple(map(float, i.coefficients)), i.error, *shared)
            for i in self.best.values()
            if i.program.ops
        ]
        return ParetoFront(pareto(items), self.evals, self.seconds, self.seed)

    def _identity(self) -> Individual:
        program = Program([])
        return Individual(program, np.zeros(0), self.problem.quick_error(program, np.zeros(0)))

    def _child(self, rng: np.random.Generator, tries: dict[int, int]) -> tuple[Program, np.ndarray | None]:
        """A mutated program, or the parent itself to be fitted again: half of them with the paper's trainer."""
        faithful = self.trainer == "cma"
        for _ in range(20):
            parent = self.population[int(rng.integers(len(self.population)))]
            program, values = parent.program, parent.coefficients
            again = parent.program.ops > 0 and rng.random() < (0.5 if faithful else 0.1)
            while not again:
                weights = PAPER_WEIGHTS if faithful else WEIGHTS
                program, values = mutate(program, values, rng, ops=self.ops, max_ops=self.max_ops, weights=weights)
                again = faithful or rng.random() > 0.25
            key = program.key
            count = self.tries.get(key, 0) + tries.get(key, 0)
            if count < _TRIES:
                break
        tries[key] = tries.get(key, 0) + 1
        return program, values

    def _promising(self) -> dict[int, float]:
        """For each number of operations the largest error that the population holds."""
        largest: dict[int, float] = {}
        for individual in self.population:
            ops = individual.program.ops
            largest[ops] = max(largest.get(ops, 0.0), individual.error)
        return largest

    def _fitted(
        self, program: Program, start: np.ndarray | None, promising: float, rng: np.random.Generator
    ) -> Individual:
        values, error = fit(self.problem, program, start, rng, trainer=self.trainer, promising=promising)
        if self.problem.error == "ulp32":
            if error < promising:
                values, error = fit_float32(self.problem, program, values, rng)
        elif error < max(promising, NOISE * self.problem.magnitude):
            error = self.problem.quick_error(program, values)
        return Individual(program, values, error)

    def _refined(self, individual: Individual, known: float) -> Individual:
        program, values = individual.program, individual.coefficients
        error = self.problem.max_error(program, values)
        if self.problem.error != "ulp32" and error < 2.5 * known:
            values, error = refine(self.problem, program, values, error)
        return Individual(program, values, error)

    def _worth_refining(self, individual: Individual) -> float:
        """A share of the known error: below the noise of float64 a fit is not at its best before it is refined."""
        deep = self.problem.error != "ulp32" and individual.error < NOISE * self.problem.magnitude
        return 2.0 if deep else 0.999

    def _selected(self, candidates: list[Individual]) -> list[Individual]:
        """NSGA-II on (log error, cost), among at most two structures of the same cost and the same three digits."""
        distinct: dict[Program, Individual] = {}
        for individual in candidates:
            other = distinct.get(individual.program)
            if other is None or individual.error < other.error:
                distinct[individual.program] = individual
        alike: dict[tuple[int, str], int] = {}
        kept = []
        for individual in sorted(distinct.values(), key=lambda i: (i.program.ops, i.error)):
            key = individual.program.ops, f"{individual.error:.2e}"
            alike[key] = alike.get(key, 0) + 1
            if alike[key] <= 2:
                kept.append(individual)
        objectives = np.array([[math.log(max(i.error, 1e-300)), i.program.cost] for i in kept])
        return [kept[k] for k in survivors(objectives, self.size)]


def operations(ops: str | Sequence[str]) -> tuple[str, ...]:
    """The operations that a text or a list names.

    Raises:
        ValueError: If one is unknown, or there is none of two operands.

    Example:
        >>> operations("+-*/ fma sqrt")
        ('+', '-', '*', '/', 'fma', 'sqrt')
    """
    names = re.findall(r"[+\-*/]|[^\s,+\-*/]+", ops) if isinstance(ops, str) else list(ops)
    for name in names:
        check_choice("ops", name, ARITY)
    if not any(ARITY[name] == 2 for name in names):
        raise ValueError(f"ops must hold one of + - * /, got {ops!r}")
    return tuple(dict.fromkeys(names))


def _run(search: Search, budget: float | None, max_evals: int | None, state: Path | None, progress: bool) -> bool:
    """Run generations until a limit is reached; returns False if Ctrl-C came before."""
    total = max_evals if max_evals is not None else budget
    unit = "fit" if max_evals is not None else "s"
    saved = time.monotonic()
    with tqdm(total=total, unit=unit, disable=not progress, bar_format=_BAR) as bar:
        try:
            while True:
                children = _CHILDREN if max_evals is None else min(_CHILDREN, max_evals - search.evals)
                if children <= 0 or (budget is not None and search.seconds >= budget):
                    break
                if children < _CHILDREN and state is not None:
                    save_state(state, search)  # before, so that a longer search can be continued from it
                start = time.process_time()
                search.generation(children)
                search.seconds += time.process_time() - start
                if state is not None and children == _CHILDREN and time.monotonic() - saved > _SAVE_EVERY:
                    save_state(state, search)
                    saved = time.monotonic()
                done = search.evals if max_evals is not None else min(search.seconds, budget or 0.0)
                bar.update(round(done - bar.n, 2))
                bar.set_postfix_str(_digits(search))
            whole = search.evals % _CHILDREN == 0
            if state is not None and whole:
                save_state(state, search)
        except KeyboardInterrupt:
            if state is not None and search.evals % _CHILDREN == 0:
                save_state(state, search)
            return False
    return True


_BAR = "{l_bar}{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}]{postfix}"


def _digits(search: Search) -> str:
    items = search.front().items[-3:]
    return ", ".join(f"{item.ops} ops {item.max_error:.1e}" for item in items)
