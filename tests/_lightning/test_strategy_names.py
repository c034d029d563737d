"""Short names of strategies, before and after Lightning is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_opt import registry
from lightning_opt._lightning.strategy_names import Alias, aliases


def run(program: str, *search: Path) -> list[str]:
    path = "".join(f"sys.path.insert(0, {str(folder)!r}); " for folder in search)
    command = [sys.executable, "-W", "ignore", "-c", f"import sys; {path}{program}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_names_are_read_from_the_source(tmp_path):
    (tmp_path / "one.py").write_text(
        '@register("strategy", summary="", aliases={"a": {}, "b": {"beta": 0.5}})\nclass One:\n    pass\n'
    )
    (tmp_path / "two.py").write_text('import missing\n\n@final\n@registry.register("strategy")\nclass Two:\n    pass\n')
    (tmp_path / "_three.py").write_text('@register("strategy", aliases={"c": {}})\nclass Three:\n    pass\n')
    module = "lightning_opt.strategies.one"
    assert list(aliases(tmp_path)) == [Alias("a", module, "One", {}), Alias("b", module, "One", {"beta": 0.5})]


def test_the_source_says_what_the_registry_says():
    registry.load_all()
    registered = {
        (name, entry.target.__module__, entry.name, str(init_args))
        for entry in registry.entries("strategy")
        for name, init_args in entry.aliases.items()
    }
    assert {(a.name, a.module, a.cls, str(a.init_args)) for a in aliases()} == registered


def test_two_classes_with_one_alias_are_refused():
    def first() -> None: ...
    def second() -> None: ...

    try:
        registry.register("strategy", summary="", aliases={"taken": {}})(first)
        with pytest.raises(ValueError, match="second and first both have the alias 'taken'"):
            registry.register("strategy", summary="", aliases={"taken": {}, "free": {}})(second)
    finally:
        registry._entries.pop("first", None)


def test_a_module_imported_later_gets_the_names_and_keeps_those_of_a_user(tmp_path):
    """With a stand-in for ``pytorch_lightning``, whose name is waited for too; it may fail at first."""
    package = tmp_path / "pytorch_lightning"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "strategies.py").write_text(
        "import builtins\n"
        "if not hasattr(builtins, 'ready'): raise ImportError\n"
        "from lightning_opt._lightning.strategy_names import aliases\n"
        "class Registry(dict):\n"
        "    def register(self, name, strategy, description, **init_args):\n"
        "        assert name not in self\n"
        "        self[name] = strategy\n"
        "StrategyRegistry = Registry({'mine': 1})\n"
    )
    program = """
import builtins, contextlib, lightning_opt
from lightning_opt._lightning import strategy_names
strategy_names.aliases = lambda: [strategy_names.Alias(n, "m", "C", {}) for n in ("mine", "ours")]
with contextlib.suppress(ImportError):
    import pytorch_lightning.strategies
builtins.ready = True
import pytorch_lightning.strategies as late
print(late.StrategyRegistry["mine"])
strategy_names.register_when_imported()
print(sum(type(f).__name__ == "_AfterImport" for f in sys.meta_path))
try:
    late.StrategyRegistry["ours"]()
except ValueError as error:
    print(error)
"""
    printed = run(program, tmp_path)
    assert printed[:2] == ["1", "1"]
    assert "import Trainer and LightningModule from `lightning.pytorch`" in " ".join(printed)
