import pytest

from lightning_opt.cli.arguments import arrange, chosen_classes, load_config, without
from lightning_opt.cli.errors import UserError
from lightning_opt.cli.recipes import FOLDER

DEFAULT = f"--config={FOLDER / 'digits/quickstart.yaml'}"


def test_the_default_recipe_is_the_base() -> None:
    assert arrange(["--optimizer.lr=1"], {}) == ([DEFAULT, "--optimizer.lr=1"], "digits/quickstart")


def test_configs_come_first_in_their_order_and_may_be_files_or_recipes(tmp_path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("optimizer: SGD\n")
    words, recipe = arrange(["--seed_everything", "3", "-c", "digits/quickstart", "--config", str(own)], {})
    assert words == [DEFAULT, f"--config={own}", "--seed_everything", "3"]
    assert recipe == "digits/quickstart"
    assert arrange([f"--config={own}"], {})[1] is None


def test_a_file_wins_over_a_recipe_of_the_same_name(tmp_path, monkeypatch) -> None:
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "quickstart").write_text("seed_everything: 1\n")
    monkeypatch.chdir(tmp_path)
    assert arrange(["--config=digits/quickstart"], {}) == (["--config=digits/quickstart"], None)


def test_a_class_comes_before_its_arguments_however_deep() -> None:
    typed = ["--model.net.hidden=[8]", "--optimizer.lr", "-1", "--model.net=MLP", "--trainer.max_epochs=3"]
    words, _ = arrange([*typed, "--optimizer", "SGD", "--model=Classifier"], {})
    assert words[1] == "--trainer.max_epochs=3"
    assert words.index("--optimizer") < words.index("--optimizer.lr")
    assert words.index("--model=Classifier") < words.index("--model.net=MLP") < words.index("--model.net.hidden=[8]")
    assert words[words.index("--optimizer.lr") + 1] == "-1"


def test_arguments_of_appended_callbacks_stay_behind_their_callback() -> None:
    typed = ["--trainer.callbacks+=A", "--trainer.callbacks.x=1", "--trainer.callbacks+=B", "--trainer.callbacks.x=2"]
    assert arrange(typed, {})[0][1:] == typed


def test_short_names_become_full_paths_only_where_a_class_is_asked_for() -> None:
    words, _ = arrange(["--optimizer=Lion", "--name=Lion", "--trainer.callbacks+=Lion"], {"Lion": "package.Lion"})
    assert words[1:] == ["--name=Lion", "--trainer.callbacks+=package.Lion", "--optimizer=package.Lion"]


def test_chosen_classes_and_without() -> None:
    words = ["--optimizer=SGD", "--ckpt_path", "last", "--optimizer.lr=1", "--data", "Digits"]
    assert chosen_classes(words) == {"optimizer": "SGD", "data": "Digits"}
    assert without(words, "--ckpt_path") == ["--optimizer=SGD", "--optimizer.lr=1", "--data", "Digits"]


@pytest.mark.parametrize(
    ("content", "message"), [("a: [1\nb", "cannot be read as YAML"), ("[1, 2]", "must map options")]
)
def test_a_config_that_is_no_config(tmp_path, content: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        arrange([f"--config={path}"], {})
    assert str(path) in str(caught.value)


def test_an_empty_config_is_empty(tmp_path) -> None:
    (tmp_path / "own.yaml").touch()
    assert load_config(tmp_path / "own.yaml") == {}


@pytest.mark.parametrize("name", ["digits/quikstart", "quickstrt", "digit/quickstart"])
def test_a_misspelt_recipe_offers_the_nearest(name: str) -> None:
    with pytest.raises(UserError, match=r"Did you mean digits/quickstart\?.*recipes list"):
        arrange(["--config", name], {})
