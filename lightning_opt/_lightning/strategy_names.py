"""Short names of this package's strategies in Lightning's registry, without importing Lightning or torch.

Lightning has no entry point for strategies, and ``import lightning_opt`` must stay light. So the names are entered
when ``lightning.pytorch.strategies`` is imported, whenever that is, by a finder in ``sys.meta_path`` that looks at
that one name. The names stand beside each class, in ``@register("strategy", aliases={...})``; they are read from the
source, and the class is imported when a Trainer asks for its name.
"""

import ast
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

_PACKAGE = "lightning_opt.strategies"


class Alias(NamedTuple):
    """One short name.

    Attributes:
        name: What a user types after ``strategy=``.
        module: The module that defines the class.
        cls: The name of the class.
        init_args: What the class is called with.
    """

    name: str
    module: str
    cls: str
    init_args: dict[str, Any]


def register_when_imported() -> None:
    """Enter the short names as soon as ``lightning.pytorch.strategies`` is imported: now, if it has been."""
    if not any(type(finder).__name__ == _AfterImport.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
    for name, register in _REGISTER.items():
        module = sys.modules.get(name)
        if hasattr(module, "StrategyRegistry"):  # not while it is being imported
            register(module)


def aliases(folder: Path = Path(__file__).parents[1] / "strategies") -> Iterator[Alias]:
    """The short names that the files of a folder register, read from their source.

    Args:
        folder: Every file without a leading underscore is read.
    """
    for path in sorted(folder.glob("[!_]*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef):
                continue
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and ast.unparse(call.func) in ("register", "registry.register"):
                    literal = next((k.value for k in call.keywords if k.arg == "aliases"), ast.Dict([], []))
                    for name, init_args in ast.literal_eval(literal).items():
                        yield Alias(name, f"{_PACKAGE}.{path.stem}", node.name, init_args)


class _AfterImport(MetaPathFinder):
    """Finds nothing itself; lets the loader of the modules waited for register the names once it is done."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _REGISTER:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute, register = spec.loader.exec_module, _REGISTER[fullname]

            def exec_module(module: ModuleType) -> None:
                execute(module)
                register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class _Lazily:
    """Imports the class of an alias when it is called."""

    def __init__(self, alias: Alias) -> None:
        self.alias = alias

    def __call__(self, **init_args: Any) -> Any:
        return getattr(import_module(self.alias.module), self.alias.cls)(**init_args)


class _Foreign:
    """Stands in the registry of the package ``pytorch_lightning``, whose classes are not those of ``lightning``."""

    def __init__(self, alias: Alias) -> None:
        self.alias = alias

    def __call__(self, **init_args: Any) -> Any:
        raise ValueError(
            f"strategy={self.alias.name!r} belongs to the package `lightning`, and this is the Trainer of the package "
            "`pytorch_lightning`, whose classes are others: import Trainer and LightningModule from "
            "`lightning.pytorch` (pip install lightning)"
        )


def _enter(make: Callable[[Alias], Callable[..., Any]]) -> Callable[[Any], None]:
    def register(strategies: Any) -> None:
        for alias in aliases():
            if alias.name not in strategies.StrategyRegistry:  # registered before, or by a user who wants it so
                strategies.StrategyRegistry.register(
                    alias.name, make(alias), description=f"lightning_opt.strategies.{alias.cls}", **alias.init_args
                )

    return register


_REGISTER = {"lightning.pytorch.strategies": _enter(_Lazily), "pytorch_lightning.strategies": _enter(_Foreign)}
