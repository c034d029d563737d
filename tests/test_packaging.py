"""Wheel and sdist: real files where the checkout has links, and a command that works outside the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("callbacks", "triton_kernels", "recipes")
NEEDED = ("pyproject.toml", "README.md", "LICENSE", "lightning_opt", *LINKED)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, ``from_tree/`` and ``from_sdist/`` with a wheel each; built from a copy of the tree."""
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    tree.mkdir()
    for name in NEEDED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / name)
    assert all((tree / "lightning_opt" / name).is_symlink() for name in LINKED)
    _run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", folder, tree)
    _run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder / "from_tree", tree)
    with tarfile.open(_only(folder, "*.tar.gz")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    sdist = _only(folder / "unpacked", "lightning_opt-*")
    _run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder / "from_sdist", sdist)
    return folder


def test_the_sdist_holds_real_files(built: Path) -> None:
    with tarfile.open(_only(built, "*.tar.gz")) as archive:
        members = {m.name.partition("/")[2]: m for m in archive.getmembers()}
    assert all(member.isfile() or member.isdir() for member in members.values())
    assert _package_files() <= members.keys()


def test_the_wheels_hold_real_files_and_nothing_else_at_the_top(built: Path) -> None:
    for wheel in (_only(built / "from_tree", "*.whl"), _only(built / "from_sdist", "*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
            assert _package_files() <= names
            assert {name.partition("/")[0].partition("-")[0] for name in names} == {"lightning_opt"}
            recipe = archive.read("lightning_opt/recipes/digits/quickstart.yaml")
        assert recipe == (ROOT / "recipes/digits/quickstart.yaml").read_bytes()


def test_both_wheels_are_the_same(built: Path) -> None:
    contents = []
    for folder in ("from_tree", "from_sdist"):
        with zipfile.ZipFile(_only(built / folder, "*.whl")) as archive:
            contents.append({n: archive.read(n) for n in archive.namelist() if not n.endswith("RECORD")})
    assert contents[0] == contents[1]


def test_the_installed_wheel_works_outside_the_checkout(built: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "venv"
    _run(sys.executable, "-m", "venv", "--without-pip", scratch)
    python = scratch / "bin/python"
    wheel = _only(built / "from_sdist", "*.whl")
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel)
    site = _only(scratch / "lib", "python*") / "site-packages"
    # The dependencies of this environment, behind its own packages. A path that comes from a .pth file has its own .pth
    # files ignored, so an editable install of the checkout stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = _run(python, "-c", "import lightning_opt, lightning; print(lightning_opt.__file__)", cwd=tmp_path)
    assert where.strip() == str(site / "lightning_opt/__init__.py")
    command = scratch / "bin/lightning-opt"
    assert "digits/quickstart" in _run(command, "recipes", "list", cwd=tmp_path)
    quick = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert "test/accuracy" in _run(command, "fit", *quick, cwd=tmp_path)


def _package_files() -> set[str]:
    """What every distribution must hold: modules, stubs, recipes, texts and weights, behind the links too."""
    return {
        f"lightning_opt/{path.relative_to(folder).as_posix()}" if folder.name == "lightning_opt" else
        f"lightning_opt/{folder.name}/{path.relative_to(folder).as_posix()}"
        for folder in (ROOT / "lightning_opt", *(ROOT / name for name in LINKED))
        for pattern in ("*.py", "*.pyi", "*.yaml", "*.txt.gz", "*.pt", "py.typed")
        for path in folder.rglob(pattern)
    }  # fmt: skip


def _only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def _run(*words: str | Path, cwd: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(w) for w in words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
