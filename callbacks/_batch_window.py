import dataclasses
from typing import Any

from lightning_opt.data import ResumableLoader
from lightning_opt.data.resumable_loader import Place


@dataclasses.dataclass
class Window:
    """The micro-batches of one optimizer step: where they begin in the epoch, and what they are to hold.

    Attributes:
        epoch: The loader's epoch.
        first: Number of the first micro-batch in it.
        target: Samples on all ranks that end the window; the end of the epoch ends it too.
        planned: Samples on all ranks that it will hold.
        seen: Samples of this rank whose gradients are there.
        tests: Whether the batch size is tested in its step.
    """

    epoch: int = -1
    first: int = 0
    target: int = 0
    planned: int = 0
    seen: int = 0
    tests: bool = False

    def places(self, loader: ResumableLoader, world_size: int) -> list[Place]:
        """Where its micro-batches lie. As sizes are the same on all ranks, so is their number."""
        number, places, batches = self.first, [loader.place(self.first)], len(loader)
        while number + 1 < batches and self._drawn(places) * world_size < self.target:
            number += 1
            places.append(loader.place(number))
        return places

    def _drawn(self, places: list[Place]) -> int:
        return places[-1].start + places[-1].size - places[0].start

    def state_dict(self) -> dict[str, Any]:
        """Builtins."""
        return dataclasses.asdict(self)


def even_sizes(samples: int, parts: int) -> list[int]:
    """Divide as evenly as can be.

    Example:
        >>> even_sizes(10, 4)
        [3, 3, 2, 2]
    """
    small, larger = divmod(samples, parts)
    return [small + (i < larger) for i in range(parts)]
