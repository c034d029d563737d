"""The snippets of the README and the cards run, the generated tables are current, and every link leads somewhere."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch

from lightning_opt.cli import main
from lightning_opt.data.idx import write_idx

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs" / "methods").glob("*.md"))]
ADVICE = pytest.mark.filterwarnings("ignore")  # of Lightning to its users: a card may need it, the README must not
SNIPPETS = [
    pytest.param(snippet, id=f"{page}-{i}", marks=() if page == "README.md" else ADVICE)
    for page in PAGES
    for i, snippet in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))
]
COMMANDS = re.findall(r"^(lightning-opt .*)$", README, re.MULTILINE)


@pytest.fixture
def fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few images in the place of Fashion-MNIST."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "data" / "fashion-mnist"
    folder.mkdir(parents=True)
    for part, count in (("train", 300), ("t10k", 100)):
        images = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", torch.arange(count, dtype=torch.uint8) % 10)
    monkeypatch.setenv("LIGHTNING_OPT_DATA", str(tmp_path / "data"))


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_python_snippets_run(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "snippet", "exec"), {"__name__": "snippet"})


@pytest.mark.usefixtures("fashion_mnist")
@pytest.mark.filterwarnings("ignore")  # of very short runs
def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert any("--ckpt_path=last" in command for command in re.findall(r"`(lightning-opt [^`]*)`", README))
    for command in COMMANDS:
        words = shlex.split(command, comments=True)[1:]
        if words[0] == "fit":
            words += ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
            words += ["--trainer.enable_progress_bar=false"]
            if "fashion_mnist" in command:
                words += ["--data.verify=false", "--data.train_size=100", "--data.val_size=100"]
        assert main(words) == 0, command


def test_generated_tables_are_current() -> None:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "docs" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.render(README) == README, "run `make readme`"


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
