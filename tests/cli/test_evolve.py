"""``lightning-opt evolve``: search, stop, continue."""

import json
from pathlib import Path

import pytest

from lightning_opt.cli import main
from lightning_opt.solvers.autonumerics import ParetoFront
from lightning_opt.solvers.autonumerics.search import Search

QUICK = ["--max-ops=4", "--max-evals=96", "--quiet"]


def test_a_search_writes_front_picture_and_state(workdir: Path, capsys):
    assert main(["evolve", "--function=exp2", "--domain", "0", "1", "--out=found.json", *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "96 programs fitted" in printed
    assert "minimax rational" in printed
    assert "def exp2_" in printed
    front = ParetoFront.load("found.json")
    assert front.evals == 96
    assert front[0].domain == (0.0, 1.0)
    assert (workdir / "found.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in workdir.iterdir()} == {"found.json", "found.png", "found.state.npz"}


def test_a_stopped_search_keeps_what_it_found_and_goes_on(workdir: Path, monkeypatch, capsys):
    assert main(["evolve", "--out=whole.json", *QUICK]) == 0
    generation = Search.generation

    def stopping(search: Search, children: int) -> None:
        if search.evals == 64:
            raise KeyboardInterrupt
        generation(search, children)

    monkeypatch.setattr(Search, "generation", stopping)
    assert main(["evolve", "--out=part.json", *QUICK]) == 130
    assert ParetoFront.load("part.json").evals == 64
    monkeypatch.setattr(Search, "generation", generation)
    assert main(["evolve", "--out=part.json", *QUICK]) == 0
    part, whole = (json.loads((workdir / f"{name}.json").read_text()) for name in ("part", "whole"))
    assert part["items"] == whole["items"]


def test_the_functions_of_a_user(workdir: Path, capsys):
    (workdir / "my_functions.py").write_text(
        "import numpy as np\n\n\ndef softplus(x):\n    return np.log1p(np.exp(x))\n"
    )
    assert main(["evolve", "--function=my_functions:softplus", "--out=module.json", *QUICK]) == 0
    assert main(["evolve", "--function=log(1 + exp(x))", "--out=expression.json", *QUICK]) == 0
    module, expression = ParetoFront.load("module.json"), ParetoFront.load("expression.json")
    assert module[-1].max_error == pytest.approx(expression[-1].max_error, rel=1e-2)
    assert "def log_1_exp_x_" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-ops=0"], "max_ops must be in [1, 100], got 0."),
        (["--budget=0"], "budget_s must be > 0"),
        (["--function=log2", "--domain", "0", "1"], "log2 must be finite on the domain [0, 1]; it is not at x = 0."),
        (["--domain", "1", "0"], "domain must be two finite numbers, the lower first; got (1.0, 0.0)."),
        (["--function=expp2"], "Did you mean 'exp2'?"),
        (["--ops=^"], "ops must be one of"),
        (["--out=no/such/folder.json"], "there is no folder no/such for --out."),
    ],
)
def test_mistakes_get_one_message(words, message, capsys, workdir: Path):
    assert main(["evolve", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(workdir.iterdir())


def test_files_of_another_search_are_not_overwritten(workdir: Path, capsys):
    (workdir / "front.json").write_text("mine")
    assert main(["evolve", *QUICK]) == 2
    assert "front.json exists; --force overwrites it." in capsys.readouterr().err
    assert main(["evolve", *QUICK, "--force"]) == 0
    assert main(["evolve", *QUICK, "--seed=1"]) == 2
    assert "is of another search (seed: 0 there, 1 now). --force starts anew." in capsys.readouterr().err
    assert main(["evolve", *QUICK, "--seed=1", "--force"]) == 0
    assert ParetoFront.load("front.json").seed == 1


@pytest.mark.parametrize("name", ["front.png", "front.npz", "."])
def test_out_that_is_a_folder_or_the_picture_or_the_state_is_refused(name, tmp_path, capsys):
    assert main(["evolve", "--max-evals", "32", "--force", "--out", str(tmp_path / name)]) == 2
    assert "must be a file for the front" in capsys.readouterr().err
