from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import Dataset

from lightning_opt._checks import check_interval
from lightning_opt.registry import register

from .content import CorruptDataError, read_content
from .fetch import DataNotFoundError, PublishedFile
from .published_files import PublishedFiles
from .split_data_module import Batch, SplitDataModule, check_size

UNKNOWN = "\N{REPLACEMENT CHARACTER}"


@register("data", summary="Text by characters: Shakespeare's Coriolanus, bundled (154,469 characters), or any file")
class CharText(SplitDataModule):
    r"""Windows of a text by characters, for predicting each character from those before it.

    The text is divided in its order: training, then validation, then test. A batch is ``(inputs, targets)``, both int64
    ``[B, context]``, the targets one character further on. Training windows start ``stride`` characters apart and come
    in an order that depends on ``seed`` and the epoch; those of evaluation do not overlap and are read in order. A
    rest that fills no window is left out.

    The vocabulary is the sorted set of the characters of the training text; index 0 stands for all others. A
    checkpoint keeps it, and resuming with a text that has another one is refused.

    Source of the bundled text: the plays are in the public domain; the wording is that of Tiny Shakespeare.

    Args:
        path: A text in UTF-8, gzip-compressed or not; ``None`` for the bundled one.
        context: Characters of a window.
        stride: From the start of one training window to that of the next; ``None`` for ``context``, with which each
            character is predicted once an epoch.
        batch_size: Windows in a training batch.
        eval_batch_size: Windows in a batch of validation, test and prediction.
        val_size: Share (float below 1) or number (int) of the characters to validate on.
        test_size: Likewise to test on.
        seed: Seed of the order of the training windows.
        drop_last: Leave out an incomplete last training batch.
        num_workers: Processes that load batches. With the text in memory 0 is fastest, and Lightning's advice to take
            more is silenced.

    Raises:
        ValueError: If a number is out of its range, or when a checkpoint was made with another vocabulary.
        DataNotFoundError: If there is no such file.
        CorruptDataError: If it is not text in UTF-8.
        MisconfigurationException: In ``setup``, if a part of the text is shorter than a window and its target.

    Cost: 4 bytes a character in memory.

    Example:
        >>> data = CharText(context=32)
        >>> data.setup()
        >>> inputs, targets = next(iter(data.val_dataloader()))
        >>> inputs.shape, bool((inputs[:, 1:] == targets[:, :-1]).all())
        (torch.Size([128, 32]), True)
        >>> data.vocab_size, data.decode(data.encode("O, let me clip ye\n§"))
        (62, 'O, let me clip ye\n�')
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        context: int = 64,
        stride: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        val_size: int | float = 0.1,
        test_size: int | float = 0.1,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            drop_last=drop_last,
            num_workers=num_workers,
        )
        check_interval("context", context, 1)
        if stride is not None:
            check_interval("stride", stride, 1)
        check_size("val_size", val_size)
        check_size("test_size", test_size)
        self.path = path
        self.context = context
        self.stride = context if stride is None else stride
        self.val_size = val_size
        self.test_size = test_size
        self.characters = ""

    @property
    def vocab_size(self) -> int:
        """The characters of the training text and one for all others; known after ``setup``."""
        return 1 + len(self.characters)

    def encode(self, text: str) -> Tensor:
        """The indices ``[len(text)]`` of characters, int32; 0 for those that the training text lacks."""
        self._check_ready()
        index = {character: i for i, character in enumerate(self.characters, start=1)}
        return torch.tensor([index.get(character, 0) for character in text], dtype=torch.int32)

    def decode(self, indices: Tensor) -> str:
        """The text of indices ``[N]``, with U+FFFD for 0."""
        self._check_ready()
        return "".join((UNKNOWN + self.characters)[i] for i in indices.tolist())

    def read_text(self) -> str:
        """The whole text."""
        path = _BUNDLED if self.path is None else Path(self.path).expanduser()
        if not path.is_file():
            raise DataNotFoundError(f"{type(self).__name__}: there is no file {path}")
        return decode_utf8(path, read_content(path))

    def setup(self, stage: str | None = None) -> None:
        """Read the text, once, and divide it; every stage needs the vocabulary of the training text."""
        if self.train_set is not None:
            return
        text = self.read_text()
        val, test = (
            round(size * len(text)) if isinstance(size, float) else size for size in (self.val_size, self.test_size)
        )
        train = len(text) - val - test
        for name, size in (("training", train), ("validation", val), ("test", test)):
            if size <= self.context:
                raise MisconfigurationException(
                    f"{type(self).__name__} has {len(text)} characters: val_size={self.val_size} and"
                    f" test_size={self.test_size} leave {max(size, 0)} for {name}, too few for one window of"
                    f" context={self.context} and its target"
                )
        self.characters = "".join(sorted(set(text[:train])))
        self.train_set = TextWindows(self.encode(text[:train]), self.context, self.stride)
        self.val_set = TextWindows(self.encode(text[train : train + val]), self.context, self.context)
        self.test_set = TextWindows(self.encode(text[train + val :]), self.context, self.context)

    def state_dict(self) -> dict[str, str]:
        """The vocabulary, which gives the model's indices their meaning."""
        return {"characters": self.characters}

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        """Compare the vocabulary with that of the checkpoint."""
        if self.characters and state_dict["characters"] != self.characters:
            raise ValueError(
                f"the checkpoint was made with the characters {state_dict['characters']!r}, the training text of this"
                f" {type(self).__name__} has {self.characters!r}; give the text that it was made with"
            )

    def _check_ready(self) -> None:
        if not self.characters:
            raise RuntimeError(f"call setup() of {type(self).__name__} first; the Trainer does so by itself")


@register("data", summary="Tiny Shakespeare by characters: 1,115,394 characters of Shakespeare's plays")
class TinyShakespeare(CharText):
    """Tiny Shakespeare, 1,115,394 characters of Shakespeare's plays (1.1 MB to fetch); 65 different ones.

    The file is searched for in ``root``, in ``LIGHTNING_OPT_DATA`` and in the cache, below ``text/`` or
    ``tiny-shakespeare/``, and else fetched once.

    Source: https://github.com/karpathy/char-rnn. The plays are in the public domain.

    Args:
        root: A folder with ``tiny_shakespeare.txt``, gzip-compressed or not, or with one of these folders in it.
        verify: Compare the content with the published checksum. ``False`` accepts another text, for example a part.
        **kwargs: As for :class:`CharText`, except ``path``.

    Raises:
        DataNotFoundError: If the file is neither at hand nor can be fetched; the message names the ways to provide it.
        CorruptDataError: If it is damaged or not the published one.

    Example:
        >>> TinyShakespeare(context=128, batch_size=16).stride
        128
    """

    def __init__(self, *, root: str | None = None, verify: bool = True, **kwargs: Any) -> None:
        super().__init__(None, **kwargs)
        self.root = root
        self.verify = verify
        self._source = PublishedFiles(
            type(self).__name__, ("text", "tiny-shakespeare"), _MIRRORS, (_TINY_SHAKESPEARE,), root
        )

    def prepare_data(self) -> None:
        """Fetch the text if no folder holds it."""
        self._source.fetch(_TINY_SHAKESPEARE)

    def read_text(self) -> str:
        """The whole text."""
        return decode_utf8(*self._source.read(_TINY_SHAKESPEARE, verify=self.verify))


class TextWindows(Dataset[Batch]):
    """Windows of a text and their targets; indexed with a whole batch at once (``__getitems__``).

    Args:
        indices: The characters, integers ``[N]``.
        context: Characters of a window.
        stride: From the start of one window to that of the next.
    """

    def __init__(self, indices: Tensor, context: int, stride: int) -> None:
        self.indices = indices
        self.stride = stride
        self.offsets = torch.arange(context + 1)

    def __len__(self) -> int:
        return max(len(self.indices) - len(self.offsets), -self.stride) // self.stride + 1

    def __getitem__(self, index: int) -> Batch:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        starts = torch.as_tensor(indices) * self.stride
        windows = self.indices[starts[:, None] + self.offsets].long()
        return windows[:, :-1], windows[:, 1:]


def decode_utf8(path: Path, content: bytes) -> str:
    """Text of bytes in UTF-8, a byte order mark left out; ``CorruptDataError`` names the file where they are not."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorruptDataError(f"{path} is not text in UTF-8: {error}") from error


_BUNDLED = Path(__file__).parent / "texts" / "coriolanus.txt.gz"
_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_TINY_SHAKESPEARE = PublishedFile("tiny_shakespeare.txt", _SHA256, _SHA256, served_as="input.txt")
_MIRRORS = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",)
