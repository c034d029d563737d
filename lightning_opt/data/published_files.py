import dataclasses
from pathlib import Path

from .content import read_content
from .fetch import DataNotFoundError, PublishedFile, cache_folder, fetch_file, find_file, local_folders, missing_file


@dataclasses.dataclass(frozen=True)
class PublishedFiles:
    """Files that are read from a local folder, or else fetched once into the user's cache folder.

    For each file the folders are searched in this order: the root, the folder that the environment variable
    ``LIGHTNING_OPT_DATA`` names, the cache of what was fetched before.

    Attributes:
        owner: The data module, for messages.
        folders: Where the files lie below the root or ``LIGHTNING_OPT_DATA``; the first names the cache folder too.
        mirrors: Addresses that serve them, ending in ``/``.
        files: All files of the dataset.
        root: The user's own folder, with the files or with one of ``folders`` in it.
    """

    owner: str
    folders: tuple[str, ...]
    mirrors: tuple[str, ...]
    files: tuple[PublishedFile, ...]
    root: str | None = None

    def fetch(self, file: PublishedFile) -> None:
        """Fetch a file unless it is at hand.

        Raises:
            DataNotFoundError: If no mirror serves it; the message names the ways to provide it.
        """
        if find_file(file.name, self._local_folders()) is None:
            try:
                fetch_file(file, self.mirrors, cache_folder(self.folders[0]))
            except DataNotFoundError as error:
                raise self._missing(file, "could not be fetched.", str(error)) from None

    def read(self, file: PublishedFile, *, verify: bool) -> tuple[Path, bytes]:
        """Where a file is and what it holds, decompressed.

        Raises:
            DataNotFoundError: If it is nowhere.
            CorruptDataError: If it is damaged or, with ``verify``, not the published one.
        """
        path = find_file(file.name, [*self._local_folders(), cache_folder(self.folders[0])])
        if path is None:
            raise self._missing(file, "was not fetched; prepare_data() does that, and the Trainer calls it by itself.")
        return path, read_content(path, sha256=file.content_sha256 if verify else None)

    def _local_folders(self) -> list[Path]:
        return local_folders(self.root, self.folders, None)

    def _missing(self, file: PublishedFile, reason: str, details: str = "") -> DataNotFoundError:
        names = [file.name for file in self.files]
        searched = self._local_folders()
        return missing_file(
            self.owner, file.name, reason, files=names, folder=self.folders[0], searched=searched, details=details
        )
