from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from .content import CorruptDataError
from .fetch import DataNotFoundError, PublishedFile, cache_folder, fetch_file, find_file, local_folders, missing_file
from .idx import read_idx
from .image_data_module import ImageDataModule
from .labeled_data_module import Split, splits_of


class IdxImages(ImageDataModule):
    """Images in four IDX files, as MNIST is published: read from a local folder, else fetched once.

    For each file the folders are searched in this order: ``root``, the folder that the environment variable
    ``LIGHTNING_OPT_DATA`` names, the folder of the system's package, the cache of what was fetched before. A file may
    be gzip-compressed or not. What is nowhere is fetched from the first mirror that answers, with a progress bar, into
    the user's cache folder. Only the files of the stage at hand are needed: testing does not ask for training images.

    A subclass is data only: the class attributes below and those of :class:`ImageDataModule`.

    Attributes:
        folders: Where the files lie below ``root`` or ``LIGHTNING_OPT_DATA``; the first names the cache folder too.
        system_folder: Where a package of the system installs them, or ``None``.
        system_package: The name of that package.
        mirrors: Addresses that serve them, ending in ``/``.
        files: For ``"train"`` and ``"test"`` the images and the labels.

    Args:
        root: A folder with the files, or with one of ``folders`` in it.
        verify: Compare the content with the published checksums. ``False`` accepts other images in the same format,
            for example a subset.
        **kwargs: As for :class:`ImageDataModule`.

    Raises:
        DataNotFoundError: If a file is neither at hand nor can be fetched; the message names the ways to provide it.
        CorruptDataError: If a file is damaged or not the published one; the message names the file.
    """

    folders: ClassVar[tuple[str, ...]]
    system_folder: ClassVar[str | None] = None
    system_package: ClassVar[str] = ""
    mirrors: ClassVar[tuple[str, ...]]
    files: ClassVar[dict[Split, tuple[PublishedFile, PublishedFile]]]

    def __init__(self, *, root: str | None = None, verify: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root
        self.verify = verify

    def prepare_data(self) -> None:
        """Fetch what the stage needs and no folder holds."""
        for split in splits_of(self.trainer.state.fn if self.trainer is not None else None):
            self.provide(split)

    def provide(self, split: Split) -> None:
        """Fetch the files of a split that no folder holds."""
        for file in self.files[split]:
            if find_file(file.name, self._local_folders()) is None:
                try:
                    fetch_file(file, self.mirrors, cache_folder(self.folders[0]))
                except DataNotFoundError as error:
                    raise self._missing(file, "could not be fetched.", str(error)) from None

    def is_at_hand(self, split: Split) -> bool:
        """Whether the files of a split are on this machine."""
        return all(find_file(file.name, self._folders()) is not None for file in self.files[split])

    def load(self, split: Split) -> tuple[Tensor, Tensor]:
        """Read and check the two files of a split."""
        (images_path, images), (labels_path, labels) = (self._read(file) for file in self.files[split])
        if images.shape[1:] != self.shape[1:]:
            raise CorruptDataError(
                f"{images_path} holds images of shape {(*images.shape[1:],)}, expected {self.shape[1:]}"
            )
        if labels.ndim != 1 or len(images) != len(labels):
            raise CorruptDataError(
                f"{images_path} holds {len(images)} images, but {labels_path} labels of shape {(*labels.shape,)}: they"
                " do not belong together"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise CorruptDataError(
                f"{labels_path} holds labels from {labels.min()} to {labels.max()}, not 0 to {self.num_classes - 1}"
            )
        return images, labels

    def _read(self, file: PublishedFile) -> tuple[Path, Tensor]:
        path = find_file(file.name, self._folders())
        if path is None:
            raise self._missing(file, "was not fetched; prepare_data() does that, and the Trainer calls it by itself.")
        return path, read_idx(path, sha256=file.content_sha256 if self.verify else None)

    def _folders(self) -> list[Path]:
        return [*self._local_folders(), cache_folder(self.folders[0])]

    def _local_folders(self) -> list[Path]:
        return local_folders(self.root, self.folders, self.system_folder)

    def _missing(self, file: PublishedFile, reason: str, details: str = "") -> DataNotFoundError:
        return missing_file(
            type(self).__name__,
            file.name,
            reason,
            files=[file.name for pair in self.files.values() for file in pair],
            folder=self.folders[0],
            searched=self._local_folders(),
            package=self.system_package if self.system_folder else "",
            details=details,
        )
