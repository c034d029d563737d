"""``lightning-opt recipes``: list, show and copy the ready-made runs."""

import argparse
import re
import shutil
import sys
import textwrap
from pathlib import Path

from lightning_opt.registry import register_command

from .errors import UserError, did_you_mean

FOLDER = Path(__file__).parents[1] / "recipes"
HEADER_KEYS = ("shows", "method", "data", "command", "result", "minutes")


@register_command("recipes", summary="list, show or copy the ready-made runs")
def recipes(arguments: list[str]) -> int:
    """Run ``lightning-opt recipes list | show NAME | copy NAME DEST``.

    Args:
        arguments: The words after ``recipes``.

    Returns:
        The exit status.

    Raises:
        UserError: If a recipe does not exist or the copy's destination does.
    """
    parser = argparse.ArgumentParser("lightning-opt recipes", description="The ready-made runs.")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="a table of all recipes")
    actions.add_parser("show", help="print one recipe").add_argument("name")
    copy = actions.add_parser("copy", help="copy one recipe to a file of your own")
    copy.add_argument("name")
    copy.add_argument("destination", type=Path, metavar="DEST", help="a file, or a folder that exists")
    copy.add_argument("--force", action="store_true", help="overwrite DEST")
    options = parser.parse_args(arguments)
    if options.action == "list":
        sys.stdout.write(recipe_table(shutil.get_terminal_size((160, 24)).columns))
    elif options.action == "show":
        sys.stdout.write("\n".join(recipe_path(name).read_text() for name in recipe_runs(options.name)))
    else:
        copy_recipe(options.name, options.destination, force=options.force)
    return 0


def recipe_names() -> list[str]:
    """The names of all recipes: paths below the recipe folder without suffix, sorted."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def recipe_runs(name: str) -> list[str]:
    """The names of a recipe's runs: its own, or, for a folder of numbered files, theirs in order."""
    own = [
        run for run in recipe_names() if run.rpartition("/")[0] == name and re.match(r"\d+_", run.rpartition("/")[2])
    ]
    return sorted(own, key=lambda run: int(run.rpartition("/")[2].partition("_")[0])) or [name]


def recipe_path(name: str) -> Path:
    """The file of a recipe of one run.

    Raises:
        UserError: If there is no recipe of this name, and the nearest is offered; or if it has several runs.
    """
    names = recipe_names()
    runs = recipe_runs(name)
    if runs != [name]:
        raise UserError(f"{name!r} is a recipe of {len(runs)} runs; do them in this order: {', '.join(runs)}.")
    if name not in names:
        raise UserError(
            f"no recipe is named {name!r}.{did_you_mean(nearest_recipes(name, names))}"
            " `lightning-opt recipes list` shows them all."
        )
    return FOLDER / f"{name}.yaml"


def recipe_header(path: Path) -> dict[str, str]:
    """The ``# key: value`` lines at the top of a recipe."""
    header = {}
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        key, _, value = line.lstrip("# ").partition(":")
        header[key] = value.strip()
    return header


def nearest_recipes(name: str, names: list[str]) -> list[str]:
    """The recipes whose full or last name is nearest to a misspelt one."""
    from lightning_opt._checks import nearest  # imports torch

    by_last = nearest(name.rpartition("/")[2], {n.rpartition("/")[2] for n in names})
    folders = sorted({n.rpartition("/")[0] for n in names if len(recipe_runs(n.rpartition("/")[0])) > 1})
    return nearest(name, [*names, *folders]) or [n for n in names if n.rpartition("/")[2] in by_last]


def recipe_table(width: int) -> str:
    """The recipes as a table; its columns of prose are wrapped to fit ``width`` characters, but not below 16 each."""
    columns = ("name", "method", "data", "shows", "result", "minutes")
    prose = (2, 3, 4)
    rows: list[tuple[str, ...]] = [columns]
    for name in recipe_names():
        header = {"name": name, **recipe_header(FOLDER / f"{name}.yaml")}
        rows.append(tuple(header.get(column, "") for column in columns))
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    room = width - 2 * (len(columns) - 1) - sum(w for i, w in enumerate(widths) if i not in prose)
    for left, i in zip((3, 2, 1), sorted(prose, key=widths.__getitem__), strict=True):
        widths[i] = min(widths[i], max(16, room // left))  # what a narrow column leaves, the wider ones get
        room -= widths[i]
    lines = []
    for row in rows:
        cells = [textwrap.wrap(cell, w) or [""] for cell, w in zip(row, widths, strict=True)]
        for i in range(max(map(len, cells))):
            line = "  ".join((c[i] if i < len(c) else "").ljust(w) for c, w in zip(cells, widths, strict=True))
            lines.append(line.rstrip() + "\n")
    return "".join(lines)


def copy_recipe(name: str, destination: Path, *, force: bool = False) -> list[Path]:
    """Copy a recipe to a file that ``--config`` takes, its ``command`` line adapted.

    Args:
        name: The recipe.
        destination: A file, or a folder that exists; for a recipe of several runs a folder, made if need be.
        force: Overwrite existing files.

    Returns:
        The files written.

    Raises:
        UserError: If the recipe does not exist, a file does, or it cannot be written.
    """
    runs = recipe_runs(name)
    if len(runs) > 1:
        try:
            destination.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {destination}: {error.strerror}.") from error
    return [_copy_run(run, destination, force=force) for run in runs]


def _copy_run(name: str, destination: Path, *, force: bool) -> Path:
    source = recipe_path(name)
    path = destination / source.name if destination.is_dir() else destination
    if path.exists() and not force:
        raise UserError(f"{path} exists; --force overwrites it.")
    shown = path if path.is_absolute() else f"./{path}"
    old = recipe_header(source)["command"]
    new = re.sub(r"lightning-opt fit( --config \S+)?", f"lightning-opt fit --config {shown}", old)
    try:
        path.write_text(source.read_text().replace(f"# command: {old}", f"# command: {new}", 1))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from error
    print(f"{path}: run it with `{new}`")
    return path
