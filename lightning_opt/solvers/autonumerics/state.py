"""The state of a search on disk, to continue it exactly after it was killed."""

import json
import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .program import Program

if TYPE_CHECKING:
    from .search import Individual, Search

_FORMAT = 1


def save_state(path: Path, search: "Search") -> None:
    """Write the state, in one piece: a crash leaves the former file.

    Args:
        path: A numpy archive.
        search: Between two generations.
    """
    record = {
        "format": _FORMAT,
        "settings": search.settings(),
        "evals": search.evals,
        "seconds": search.seconds,
        "generator": search.rng.bit_generator.state,
        "population": [_record(i) for i in search.population],
        "best": [_record(i) for i in search.best.values()],
    }
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez(
            file,
            record=np.array(json.dumps(record)),
            structures=np.array(list(search.tries), dtype=np.uint64),
            tries=np.array(list(search.tries.values()), dtype=np.uint8),
        )
    os.replace(part, path)


def load_state(path: Path, search: "Search") -> None:
    """Continue from a state.

    Raises:
        ValueError: If the file is damaged, or of a search with other settings.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            record = json.loads(str(archive["record"]))
            tries = dict(zip(archive["structures"].tolist(), archive["tries"].tolist(), strict=True))
        if record["format"] != _FORMAT:
            raise ValueError(f"format {record['format']}, this version reads {_FORMAT}")
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no state of a search ({error})") from error
    differences = [
        f"{name}: {record['settings'].get(name)} there, {value} now"
        for name, value in search.settings().items()
        if record["settings"].get(name) != value
    ]
    if differences:
        raise ValueError(f"{path} is of another search ({'; '.join(differences)})")
    search.evals, search.seconds, search.tries = record["evals"], record["seconds"], tries
    search.rng.bit_generator.state = record["generator"]
    search.population = [_individual(i) for i in record["population"]]
    search.best = {i.program.ops: i for i in map(_individual, record["best"])}


def _record(individual: "Individual") -> dict[str, Any]:
    return {
        "steps": [[op, list(operands)] for op, operands in individual.program.steps],
        "coefficients": individual.coefficients.tolist(),
        "error": individual.error,
    }


def _individual(record: dict[str, Any]) -> "Individual":
    from .search import Individual

    return Individual(Program(record["steps"]), np.array(record["coefficients"], dtype=np.float64), record["error"])
