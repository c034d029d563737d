import subprocess
import sys

import pytest

from lightning_opt import __version__, registry
from lightning_opt.cli import main


def test_help_lists_every_command(capsys) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    registry.load_all()
    for name in ["fit", "validate", "test", "predict", *(command.name for command in registry.commands())]:
        assert f"\n  {name} " in text


def test_without_words_the_help_and_status_2(capsys) -> None:
    assert main([]) == 2
    assert "usage: lightning-opt" in capsys.readouterr().out


def test_version(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-opt {__version__}\n"


def test_an_unknown_command_offers_the_nearest(capsys) -> None:
    assert main(["recipe", "list"]) == 2
    assert "there is no command 'recipe'. Did you mean recipes?" in capsys.readouterr().err


def test_a_registered_command_gets_its_words_and_gives_the_status() -> None:
    seen: list[list[str]] = []

    def run(words: list[str]) -> int:
        seen.append(words)
        return 7

    registry.register_command("a-test-command", summary="for this test")(run)
    try:
        assert main(["a-test-command", "--x", "1"]) == 7
        assert seen == [["--x", "1"]]
    finally:
        del registry._commands["a-test-command"]


@pytest.mark.parametrize("words", [["fit", "--help"], ["test", "--help"]])
def test_help_of_a_subcommand(words: list[str], capsys) -> None:
    assert main(words) == 0
    text = capsys.readouterr().out
    for option in ("--optimizer", "--checkpoint.every_n_train_steps", "--test_after_fit", "--ckpt_path"):
        assert option in text


def test_print_config_shows_the_effective_config(capsys) -> None:
    assert main(["fit", "--optimizer=SGD", "--optimizer.lr=0.5", "--print_config"]) == 0
    text = capsys.readouterr().out
    assert "class_path: torch.optim.SGD" in text
    assert "lr: 0.5" in text


def test_debug_shows_the_traceback_of_a_mistake(monkeypatch, capsys) -> None:
    from lightning_opt.cli import UserError

    with pytest.raises(UserError):
        main(["fit", "--optimizer=AdaBelif", "--debug"])
    monkeypatch.setenv("LIGHTNING_OPT_DEBUG", "1")
    with pytest.raises(UserError):
        main(["fit", "--optimizer=AdaBelif"])
    monkeypatch.setenv("LIGHTNING_OPT_DEBUG", "0")
    assert main(["fit", "--optimizer=AdaBelif"]) == 2


def test_ctrl_c_outside_training(monkeypatch, capsys) -> None:
    def interrupt(words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_opt.cli.command._dispatch", interrupt)
    assert main(["recipes", "list"]) == 130
    assert capsys.readouterr().err == "lightning-opt: interrupted.\n"


def test_importing_the_command_and_listing_recipes_needs_no_torch() -> None:
    code = (
        "import sys; from lightning_opt.cli import main; assert main(['recipes', 'list']) == 0;"
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "digits/quickstart" in done.stdout


def test_python_m_gives_the_exit_status() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lightning_opt.cli", "recipes", "show", "nosuch"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("lightning-opt: no recipe is named 'nosuch'.")
    assert "Traceback" not in done.stderr
