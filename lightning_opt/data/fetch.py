import dataclasses
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pooch
from lightning.pytorch.utilities.rank_zero import rank_zero_info


class DataNotFoundError(RuntimeError):
    """A data file that is neither at hand nor could be fetched; the message names the ways to provide it."""


@dataclasses.dataclass(frozen=True)
class PublishedFile:
    """One file of a published dataset.

    Attributes:
        name: Its name without ``.gz``, the same in every folder.
        archive_sha256: SHA-256 of the file as the mirrors serve it.
        content_sha256: SHA-256 of what is in it, whoever compressed it; ``None`` where nobody published it.
        served_as: Its name at the mirrors, ``name.gz`` where not given.
    """

    name: str
    archive_sha256: str
    content_sha256: str | None = None
    served_as: str = ""


def find_file(name: str, folders: Iterable[Path]) -> Path | None:
    """The first ``name`` or ``name.gz`` in the folders, in their order, or ``None``."""
    candidates = (folder / file for folder in folders for file in (name, f"{name}.gz"))
    return next((path for path in candidates if path.is_file()), None)


def fetch_file(file: PublishedFile, mirrors: Sequence[str], folder: Path) -> Path:
    """Download a file into a folder unless it is there, with a progress bar.

    The mirrors are tried in turn until one serves the file with the right checksum; the file appears under its name
    only once it is complete and checked.

    Args:
        file: What to fetch.
        mirrors: Addresses that end in ``/``.
        folder: Where to keep it; made if absent.

    Returns:
        Its path.

    Raises:
        DataNotFoundError: If no mirror serves it; the message says why for each.
    """
    served = file.served_as or f"{file.name}.gz"
    kept = f"{file.name}.gz" if served.endswith(".gz") else file.name
    failures = []
    if not (folder / kept).is_file():
        rank_zero_info(f"Fetching {kept} into {folder}")
    for mirror in mirrors:
        try:
            with _silent_pooch():
                return Path(
                    pooch.retrieve(
                        mirror + served,
                        known_hash=f"sha256:{file.archive_sha256}",
                        fname=kept,
                        path=folder,
                        downloader=pooch.HTTPDownloader(progressbar=True, timeout=_TIMEOUT),
                    )
                )
        except (OSError, ValueError) as error:  # the network and the disk; a wrong checksum
            failures.append(f"{mirror + served}: {_in_short(error)}")
    raise DataNotFoundError("\n".join(failures))


def cache_folder(dataset: str) -> Path:
    """Where the fetched files of a dataset are kept, for example ``~/.cache/lightning-opt/mnist``."""
    return Path(pooch.os_cache("lightning-opt")) / dataset


def local_folders(root: str | None, below: Sequence[str], system: str | None) -> list[Path]:
    """The folders in which a dataset may lie on this machine, in the order in which they are searched.

    Args:
        root: A folder that holds the files or one of the folders ``below``.
        below: The dataset's folder below a folder of datasets, for example ``"mnist"`` and ``"MNIST/raw"``.
        system: The folder into which a package of the system installs the files.

    Returns:
        The folders; none of them need exist.
    """
    folders = []
    if root is not None:
        folders += [Path(root).expanduser() / name for name in (*below, ".")]
    if shared := os.environ.get(ENVIRONMENT):
        folders += [Path(shared).expanduser() / name for name in below]
    return folders + ([Path(system)] if system else [])


def missing_file(
    owner: str,
    file: str,
    reason: str,
    *,
    files: Sequence[str],
    folder: str,
    searched: Sequence[Path],
    package: str = "",
    details: str = "",
) -> DataNotFoundError:
    """The error for a file that is not at hand: first the ways to provide it, then what was tried.

    Args:
        owner: The data module that asks for it.
        file: What is missing.
        reason: Why fetching did not help, as the end of a sentence, with its full stop.
        files: The names of all files of the dataset.
        folder: The dataset's folder below a folder of datasets.
        searched: Where the file was looked for.
        package: The package of the system that installs the files, if there is one.
        details: What each mirror answered, a line each.
    """
    ways = [
        f"put the files ({', '.join(files)}; each as it is or with .gz) into a folder DIR/{folder} and set root=DIR"
        f" (in a config: data.init_args.root)",
        f"or set the environment variable {ENVIRONMENT}=DIR instead",
        f"or install the Debian package: apt install {package}" if package else "",
        f"or run once with a network: they are fetched into {cache_folder(folder)}",
    ]
    tried = "\nTried:\n" + "\n".join(f"  - {line}" for line in details.splitlines()) if details else ""
    return DataNotFoundError(
        f"{owner}: the file {file} is not at hand and {reason}\n"
        "To provide the files:\n" + "\n".join(f"  - {way}" for way in ways if way) + "\n"
        f"Searched: {', '.join(map(str, searched)) or 'no local folder (none is set)'}{tried}"
    )


def _in_short(error: BaseException) -> str:
    """What went wrong, without the layers of the network's libraries around it."""
    while (inner := getattr(error, "reason", None) or next(iter(error.args), None)) and isinstance(
        inner, BaseException
    ):
        error = inner
    return re.sub(r"^HTTPS?Connection\(.*?\): (Failed to establish a new connection: )?", "", str(error))


@contextmanager
def _silent_pooch() -> Iterator[None]:
    """Hold back pooch's line for each mirror that it tries."""
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


ENVIRONMENT = "LIGHTNING_OPT_DATA"
_TIMEOUT = 20.0  # seconds to connect, and between two packets
