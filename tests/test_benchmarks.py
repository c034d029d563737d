"""What the benchmarks share, and that finished runs on file are recognised and give the committed summaries."""

import importlib
import json
import logging
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TUNED = ("optimizers", "schedules", "lanczos_lr", "adaptive_batch_size", "neural_ode")  # that tune over seeds


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a file of the benchmarks, whose folder is on the path only while the test runs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.fixture
def grid(load) -> ModuleType:
    return load("_grid")


class Runs:
    """Scores by a function of number and seed; counts what ran."""

    def __init__(self, grid: ModuleType, score: Callable[[int, int], float | None]) -> None:
        self.rows: dict = {}
        self.ran: list = []
        self.search = grid.RateSearch(self.rows, score=lambda row: row["score"])

        def run(name: str, number: int, seed: int) -> dict:
            self.ran.append((name, number, seed))
            return {"score": score(number, seed), "key": (name, number, seed)}

        def run_all(keys: list) -> None:
            with ThreadPoolExecutor(2) as pool:
                grid.run_missing(pool, run, keys, rows=self.rows, done=lambda row: None)

        self.run_all = run_all


@pytest.mark.parametrize(
    ("peak", "ran"), [(0, [-2, -1, 0, 1, 2]), (1, [-2, -1, 0, 1, 2]), (4, [-2, -1, 0, 1, 2, 3, 4, 5])]
)
def test_rates_are_tried_until_the_best_is_inside(grid, peak: int, ran: list[int]) -> None:
    runs = Runs(grid, lambda number, seed: -abs(number - peak))
    runs.search.widen({("m",): 0}, runs.run_all)
    assert sorted(runs.ran) == [("m", number, 0) for number in ran]
    assert runs.search.best(("m",)) == peak
    assert runs.search.finished(("m",), 3) is None


def test_the_rate_is_chosen_on_all_seeds_from_three(grid) -> None:
    """On seed 0 it is 0, on the others 1; 2 would be better still and is no neighbor."""
    scores = {-1: (0, 0, 0), 0: (9, 1, 1), 1: (8, 4, 4), 2: (7, 9, 9)}
    runs = Runs(grid, lambda number, seed: float(scores[number][seed]) if number in scores else None)
    runs.search.widen({("m",): 0}, runs.run_all)
    runs.search.confirm([("m",)], 3, runs.run_all)
    assert sorted(runs.ran) == sorted(
        [("m", n, 0) for n in (-2, 2)] + [("m", n, s) for n in (-1, 0, 1) for s in range(3)]
    )
    rows = runs.search.finished(("m",), 3)
    assert rows is not None
    assert [row["key"] for row in rows] == [("m", 1, seed) for seed in range(3)]
    del runs.rows["m", -1, 2]
    assert runs.search.finished(("m",), 3) is None


def test_a_run_that_diverged_is_the_worst_whatever_its_other_seeds(grid) -> None:
    runs = Runs(grid, lambda number, seed: None if number == 1 and seed == 1 else -abs(number - 0.6))
    runs.search.widen({("m",): 0}, runs.run_all)
    assert runs.search.best(("m",)) == 1
    runs.search.confirm([("m",)], 2, runs.run_all)
    assert runs.search.best(("m",), 2) == 0


def test_what_is_on_file_does_not_run_again_and_each_row_is_kept_at_once(grid) -> None:
    rows, seen, ran = {("a", 0): {"old": True}}, [], []

    def run(name: str, seed: int) -> dict:
        ran.append((name, seed))
        if seed == 2:
            raise RuntimeError("the machine goes down")
        return {"name": name, "seed": seed}

    def done(row: dict) -> None:
        seen.append(dict(rows))

    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="goes down"):
        grid.run_missing(pool, run, [("a", 0), ("a", 1), ("a", 2)], rows=rows, done=done)
    assert ran == [("a", 1), ("a", 2)]
    assert rows == {("a", 0): {"old": True}, ("a", 1): {"name": "a", "seed": 1}}
    assert all(state == rows for state in seen)


def test_verdicts_and_the_ladder(grid) -> None:
    better = grid.paired_verdict([3.0, 5.0], [1.0, 2.0], larger_is_better=True)
    assert better == {"difference": 2.5, "standard_error": pytest.approx(0.5), "verdict": "better"}
    assert grid.paired_verdict([3.0, 5.0], [1.0, 2.0], larger_is_better=False)["verdict"] == "worse"
    assert grid.paired_verdict([1.0, 2.0], [3.0, 5.0], larger_is_better=False)["verdict"] == "better"
    assert grid.paired_verdict([1.0, 2.0], [2.0, 1.0], larger_is_better=True)["verdict"] == "tie"
    assert [grid.rate_1_3_10(n, 2) for n in (-4, -3, 0, 1)] == [0.02, 0.06, 2.0, 6.0]


@pytest.mark.parametrize("name", [name for name in TUNED if (BENCHMARKS / "results" / f"{name}.json").exists()])
def test_finished_runs_are_recognised_and_give_the_committed_summary(name: str, load) -> None:
    committed, script = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text()), load(name)
    found = script.on_file()
    rows = found if name != "lanczos_lr" else {tuple(list(r.values())[:4]): r for r in found["runs"]}
    assert list(rows.values()) == committed["runs"]
    summary = script.summary(rows)
    assert json.loads(json.dumps(summary if name == "schedules" else {"results": summary})) == {
        key: committed[key] for key in ("results", "mean_ranks") if key in committed
    }


def test_the_front_of_batch_sizes_reads_what_it_writes(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("adaptive_batch_size")
    monkeypatch.setattr(load("_runner"), "RESULTS", tmp_path)
    generator = random.Random(0)
    rows = {}

    def run(method: str, number: int, seed: int) -> dict:
        accuracy = 0.9 - 0.01 * abs(number + 3) + 0.001 * generator.random()
        row = {
            "method": method,
            "number": number,
            "lr": script.rate_1_3_10(number),
            "seed": seed,
            "steps": 100,
            "seconds": 1.0,
        }
        return {**row, "val_accuracy": accuracy, "test_accuracy": accuracy, "last_batch": 32, "train_loss": None}

    with ThreadPoolExecutor(1) as pool:
        run_all = partial(load("_grid").run_missing, pool, run, rows=rows, done=lambda row: script.write(rows))
        script.search(rows).widen({(method,): usual for method, (_, _, usual) in script.METHODS.items()}, run_all)
        script.search(rows).confirm([(method,) for method in script.METHODS], 3, run_all)
    assert script.on_file() == rows
    written = json.loads((tmp_path / "adaptive_batch_size.json").read_text())
    assert list(written["results"]) == list(script.METHODS)
    assert {r["lr"] for r in written["results"].values()} == {0.03}
    assert "verdict" in written["results"]["eta 1"]["beside"]
    monkeypatch.setitem(script.SETTINGS, "epochs", 11)  # a setting that changes voids the runs
    assert script.on_file() == {}


def test_a_callback_is_timed_beside_fits_without_it(load, caplog: pytest.LogCaptureFixture) -> None:
    """The clock covers the steps that it says; every fit runs once untimed and then once a round."""
    caplog.set_level(logging.INFO, logger="lightning.pytorch")  # puts back what quiet_trainer changes
    fits = load("_fits")
    from lightning_opt.data import Digits
    from lightning_opt.models import MLP, Classifier

    calls = []

    class Model(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    def fit(name: str, clock) -> None:
        trainer = fits.quiet_trainer(max_steps=clock.last + 1, callbacks=[clock])
        trainer.fit(Model(MLP(64, (4,))), Digits(batch_size=8))
        calls.append((name, clock.wall, clock.cpu))

    times = fits.paired_fits({"a": partial(fit, "a"), "b": partial(fit, "b")}, 2, warmup=1, steps=2)
    assert [name for name, _, _ in calls] == ["b", "a", "a", "b", "b", "a"]
    for name in "ab":
        assert times["wall"][name] == [wall for n, wall, _ in calls[2:] if n == name]
        assert times["cpu"][name] == [cpu for n, _, cpu in calls[2:] if n == name]
        assert all(0 < wall < 10 for wall in times["wall"][name])
