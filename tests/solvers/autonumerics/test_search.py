"""The search: how good, reproducible, resumable; and what a front offers."""

import importlib.util
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_opt.solvers.autonumerics import Approximation, ParetoFront, Program, evolve
from lightning_opt.solvers.autonumerics.front import pareto
from lightning_opt.solvers.autonumerics.search import Search, operations


@pytest.fixture(scope="module")
def front() -> ParetoFront:
    return evolve("exp2", max_ops=5, max_evals=2000, budget_s=None)


def test_a_short_search_is_better_than_polynomials_and_quotients(front):
    """4 operations: 3e-4, where the best polynomial has 1.7e-3 and the best quotient (3 operations) 8.7e-4."""
    assert front.evals == 2000
    assert front.best(4).max_error <= 3e-4
    assert front.best(3).max_error == pytest.approx(8.672e-4, rel=1e-3)  # the quotient of degrees 1/1
    assert [item.ops for item in front] == sorted({item.ops for item in front})
    assert all(a.max_error > b.max_error for a, b in zip(front, front[1:], strict=False))


def test_the_stated_errors_hold_between_the_points(front):
    x = np.random.default_rng(0).uniform(0, 1, 20_000)
    for item in front:
        errors = np.abs(item(x) / np.exp2(x) - 1)
        assert errors.max() <= item.max_error * (1 + 1e-6)
        assert errors.max() > 0.98 * item.max_error


def test_a_seed_and_a_number_of_fits_decide_the_result():
    settings = {"max_ops": 6, "max_evals": 100, "budget_s": None, "seed": 3}
    state = np.random.get_state()[1].copy()
    one, other = evolve("exp2", **settings), evolve("exp2", **settings)
    assert (np.random.get_state()[1] == state).all()
    assert one.items == other.items
    assert evolve("exp2", **{**settings, "seed": 4}).items != one.items


@pytest.mark.parametrize("how", ["killed", "Ctrl-C"])
def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch, how):
    settings = {"max_ops": 6, "max_evals": 170, "budget_s": None, "seed": 1}
    whole = evolve("exp2", **settings)
    generation, count = Search.generation, 0
    monkeypatch.setattr("lightning_opt.solvers.autonumerics.search._SAVE_EVERY", 0.0)

    def stopping(search: Search, children: int) -> None:
        nonlocal count
        count += 1
        if count == 4:  # within the generation: random numbers are drawn, fits are made
            search_fit, fits = search._fitted, 0

            def fitted(*arguments):
                nonlocal fits
                fits += 1
                if fits == 7:
                    raise KeyboardInterrupt if how == "Ctrl-C" else SystemExit
                return search_fit(*arguments)

            search._fitted = fitted
        generation(search, children)

    monkeypatch.setattr(Search, "generation", stopping)
    state = tmp_path / "state.npz"
    if how == "killed":
        with pytest.raises(SystemExit):
            evolve("exp2", **settings, state=state)
    else:
        part = evolve("exp2", **settings, state=state)
        assert part.interrupted
        assert part.evals == 3 * 32
        assert len(part) > 1
    monkeypatch.setattr(Search, "generation", generation)
    resumed = evolve("exp2", **settings, state=state)
    assert not resumed.interrupted
    assert resumed.items == whole.items
    assert resumed.evals == whole.evals == 170
    longer = evolve("exp2", **{**settings, "max_evals": 200}, state=state)
    assert longer.items == evolve("exp2", **{**settings, "max_evals": 200}).items


def test_a_state_of_another_search_is_refused(tmp_path: Path):
    state = tmp_path / "state.npz"
    evolve("exp2", max_ops=4, max_evals=32, budget_s=None, state=state)
    with pytest.raises(ValueError, match=r"is of another search \(max_ops: 4 there, 5 now\)"):
        evolve("exp2", max_ops=5, max_evals=64, budget_s=None, state=state)
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match="is no state of a search"):
        evolve("exp2", max_ops=4, max_evals=64, budget_s=None, state=state)


def test_the_budget_ends_a_search():
    start = time.process_time()
    front = evolve("exp2", max_ops=4, budget_s=0.2)
    assert front.evals % 32 == 0
    assert 0.2 <= front.seconds < 5  # one generation more at the most
    assert time.process_time() - start < 60


def test_other_operations_and_measures():
    front = evolve("exp2", (-0.5, 0.5), max_ops=3, error="ulp32", ops="+-* fma", max_evals=600, budget_s=None)
    assert {step.op for item in front for step in item.program.steps} <= {"+", "-", "*", "fma"}
    assert front.best(3).max_error < 2**24 * 2e-3  # the spacing of float32 is 2^-24 below 1
    item = front.best(3)
    x = np.random.default_rng(0).uniform(-0.5, 0.5, 5000).astype(np.float32)
    ulps = np.abs(item(x).astype(np.float64) - np.exp2(x.astype(np.float64))) / np.spacing(np.exp2(x))
    assert ulps.max() <= item.max_error * 1.01
    assert item(x).dtype == np.float32


def test_the_paper_trainer_runs():
    front = evolve("exp2", max_ops=2, trainer="cma", max_evals=3, budget_s=None)
    assert front.evals == 3


def test_a_user_function_is_approximated():
    front = evolve(lambda x: np.log1p(x) / (1 + x), (0.5, 2.0), max_ops=4, max_evals=200, budget_s=None)
    assert front.best(4).max_error < 0.01


@pytest.mark.parametrize("ops", [2, 3, 4, 5])
def test_exported_python_computes_the_same(front, ops):
    item = front.best(ops)
    space = {}
    exec(item.to_python("f"), space)
    x = np.linspace(0.01, 1, 50)
    assert np.array_equal(space["f"](x), item(x))
    by_torch = space["f"](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(by_torch, item(x), rtol=1e-14)  # it divides a number by a tensor through 1 / tensor
    assert space["f"](0.25) == item(0.25)
    assert f"{item.max_error:.3g}" in space["f"].__doc__


EVERY_OPERATION = [("/", (-1, 0)), ("fma", (1, 0, -1)), ("sqrt", (2,)), ("-", (-1, 3)), ("*", (4, 0)), ("+", (5, -1))]


@pytest.mark.parametrize(
    ("steps", "tolerance"),
    [
        ([("/", (-1, 0)), ("+", (1, -1)), ("sqrt", (2,)), ("-", (-1, 3)), ("*", (4, 0)), ("+", (5, -1))], 0),
        (EVERY_OPERATION, 2e-7),  # the interpreter's fma rounds twice: one unit in the last place of 1.2e-7 more
    ],
)
def test_exported_triton_computes_the_same(steps, tolerance, tmp_path: Path):
    """In float32, in the interpreter, which rounds as numpy does; on a GPU a product and a sum may become one fma."""
    values = tuple(map(float, np.float32([1.1, 2.2, 3.3, 4.4])))
    item = Approximation(Program(steps), values, 1.0, "exp2", (0.0, 1.0), "absolute")
    kernel = (
        "\n\n@triton.jit\ndef kernel(source, target, n: tl.constexpr):\n"
        "    i = tl.arange(0, n)\n    tl.store(target + i, approximation(tl.load(source + i)))\n"
    )
    path = tmp_path / "exported.py"
    path.write_text(item.to_triton("approximation") + kernel)
    spec = importlib.util.spec_from_file_location("exported", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.linspace(0.1, 1, 64)
    out = torch.empty(64, device=device)
    module.kernel[(1,)](x.to(device), out, n=64)
    expected = item(x.numpy())
    assert expected.dtype == np.float32
    np.testing.assert_allclose(out.cpu().numpy(), expected, rtol=tolerance if device == "cpu" else 1e-6)


def test_a_front_is_saved_and_loaded(front, tmp_path: Path):
    front.save(tmp_path / "front.json")
    loaded = ParetoFront.load(tmp_path / "front.json")
    assert loaded.items == front.items
    assert loaded[0].coefficients == front[0].coefficients
    (tmp_path / "other.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="has format 99"):
        ParetoFront.load(tmp_path / "other.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="is no saved front"):
        ParetoFront.load(tmp_path / "other.json")


def test_a_front_holds_no_program_that_another_beats():
    def item(ops: int, error: float) -> Approximation:
        program = Program([("+", (0, -1))] + [("*", (k, -1)) for k in range(1, ops)])
        return Approximation(program, (1.0,) * ops, error, "f", (0.0, 1.0), "absolute")

    found = pareto([item(3, 0.5), item(1, 1.0), item(2, 0.5), item(4, 0.1), item(4, 0.2), item(5, math.inf)])
    assert [(i.ops, i.max_error) for i in found] == [(1, 1.0), (2, 0.5), (4, 0.1)]
    front = ParetoFront(found, 1, 1.0, 0)
    assert front.best(3).ops == 2
    with pytest.raises(ValueError, match="max_ops must be >= 1"):
        front.best(0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_ops": 0}, r"max_ops must be in \[1, 100\], got 0"),
        ({"budget_s": 0}, "budget_s must be > 0"),
        ({"budget_s": -1.0}, "budget_s must be > 0"),
        ({"budget_s": None}, "budget_s or max_evals must be given"),
        ({"max_evals": 0}, "max_evals must be >= 1"),
        ({"population": 1}, "population must be >= 2"),
        ({"trainer": "adam"}, "trainer must be one of 'lm', 'cma'"),
        ({"ops": "+^"}, "ops must be one of"),
        ({"ops": "sqrt"}, r"ops must hold one of \+ - \* /"),
        ({"error": "ulp"}, "error must be one of"),
        ({"domain": (1.0, 0.0)}, "domain must be two finite numbers"),
        ({"fn": "log2", "domain": (0.0, 1.0)}, "must be finite on the domain"),
    ],
)
def test_wrong_arguments_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        evolve(**{"fn": "exp2", **settings})


def test_operations_are_read_from_texts_and_lists():
    assert operations("+-*/") == ("+", "-", "*", "/")
    assert operations(["+", "fma"]) == ("+", "fma")
    assert operations("fma,+ +") == ("fma", "+")
