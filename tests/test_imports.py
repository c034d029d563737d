"""The layers of the package, and what importing it costs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package that a test may damage."""
    for folder in ("lightning_opt", "callbacks", "triton_kernels", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command; lint_imports_command()"
    )
    command = [sys.executable, "-P", "-c", program, "--no-cache"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_imports_against_the_layers_are_found(copy: Path) -> None:
    assert lint_imports(copy).returncode == 0
    planted = {
        "lightning_opt/data/digits.py": "lightning_opt.optim",
        "callbacks/run_report.py": "lightning_opt.models",
        "lightning_opt/optim/lion.py": "lightning_opt.callbacks",
    }
    for file, module in planted.items():
        (copy / file).write_text(f"import {module}\n{(copy / file).read_text()}")
    result = lint_imports(copy)
    assert result.returncode != 0
    for file, module in planted.items():
        importer = "lightning_opt." + file.removeprefix("lightning_opt/").removesuffix(".py").replace("/", ".")
        assert f"- {importer} -> {module} (l.1)" in result.stdout


@pytest.mark.parametrize("name", ["callbacks", "recipes", "triton_kernels"])
def test_the_bare_name_of_a_root_folder_is_banned(tmp_path: Path, name: str) -> None:
    (tmp_path / "module.py").write_text(f"import {name}\n\n{name}.x()\n")
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--config",
        ROOT / "pyproject.toml",
        "--select",
        "TID251",
        tmp_path,
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert f"import lightning_opt.{name}" in result.stdout


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import lightning_opt", ("torch", "lightning", "numpy")),
        (
            "from lightning_opt.optim import AdaBelief",
            ("numba", "triton", "matplotlib", "sklearn", "jsonargparse", "pooch", "lightning"),
        ),
        (
            "from lightning_opt.callbacks import OptimizerMonitor, ResumeState, RunReport",
            ("numba", "sklearn", "pooch"),
        ),
    ],
)
def test_imports_are_light(statement: str, unwanted: tuple[str, ...]) -> None:
    program = f"import sys; {statement}; print(*(name for name in {unwanted} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not found
