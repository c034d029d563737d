"""Methods by learning rates by seeds: what the benchmarks share that tune every method alike before they compare.

Five rates around a method's usual one run on seed 0; while the best is at an edge, one more there. The best and its
neighbors then run on all seeds, and of these three the rate with the best mean score is the method's.

A script names a run by a key: what is trained (one or more words), the number of the rate on the script's own ladder,
the seed. It keeps its finished runs as a dictionary from keys to rows, writes that to its result file after each run,
and reads it back when it starts, so that an interrupted script goes on where it was:

    rows = {("Adam", row["number"], row["seed"]): row for row in read_result("mine").get("runs", [])}
    search = RateSearch(rows, score=lambda row: row["val_accuracy"])
    with process_pool(2) as pool:
        run_all = partial(run_missing, pool, run, rows=rows, done=print_and_write)
        search.widen({("Adam",): -6}, run_all)
        search.confirm([("Adam",)], seeds=3, run_all=run_all)
    best = search.finished(("Adam",), seeds=3)  # three rows
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

Key = tuple[Any, ...]
Row = dict[str, Any]
RunAll = Callable[[list[Key]], None]


def process_pool(processes: int) -> ProcessPoolExecutor:
    """Processes that begin with nothing of this one, so that a run is the same in each of them."""
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"))


def run_missing(
    pool: Executor,
    run: Callable[..., Row],
    keys: Iterable[Key],
    *,
    rows: dict[Key, Row],
    done: Callable[[Row], None],
) -> None:
    """Call ``run(*key)`` in the pool for every key that has no row yet, and keep what it returns as the key's row.

    Args:
        pool: Where to run.
        run: One run; a function of the script's top level.
        keys: Runs that are wanted.
        rows: Finished runs by key; those that end are added.
        done: Called here with each new row, to print it and to write the file.
    """
    waiting = {pool.submit(run, *key): key for key in keys if key not in rows}
    for future in as_completed(waiting):
        row = rows[waiting[future]] = future.result()
        done(row)


@dataclass(frozen=True)
class RateSearch:
    """Finds the rate of each method among finished runs, and says which runs that needs.

    Attributes:
        rows: Finished runs by key, ``(*method, number, seed)``.
        score: What a run is judged by, on validation data: the larger the better, ``None`` if it diverged.
    """

    rows: dict[Key, Row]
    score: Callable[[Row], float | None]

    def widen(self, centres: Mapping[Key, int], run_all: RunAll) -> None:
        """Run five rates of each method on seed 0, and one more while the best is the smallest or the largest.

        Args:
            centres: For each method the number of its usual rate.
            run_all: Runs the keys that have no row.
        """
        wanted = [(*method, centre + step, 0) for method, centre in centres.items() for step in (-2, -1, 0, 1, 2)]
        while wanted:
            run_all(wanted)
            wanted = [(*method, number, 0) for method in centres for number in self._beyond_the_edge(method)]

    def confirm(self, methods: Iterable[Key], seeds: int, run_all: RunAll) -> None:
        """Run the best rate on seed 0 and its neighbors on all seeds."""
        run_all([key for method in methods for key in self._around_the_best(method, seeds)])

    def best(self, method: Key, seeds: int = 1) -> int:
        """The number of the rate with the best mean score among those that ran on so many seeds."""
        scores = {
            number: self._mean_score(method, number, seeds)
            for number in self.numbers(method)
            if all((*method, number, seed) in self.rows for seed in range(seeds))
        }
        return max(scores, key=lambda number: scores[number])

    def finished(self, method: Key, seeds: int) -> list[Row] | None:
        """The rows of the method's own rate, one a seed; ``None`` if some of its runs are missing."""
        if not any((*method, number, 0) in self.rows for number in self.numbers(method)):
            return None
        if any(key not in self.rows for key in self._around_the_best(method, seeds)):
            return None
        number = self.best(method, seeds)
        return [self.rows[*method, number, seed] for seed in range(seeds)]

    def numbers(self, method: Key) -> list[int]:
        """The rates that ran on any seed, in order."""
        return sorted({key[-2] for key in self.rows if key[:-2] == method})

    def _mean_score(self, method: Key, number: int, seeds: int) -> float:
        scores = [self.score(self.rows[*method, number, seed]) for seed in range(seeds)]
        return -math.inf if None in scores else statistics.mean(scores)

    def _beyond_the_edge(self, method: Key) -> list[int]:
        numbers = [number for number in self.numbers(method) if (*method, number, 0) in self.rows]
        best = self.best(method)
        return [best - 1] if best == numbers[0] else [best + 1] if best == numbers[-1] else []

    def _around_the_best(self, method: Key, seeds: int) -> list[Key]:
        best = self.best(method)
        return [(*method, number, seed) for number in (best, best - 1, best + 1) for seed in range(seeds)]


def rate_1_3_10(number: int, factor: float = 1.0) -> float:
    """The ladder ..., 0.1, 0.3, 1, 3, 10, ... by number, 0 for 1; times a factor.

    Example:
        >>> [rate_1_3_10(number) for number in (-3, -2, 0, 1)]
        [0.03, 0.1, 1.0, 3.0]
    """
    return float(f"{factor * (3 if number % 2 else 1) * 10.0 ** (number // 2):.1g}")


def paired_verdict(ours: Sequence[float], theirs: Sequence[float], *, larger_is_better: bool) -> dict[str, Any]:
    """The mean difference of two methods' scores, paired by seed, its standard error, and what to call it.

    Within one standard error it is a tie.

    Example:
        >>> paired_verdict([0.9, 0.8], [0.7, 0.6], larger_is_better=True)["verdict"]
        'better'
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    word = "tie" if abs(mean) <= error else "better" if (mean > 0) == larger_is_better else "worse"
    return {"difference": mean, "standard_error": error, "verdict": word}


def whole_splits(module: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and targets of all of a data module's ``"train"``, ``"val"`` and ``"test"``, as tensors."""
    module.prepare_data()
    module.setup()
    splits = {"train": module.train_set, "val": module.val_set, "test": module.test_set}
    return {name: split.__getitems__(range(len(split))) for name, split in splits.items() if split is not None}


@torch.no_grad()
def loss_and_accuracy(net: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of a classifier, which is set to evaluation."""
    logits = net.eval()(inputs)
    loss = nn.functional.cross_entropy(logits, labels)
    return loss.item(), (logits.argmax(dim=1) == labels).float().mean().item()
