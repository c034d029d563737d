import dataclasses
from typing import Any

from lightning_opt.data import ResumableLoader


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

    @classmethod
    def at(cls, loader: ResumableLoader, number: int, target: int, world_size: int) -> "Window":
        """The window that begins with the batch of this number."""
        window = cls(loader.sampler.epoch, number, target)  # type: ignore[attr-defined]
        while not window.ends_with(loader, number, world_size):
            number += 1
        window.planned = window.samples(loader, number)
        return window

    def ends_with(self, loader: ResumableLoader, number: int, world_size: int) -> bool:
        """Whether the batch of this number is its last. As sizes are the same on all ranks, so is the answer."""
        place = loader.place(number)
        drawn = place.start + place.size - loader.place(self.first).start
        return drawn * world_size >= self.target or number + 1 >= len(loader)

    def samples(self, loader: ResumableLoader, number: int) -> int:
        """Samples on all ranks, up to the batch of this number."""
        return sum(loader.place(i).samples_of_all for i in range(self.first, number + 1))

    def micro_batches(self, loader: ResumableLoader, world_size: int) -> list[int]:
        """Samples of each of its micro-batches on this rank."""
        number, out = self.first, [loader.place(self.first).samples]
        while not self.ends_with(loader, number, world_size):
            number += 1
            out.append(loader.place(number).samples)
        return out

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
