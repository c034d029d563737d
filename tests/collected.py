"""The settings that the contract is checked with: literals in the test file of each method."""

import ast
from pathlib import Path
from typing import Any


def collect_settings(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The literal ``settings`` of every test file in a folder."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("test_*.py")):
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.Assign) and [ast.unparse(t) for t in statement.targets] == ["settings"]:
                for name, kwargs in ast.literal_eval(statement.value).items():
                    assert name not in found, f"{path.name} has settings for {name}, and so has another file"
                    found[name] = kwargs if isinstance(kwargs, list) else [kwargs]
    return found
