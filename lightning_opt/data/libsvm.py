import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from sklearn.datasets import load_svmlight_file
from torch import Tensor

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

from .content import CorruptDataError, read_content
from .fetch import DataNotFoundError, PublishedFile
from .labeled_data_module import LabeledDataModule, Split, stratified_order
from .published_files import PublishedFiles


@register("data", summary="Tables in LIBSVM's format: a8a (22,696 x 123), w8a (49,749 x 300), or a file of one's own")
class LibSVM(LabeledDataModule):
    r"""A table for classification in LIBSVM's format, the usual test problems of convex optimization.

    With ``Classifier(MLP(in_features=123, hidden=(), num_classes=2), num_classes=2)`` it is logistic regression. The
    features are not scaled: those of ``a8a`` and ``w8a`` are 0 or 1. A batch is ``(features, labels)``: float32
    ``[B, D]`` and int64 ``[B]``, the classes numbered in the order of their labels in the file, so that -1 is 0 and +1
    is 1.

    The files that LIBSVM publishes for testing are not used: a stratified part of the file, the same for every seed,
    is the test set. The published files are searched for in ``root``, in ``LIGHTNING_OPT_DATA`` and in the cache, below
    ``libsvm/``, and else fetched once (1.6 and 3.5 MB).

    Source: https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary.html; a8a from UCI's Adult, w8a from Platt's
    web pages.

    Args:
        name: ``"a8a"`` or ``"w8a"``.
        path: A file of one's own in this format, gzip-compressed or not, instead of a published one; its features are
            numbered from 1.
        test_size: Share (float below 1) or number (int) of the rows to test on.
        root: A folder with the published files, or with a folder ``libsvm`` in it.
        verify: Compare the content with the published checksums.
        **kwargs: As for :class:`LabeledDataModule`.

    Raises:
        ValueError: If a value is out of its range.
        DataNotFoundError: If a file is neither at hand nor can be fetched; the message names the ways to provide it.
        CorruptDataError: If a file is damaged, not the published one, or not in LIBSVM's format for classification.
        MisconfigurationException: In ``setup``, if there are fewer rows than asked for.

    Cost: the table is dense in memory, ``4 * N * D`` bytes: 11 MB for a8a, 60 MB for w8a, twice that while it is split.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "signs")
        >>> _ = path.write_text("+1 1:2 3:0.5\n-1 2:1\n" * 50)
        >>> data = LibSVM(path=str(path), batch_size=2, val_size=20, test_size=20)
        >>> data.setup()
        >>> features, label = data.test_set[0]
        >>> features.tolist(), int(label), data.classes, data.num_features
        ([0.0, 1.0, 0.0], 0, ('-1', '+1'), 3)
    """

    noun = "rows"

    def __init__(
        self,
        name: str = "a8a",
        *,
        path: str | None = None,
        test_size: int | float = 0.2,
        root: str | None = None,
        verify: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choice("name", name, _PUBLISHED)
        if isinstance(test_size, float):
            check_interval("test_size as a share", test_size, 0, 1, closed="()")
        else:
            check_interval("test_size", test_size, 1)
        self.name = name
        self.path = path
        self.test_size = test_size
        self.root = root
        self.verify = verify
        self.num_features = 0 if path else _PUBLISHED[name][1]
        self.classes = () if path else ("-1", "+1")
        self._file = _PUBLISHED[name][0]
        self._source = PublishedFiles(
            type(self).__name__, ("libsvm", "LIBSVM"), _MIRRORS, tuple(file for file, _ in _PUBLISHED.values()), root
        )

    def prepare_data(self) -> None:
        """Fetch the file if it is a published one and no folder holds it."""
        if self.path is None:
            self._source.fetch(self._file)

    def load(self, split: Split) -> tuple[Tensor, Tensor]:
        """Read the file, and of its rows those of a split: ``test_size`` of them are for testing, stratified."""
        features, labels = self._table(*self._content())
        test = round(self.test_size * len(labels)) if isinstance(self.test_size, float) else self.test_size
        if not 1 <= test < len(labels):
            raise MisconfigurationException(
                f"{type(self).__name__} has {len(labels)} rows: test_size={self.test_size} takes {test} and leaves"
                f" {max(len(labels) - test, 0)}"
            )
        order = stratified_order(labels, seed=0)
        part = (order[:test] if split == "test" else order[test:]).sort().values
        return features[part], labels[part]

    def _content(self) -> tuple[Path, bytes]:
        if self.path is None:
            return self._source.read(self._file, verify=self.verify)
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise DataNotFoundError(f"{type(self).__name__}: there is no file {path}")
        return path, read_content(path)

    def _table(self, path: Path, content: bytes) -> tuple[Tensor, Tensor]:
        width = None if self.path else self.num_features
        try:
            sparse, values = load_svmlight_file(
                io.BytesIO(content), n_features=width, dtype="float32", zero_based=False
            )
        except (ValueError, OverflowError) as error:
            raise CorruptDataError(f"{path} is not a table in LIBSVM's format: {error}") from error
        found, labels = torch.from_numpy(values).unique(return_inverse=True)
        if not len(labels) or not 2 <= len(found) <= _MOST_CLASSES or (found != found.round()).any():
            raise CorruptDataError(
                f"{path} is no table for classification: it has {len(labels)} rows with {len(found)} different labels,"
                f" expected 2 to {_MOST_CLASSES} integers"
            )
        self.num_features = sparse.shape[1]
        sign = "+" if found[0] < 0 else ""
        self.classes = tuple(f"{int(label):{sign}d}" for label in found)
        return torch.from_numpy(sparse.toarray()), labels


_MOST_CLASSES = 1000  # more are the values of a regression
_MIRRORS = ("https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary/",)
_A8A = "d08a37b3fadd4bd3c8b3fc30bdc93b54d7c0f371265c90cbfb931a7efe97cd28"
_W8A = "6a9fa8fd5f524303240a5db07d4b3d4a51e8b7b4b20a914105d8e3e8c81640f2"
_PUBLISHED = {  # the file and the number of its features
    "a8a": (PublishedFile("a8a", _A8A, _A8A, served_as="a8a"), 123),  # served as they are, not compressed
    "w8a": (PublishedFile("w8a", _W8A, _W8A, served_as="w8a"), 300),
}
