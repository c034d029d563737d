"""A graph that is kept from product to product while the parameters stay as they are."""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class Retained(Generic[T]):
    """The result of building a graph, kept until a parameter is written.

    Args:
        params: The parameters that the graph holds.
        keep: Whether to keep it at all.
    """

    def __init__(self, params: Sequence[Tensor], keep: bool) -> None:
        self.keep = keep
        self._params = params
        self._versions: list[int] = []
        self._graph: T | None = None

    def get(self, build: Callable[[], T]) -> T:
        """The kept graph, or a new one."""
        versions = list(map(attrgetter("_version"), self._params))  # torch counts writes
        if self._graph is None or versions != self._versions:
            self._graph = None  # free it before the next one is built
            graph = build()
            if not self.keep:
                return graph
            self._graph, self._versions = graph, versions
        return self._graph
