"""Private attributes of Lightning are touched in ``lightning_opt/_lightning/`` alone."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import lightning
import pytest

import lightning_opt

PACKAGE = Path(lightning_opt.__file__).parent
LIGHTNING = Path(lightning.__file__).parent


def violations(path: Path) -> list[str]:
    """Where a file reaches for something private that is neither its own nor of another library: ``line: code``."""
    tree = ast.parse(path.read_text())
    own, imported = names_defined(tree), names_imported_from_elsewhere(tree)

    def is_foreign(attribute: str, owner: ast.expr) -> bool:
        """Whether ``owner.attribute`` may be Lightning's."""
        if not is_private(attribute):
            return False
        if is_self(owner):  # what is inherited from torch may be used, what is inherited from Lightning may not
            return attribute in names_in_lightning() and attribute not in own
        if chain_start(owner) in imported:
            return False
        return attribute in names_in_lightning() or attribute not in own

    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning":
            bad = any(map(is_private, [*node.module.split("."), *(alias.name for alias in node.names)]))
        elif isinstance(node, ast.Attribute):
            bad = is_foreign(node.attr, node.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            name = node.args[1]
            bad = isinstance(name, ast.Constant) and is_foreign(name.value, node.args[0])
        else:
            continue
        if bad:
            found.append((node.lineno, ast.unparse(node)))
    return [f"{line}: {code}" for line, code in sorted(found)]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_self(owner: ast.expr) -> bool:
    return ast.unparse(owner) in ("self", "cls", "super()")


def chain_start(owner: ast.expr) -> str | None:
    """``torch`` for ``torch.nn.init``; None for what is not a chain of attributes of a name."""
    while isinstance(owner, ast.Attribute):
        owner = owner.value
    return owner.id if isinstance(owner, ast.Name) else None


def names_defined(tree: ast.Module) -> set[str]:
    """What the file itself defines: functions, classes, variables, and attributes that it assigns to ``self``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return names


def names_imported_from_elsewhere(tree: ast.Module) -> set[str]:
    """The modules and classes that the file imports, except Lightning's."""
    return {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).split(".")[0] != "lightning"
    }


@cache
def names_in_lightning() -> frozenset[str]:
    """Every private function, class or attribute that Lightning defines or assigns."""
    trees = (ast.parse(path.read_text()) for part in ("pytorch", "fabric") for path in (LIGHTNING / part).rglob("*.py"))
    nodes = (node for tree in trees for node in ast.walk(tree))
    return frozenset(name for node in nodes for name in defined_by(node) if is_private(name))


def defined_by(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.attr


def package_files() -> list[Path]:
    """The package's files, those behind its linked folders too, which ``rglob`` does not enter."""
    folders = [PACKAGE, *(entry for entry in PACKAGE.iterdir() if entry.is_symlink())]
    files = {path for folder in folders for path in folder.rglob("*.py")}
    return sorted(path for path in files if path.parent != PACKAGE / "_lightning")


def test_private_attributes_of_lightning_are_touched_in_one_folder():
    files = package_files()
    assert {PACKAGE / "registry.py", PACKAGE / "callbacks" / "resume_state.py"} <= set(files)
    found = {str(path.relative_to(PACKAGE)): violations(path) for path in files}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f(trainer):\n    return trainer._results", ["2: trainer._results"]),
        ("def f(trainer):\n    trainer.fit_loop._restarting = False", ["2: trainer.fit_loop._restarting"]),
        (
            "class C:\n    def f(self):\n        self.trainer._logger_connector.metrics",
            ["3: self.trainer._logger_connector"],
        ),
        ("class C:\n    def f(self):\n        return self._current_fx_name", ["3: self._current_fx_name"]),
        (
            "def f(x):\n    return getattr(x.fit_loop, '_data_fetcher', None)",
            ["2: getattr(x.fit_loop, '_data_fetcher', None)"],
        ),
        (
            "from lightning.pytorch.loops.fetchers import _DataFetcher",
            ["1: from lightning.pytorch.loops.fetchers import _DataFetcher"],
        ),
        ("import lightning.pytorch as pl\npl.trainer.call._call_setup_hook", ["2: pl.trainer.call._call_setup_hook"]),
        ("class C:\n    def f(self, other):\n        self._mine = other._mine", []),
        ("import torch\nfrom torch import nn\ntorch._foreach_add, nn.init._no_grad_fill_", []),
        ("class C:\n    def f(self):\n        return self._step_count", []),
    ],
)
def test_the_check_can_fail(tmp_path, code, expected):
    file = tmp_path / "planted.py"
    file.write_text(code)
    assert violations(file) == expected
