"""What a compressor is: it makes a message of fixed size from a vector, and adds what the message says to another."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

ValueDtype = Literal["float32", "bfloat16", "float16"]
Backend = Literal["torch", "triton"]


class Draw(NamedTuple):
    """Which random numbers a compressor draws, the same in a resumed run.

    Attributes:
        step: Number of the optimizer step.
        name: Name of the parameter.
        rank: The rank that sends.
    """

    step: int = 0
    name: str = ""
    rank: int = 0

    def generator(self, seed: int, *, shared: bool) -> torch.Generator:
        """A generator on the CPU that depends on nothing but these values.

        Args:
            seed: Of the compressor.
            shared: Whether all ranks draw the same.
        """
        words = f"{seed}/{self.step}/{self.name}/{'all' if shared else self.rank}".encode()
        digest = hashlib.blake2b(words, digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class Compressor(ABC):
    r"""A map C from vectors to messages, with :math:`E\|C(v) - v\|^2 \le (1 - \delta) \|v\|^2`.

    A message is a tensor of 32-bit words, whose number depends on the length and the dtype of the vector alone, so that
    every rank sends as much as every other. What a message says is defined by :meth:`add_`.

    Attributes:
        homogeneous: Whether C(a v) = a C(v) for a > 0. Then EF21-W is EF21.
    """

    homogeneous: bool = True

    @abstractmethod
    def nwords(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        """How many words a vector of this length takes."""

    def nbytes(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        """How many bytes a vector of this length takes."""
        return 4 * self.nwords(numel, dtype)

    @abstractmethod
    def delta(self, numel: int) -> float | None:
        """The contraction that holds for every vector of this length; None where none is known."""

    @abstractmethod
    def compress(self, vector: Tensor, draw: Draw = Draw()) -> Tensor:  # noqa: B008  # a constant
        """The message.

        Args:
            vector: Flat, contiguous, float32 or float64.
            draw: Names the random numbers.

        Returns:
            int32 words on the vector's device.
        """

    @abstractmethod
    def add_(self, target: Tensor, words: Tensor, weight: float = 1.0, draw: Draw = Draw()) -> Tensor:  # noqa: B008
        """Add what a message says, times a weight, to ``target`` in place.

        Args:
            target: Flat, of the length and the dtype of the vector that was compressed.
            words: The message, contiguous.
            weight: Factor.
            draw: As it was compressed with.
        """

    def add_all_(self, target: Tensor, rows: Tensor, weights: Sequence[float], draws: Sequence[Draw]) -> Tensor:
        """Add the messages of all ranks, times their weights, one rank after the other.

        Args:
            target: As for :meth:`add_`.
            rows: (ranks, words).
            weights: Of the ranks.
            draws: Of the ranks.
        """
        for row, weight, draw in zip(rows, weights, draws, strict=True):
            self.add_(target, row, weight, draw)
        return target

    def decompress(self, words: Tensor, like: Tensor, draw: Draw = Draw()) -> Tensor:  # noqa: B008
        """What a message says, as a vector of the length, the dtype and the device of ``like``."""
        return self.add_(torch.zeros_like(like), words, 1.0, draw)


def to_words(values: Tensor) -> Tensor:
    """The memory of a flat tensor as 32-bit words, filled up with zeros."""
    spare = -values.numel() * values.element_size() % 4 // values.element_size()
    if spare:
        values = torch.nn.functional.pad(values, (0, spare))
    return values.contiguous().view(torch.int32)


def from_words(words: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """The ``count`` values of a dtype that :func:`to_words` made words of."""
    if dtype.itemsize > 4 and words.storage_offset() % 2:
        words = words.clone()  # to where a wide value may lie
    return words.view(dtype)[:count]


def words_for(count: int, dtype: torch.dtype) -> int:
    """How many words ``count`` values take."""
    return -(-count * dtype.itemsize // 4)


def sent_as(value_dtype: ValueDtype | None, dtype: torch.dtype) -> torch.dtype:
    """The dtype that values travel in: the one asked for, or their own."""
    return dtype if value_dtype is None else getattr(torch, value_dtype)
