"""The Python snippets of the optimizers' cards run."""

import re
from pathlib import Path

import lightning.pytorch  # noqa: F401  sets environment variables when it is imported, as scikit-learn does
import pytest
import sklearn.datasets  # noqa: F401

CARDS = Path(__file__).parents[2] / "docs" / "methods"
SNIPPETS = [
    pytest.param(code, id=f"{card}-{i}")
    for card in ("adabelief", "diffgrad", "lion", "exponentiated-gradient")
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", (CARDS / f"{card}.md").read_text(), re.DOTALL))
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's advice on loggers and checkpoint folders
@pytest.mark.parametrize("code", SNIPPETS)
def test_python_snippets_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "card", "exec"), {"__name__": "card"})
