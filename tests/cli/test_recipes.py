import pytest

from lightning_opt.cli import main
from lightning_opt.cli.recipes import FOLDER, HEADER_KEYS, recipe_header, recipe_names, recipe_runs, recipe_table


def test_list_shows_every_recipe_with_its_header(capsys) -> None:
    assert main(["recipes", "list"]) == 0
    text = capsys.readouterr().out
    assert text.split("\n")[0].split() == ["name", "method", "data", "shows", "result", "minutes"]
    for name in recipe_names():
        assert name in text
        assert recipe_header(FOLDER / f"{name}.yaml")["method"] in text


@pytest.mark.parametrize("width", [140, 160, 400])  # the columns that are not prose take 77
def test_the_table_fits_the_terminal_and_loses_no_word(width: int) -> None:
    lines = recipe_table(width).splitlines()
    assert max(map(len, lines)) <= width
    for name in recipe_names():
        for word in recipe_header(FOLDER / f"{name}.yaml")["shows"].split():
            assert any(word in line for line in lines)


def test_show_prints_the_file(capsys) -> None:
    assert main(["recipes", "show", "digits/quickstart"]) == 0
    assert capsys.readouterr().out == (FOLDER / "digits/quickstart.yaml").read_text()


def test_copy_runs_as_its_command_line_says(workdir, capsys) -> None:
    assert main(["recipes", "copy", "digits/quickstart", "own.yaml"]) == 0
    header = recipe_header(workdir / "own.yaml")
    assert set(header) == set(HEADER_KEYS)
    assert header["command"] == "lightning-opt fit --config ./own.yaml"
    assert header["command"] in capsys.readouterr().out
    quick = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main([*header["command"].split()[1:], *quick]) == 0


def test_copy_into_a_folder_keeps_the_file_name(workdir) -> None:
    (workdir / "mine").mkdir()
    assert main(["recipes", "copy", "digits/quickstart", "mine"]) == 0
    assert recipe_header(workdir / "mine/quickstart.yaml")["command"].endswith("--config ./mine/quickstart.yaml")


def test_copy_overwrites_only_with_force(workdir, capsys) -> None:
    (workdir / "own.yaml").write_text("mine")
    assert main(["recipes", "copy", "digits/quickstart", "own.yaml"]) == 2
    assert "own.yaml exists; --force overwrites it" in capsys.readouterr().err
    assert (workdir / "own.yaml").read_text() == "mine"
    assert main(["recipes", "copy", "digits/quickstart", "own.yaml", "--force"]) == 0
    assert (workdir / "own.yaml").read_text() != "mine"


@pytest.mark.parametrize("words", [["show", "digits/quickstrt"], ["copy", "digits/quickstrt", "x.yaml"]])
def test_a_misspelt_name_offers_the_nearest(words: list[str], capsys) -> None:
    assert main(["recipes", *words]) == 2
    assert "Did you mean digits/quickstart?" in capsys.readouterr().err


def test_a_destination_that_cannot_be_written(workdir, capsys) -> None:
    (workdir / "file").touch()
    assert main(["recipes", "copy", "digits/quickstart", "file/own.yaml"]) == 2
    assert "cannot write file/own.yaml: Not a directory" in capsys.readouterr().err


TWO = "fashion_mnist/refined_schedule"


def test_a_recipe_of_several_runs_is_shown_in_order(capsys) -> None:
    assert recipe_runs(TWO) == [f"{TWO}/1_record", f"{TWO}/2_refined"]
    assert recipe_runs("digits/quickstart") == ["digits/quickstart"]
    assert recipe_runs("fashion_mnist") == ["fashion_mnist"]  # a folder, but not of numbered files
    assert main(["recipes", "show", TWO]) == 0
    shown = capsys.readouterr().out
    assert shown == "\n".join((FOLDER / f"{run}.yaml").read_text() for run in recipe_runs(TWO))


def test_copies_of_several_runs_keep_what_comes_before_each_fit(workdir, capsys) -> None:
    assert main(["recipes", "copy", TWO, "mine"]) == 0
    assert {path.name for path in (workdir / "mine").iterdir()} == {"1_record.yaml", "2_refined.yaml"}
    command = recipe_header(workdir / "mine/2_refined.yaml")["command"]
    refine, fit = command.split(" && ")
    assert refine == f"lightning-opt refine runs/{TWO}/1_record --out runs/{TWO}"
    assert fit == "lightning-opt fit --config ./mine/2_refined.yaml"
    assert command in capsys.readouterr().out
    assert main(["recipes", "copy", TWO, "mine"]) == 2
    (workdir / "file").touch()
    assert main(["recipes", "copy", TWO, "file"]) == 2
    assert "cannot make the folder file" in capsys.readouterr().err


def test_several_runs_are_not_one_config(capsys) -> None:
    assert main(["fit", f"--config={TWO}"]) == 2
    assert f"is a recipe of 2 runs; do them in this order: {TWO}/1_record, {TWO}/2_refined" in capsys.readouterr().err
    assert main(["recipes", "show", "fashion_mnist/refined_schedul"]) == 2
    assert f"Did you mean {TWO}" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["lst"], ["show"]])
def test_wrong_words_get_usage_and_status_2(words: list[str], capsys) -> None:
    assert main(["recipes", *words]) == 2
    assert "usage: lightning-opt recipes" in capsys.readouterr().err
