"""A data loader that continues an epoch where a checkpoint left it."""

import random
from collections.abc import Iterator, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    default_collate,
    get_worker_info,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_opt._checks import check_interval


class Place(NamedTuple):
    """Where a batch lies in the epoch of a rank.

    Attributes:
        start: Samples of the epoch before it, on this rank.
        size: The batch size when it was drawn; the last batch of an epoch may hold less.
        samples: What it holds.
        samples_of_all: What the batches of this number on all ranks hold together.
    """

    start: int
    size: int
    samples: int
    samples_of_all: int


class ResumableLoader(DataLoader):
    """A :class:`torch.utils.data.DataLoader` whose order is a function of ``(seed, epoch)`` and that resumes mid-epoch.

    The Lightning Trainer saves :meth:`state_dict` in every checkpoint and hands it back on
    ``Trainer.fit(ckpt_path=...)``. Only batches that were handed out count, not those that workers have prefetched.
    With :class:`lightning_opt.callbacks.ResumeState`, a resumed run repeats the uninterrupted one bit for bit.

    - The loader uses no global random state. Worker processes seed python, numpy and torch anew for every batch from
      ``(seed, epoch, rank, batch)``, so random augmentation in workers depends neither on their number nor on where
      the run was resumed. With ``num_workers=0`` augmentation draws from the global state, which ``ResumeState`` saves.
    - In a distributed run every rank takes each ``world_size``-th sample of the permutation, without the Trainer's help
      (``use_distributed_sampler`` has no effect). A rank repeats a sample only where it would otherwise make one batch
      fewer than the others; with ``drop_last`` none is repeated. So an evaluation over several ranks is nearly always
      exact.
    - A dataset may define ``__getitems__(indices)`` that returns a whole batch as a tuple, a dict or a tensor: one
      indexing operation for the batch, and nothing is collated. A list is taken as samples, as torch does.
    - The batch size may change within an epoch (:meth:`set_batch_size`): every sample is still read exactly once, and
      the position that is saved knows of all changes.

    Outside of the Trainer call ``loader.sampler.set_epoch(epoch)`` before each epoch, as for
    :class:`~torch.utils.data.distributed.DistributedSampler`.

    Args:
        dataset: A dataset with a length, read by index.
        batch_size: Samples a batch, on each rank.
        shuffle: Draw a new permutation every epoch; otherwise read in order.
        seed: Chooses the sequence of permutations, a non-negative integer.
        drop_last: Leave out the last batch of an epoch if it is incomplete.
        num_workers: Worker processes.
        loader_kwargs: Further arguments of ``DataLoader``, except ``sampler``, ``batch_sampler``, ``generator`` and
            ``in_order=False``.

    Raises:
        ValueError: If a value is out of range, or when an epoch is to be continued with another batch size, seed,
            dataset length or number of ranks than it was begun with.

    Example:
        >>> loader = ResumableLoader(range(10), batch_size=4, shuffle=True, seed=1)
        >>> batches = iter(loader)
        >>> _ = next(batches)
        >>> loader.state_dict()["batches"]
        1
        >>> resumed = ResumableLoader(range(10), batch_size=4, shuffle=True, seed=1)
        >>> resumed.load_state_dict(loader.state_dict())
        >>> all(torch.equal(a, b) for a, b in zip(batches, resumed, strict=True))
        True
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int = 64,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int = 0,
        **loader_kwargs: Any,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(f"dataset must have a length and be read by index, got {type(dataset).__name__}")
        for name, value, low in (("batch_size", batch_size, 1), ("seed", seed, 0)):
            check_interval(name, value, low)
            if not isinstance(value, int):
                raise ValueError(f"{name} must be an integer, got {value!r}")
        if loader_kwargs.get("in_order") is False:
            raise ValueError("in_order must be True: batches that overtake each other cannot be resumed, got False")
        sampler = loader_kwargs.pop("sampler", None)
        recorder = loader_kwargs.pop("batch_sampler", None)
        # the Trainer brings these: one to read in order when it overfits, one around our own to predict
        for given, accepted in ((sampler, SequentialSampler), (getattr(recorder, "sampler", recorder), _EpochSampler)):
            if not (given is None or isinstance(given, accepted)):
                raise ValueError(f"sampler must be None: ResumableLoader makes its own, got {type(given).__name__}")
        loader_kwargs["generator"] = torch.Generator()
        loader_kwargs["collate_fn"] = loader_kwargs.get("collate_fn") or _collate

        if recorder is None:
            self._order = _EpochSampler(dataset, batch_size, shuffle and sampler is None, seed, drop_last)
            super().__init__(
                dataset, batch_size, sampler=self._order, drop_last=drop_last, num_workers=num_workers, **loader_kwargs
            )
        else:
            self._order = recorder.sampler
            super().__init__(dataset, batch_sampler=recorder, num_workers=num_workers, **loader_kwargs)
        self._recorder = recorder  # its indices are to be plain integers
        self._sizes = _EpochBatches(self._order, seeds_workers=num_workers > 0)
        self.seed = seed
        self._epoch = 0  # the epoch that the position is about
        self._batches = 0  # handed out in that epoch
        self._position: dict[str, Any] | None = None  # loaded, to be taken up by the next pass

    @property
    def initial_batch_size(self) -> int:
        """The batch size that the loader was made with."""
        return self._order.batch_size

    @property
    def limit(self) -> int | None:
        """Samples of an epoch that a rank reads at most, or None for all; to be set before the epoch."""
        return self._order.limit

    @limit.setter
    def limit(self, samples: int | None) -> None:
        self._order.limit = samples

    @property
    def same_on_all_ranks(self) -> bool:
        """Whether every rank of a distributed run reads every sample, in the same order; to be set before the epoch.

        For methods whose ranks compare candidates on one objective.
        """
        return self._order.same_on_all_ranks

    @same_on_all_ranks.setter
    def same_on_all_ranks(self, same: bool) -> None:
        self._order.same_on_all_ranks = same

    @property
    def batches_handed_out(self) -> int:
        """Batches of the present epoch that were handed out."""
        return self._batches if self._epoch == self._order.epoch else 0

    def set_batch_size(self, batch_size: int) -> None:
        """Draw batches of this size from now on, in the middle of an epoch too.

        Batches that workers have fetched already keep their size; they are handed out first. So where there are
        workers a change comes ``num_workers * prefetch_factor`` batches late, the same number after a resume.

        Args:
            batch_size: Samples a batch, on each rank; the same on every rank.

        Raises:
            ValueError: If it is not a positive integer.

        Example:
            >>> loader = ResumableLoader(range(10), batch_size=2)
            >>> batches = iter(loader)
            >>> _ = next(batches)
            >>> loader.set_batch_size(5)
            >>> [batch.tolist() for batch in batches], len(loader)
            ([[2, 3, 4, 5, 6], [7, 8, 9]], 3)
        """
        check_interval("batch_size", batch_size, 1)
        if not isinstance(batch_size, int):
            raise ValueError(f"batch_size must be an integer, got {batch_size!r}")
        self._sizes.set_size(batch_size)
        # torch forbids to set it since its own loader would not follow
        object.__setattr__(self, "batch_size", batch_size)
        if isinstance(self.batch_sampler, BatchSampler):
            self.batch_sampler.batch_size = batch_size

    def place(self, number: int) -> Place:
        """Where the batch of this number in the epoch lies, if the batch size does not change before it."""
        return self._sizes.place(number)

    @property
    def _index_sampler(self) -> Any:
        """What torch iterates over."""
        return self._sizes if self._recorder is None else self._recorder

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """One pass over what is left of the epoch.

        A generator: it starts workers and reads the epoch only when the first batch is asked for, because the Trainer
        creates the iterator of a resumed epoch before it sets the epoch.
        """
        order = self._order
        self._batches, self._position = self._first_batch(self._position), None
        self._epoch = order.epoch
        self._sizes.start(self._batches)
        order.first_sample = self._sizes.place(self._batches).start if self._batches else 0
        assert isinstance(self.generator, torch.Generator)
        self.generator.manual_seed(_mix(order.seed, order.epoch, order.rank))
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position: epoch, batches handed out, from which batch on which size, and what the order depends on."""
        order = self._order
        sizes = [list(change) for change in self._sizes.changes]
        return {**order.identity(), "epoch": order.epoch, "batches": self.batches_handed_out, "sizes": sizes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next pass continue at this position, unless another epoch is set before it starts."""
        self._position = dict(state_dict)
        self._order.set_epoch(state_dict["epoch"])
        self._epoch, self._batches = state_dict["epoch"], state_dict["batches"]
        if "sizes" in state_dict:  # else saved by a version that had one size
            self._sizes.load(state_dict["sizes"], state_dict["batches"])
            self.set_batch_size(state_dict["sizes"][-1][1])

    def _first_batch(self, position: dict[str, Any] | None) -> int:
        if position is None or position["epoch"] != self._order.epoch or position["batches"] == 0:
            return 0
        changed = [f"{k} was {position[k]} and is {v}" for k, v in self._order.identity().items() if position[k] != v]
        if changed:
            raise ValueError(
                f"Epoch {position['epoch']} cannot be continued behind batch {position['batches']}: "
                f"{', '.join(changed)}. Resume with the same values, or from a checkpoint of an epoch's end."
            )
        return position["batches"]


class _EpochBatches:
    """The batches of this rank in one epoch: how many samples each holds, however often the size changes."""

    def __init__(self, order: "_EpochSampler", *, seeds_workers: bool) -> None:
        self.order = order
        self.seeds_workers = seeds_workers
        self._changes = [(0, order.batch_size)]  # (number of a batch, size from there on), in one epoch
        self._epoch = order.epoch
        self._drawn = 0  # the number of the next batch to be drawn

    @property
    def changes(self) -> list[tuple[int, int]]:
        """From which batch of the epoch on which size."""
        return self._changes if self._epoch == self.order.epoch else [(0, self._changes[-1][1])]

    def load(self, changes: list[Any], first_batch: int) -> None:
        """Take the changes of an epoch under way, whose next batch is the first to be drawn."""
        self._changes = [(int(first), int(size)) for first, size in changes]
        self._epoch, self._drawn = self.order.epoch, first_batch

    def start(self, first_batch: int) -> None:
        """Begin a pass."""
        self._changes = self.changes if first_batch else [(0, self._changes[-1][1])]
        self._epoch, self._drawn = self.order.epoch, first_batch

    def set_size(self, size: int) -> None:
        """Draw batches of this size from now on."""
        if size == self._changes[-1][1]:
            return
        drawn = self._drawn if self._epoch == self.order.epoch else 0
        earlier = [change for change in self.changes if change[0] < drawn]
        self._changes, self._epoch, self._drawn = [*earlier, (drawn, size)], self.order.epoch, drawn

    def __len__(self) -> int:
        first, size, start = self._last_run()
        return first + self.order.batches(start, size)

    def __iter__(self) -> Iterator[list[int]]:
        order, indices = self.order, self.order.indices()
        key = (order.seed, order.epoch, order.rank)
        while self._drawn < len(self):
            number = self._drawn
            start, _, samples, _ = self.place(number)
            batch = indices[start : start + samples].tolist()
            if self.seeds_workers:
                batch[0] = _SeedingIndex.of(batch[0], (*key, number))
            self._drawn += 1
            yield batch

    def place(self, number: int) -> Place:
        """Where the batch of this number lies."""
        start, (first, size) = 0, self.changes[0]
        for later, next_size in self.changes[1:]:
            if later > number:
                break
            start, first, size = start + (later - first) * size, later, next_size
        start += (number - first) * size
        ends = [min(start + size, self.order.end(start, size, rank)) for rank in range(self.order.num_replicas)]
        return Place(start, size, max(ends[self.order.rank] - start, 0), sum(max(end - start, 0) for end in ends))

    def _last_run(self) -> tuple[int, int, int]:
        """Number of the first batch of the last size, that size, and the samples before."""
        start, (first, size) = 0, self.changes[0]
        for later, next_size in self.changes[1:]:
            start, first, size = start + (later - first) * size, later, next_size
        return first, size, start


class _EpochSampler(DistributedSampler):
    """The indices of this rank in one epoch.

    A ``DistributedSampler`` by type, which tells the Trainer not to put its own in place, but one that looks for its
    rank when it is read and not when it is made: loaders are often made before the process group.
    """

    def __init__(self, dataset: Sized, batch_size: int, shuffle: bool, seed: int, drop_last: bool) -> None:
        self.dataset: Sized = dataset  # type: ignore[assignment]
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0
        self.limit: int | None = None
        self.same_on_all_ranks = False
        self.first_sample = 0  # set by the loader when it starts a pass

    @property
    def rank(self) -> int:  # type: ignore[override]
        return dist.get_rank() if _is_distributed() and not self.same_on_all_ranks else 0

    @property
    def num_replicas(self) -> int:  # type: ignore[override]
        return dist.get_world_size() if _is_distributed() and not self.same_on_all_ranks else 1

    def identity(self) -> dict[str, int]:
        """What a position in the epoch depends on."""
        return {
            "seed": self.seed,
            "shuffle": int(self.shuffle),
            "batch_size": self.batch_size,
            "drop_last": int(self.drop_last),
            "dataset_size": len(self.dataset),
            "world_size": self.num_replicas,
        }

    def __len__(self) -> int:
        """Indices of this rank in a whole epoch of constant batch size."""
        return self.end(0, self.batch_size, self.rank)

    def __iter__(self) -> Iterator[int]:
        yield from self.indices()[self.first_sample : len(self)].tolist()

    def indices(self) -> torch.Tensor:
        """All indices of this rank in the epoch, and one more than it has where another rank has it."""
        size, ranks = len(self.dataset), self.num_replicas
        order = torch.arange(size)
        if self.shuffle:
            order = torch.randperm(size, generator=torch.Generator().manual_seed(_mix(self.seed, self.epoch)))
        # behind the end of the order it starts over, as DistributedSampler pads
        return order[(torch.arange(-(-size // ranks)) * ranks + self.rank) % max(size, 1)]

    def end(self, start: int, batch_size: int, rank: int) -> int:
        """How many indices a rank reads, if it is at ``start`` and makes batches of this size from there on.

        A rank that would make one batch fewer than the others repeats a sample: the number of batches is the same on
        every rank.
        """
        size, ranks = len(self.dataset), self.num_replicas
        own, largest = len(range(rank, size, ranks)), -(-size // ranks)
        if self.drop_last:
            own = largest = size // ranks
        if self.limit is not None:
            own, largest = min(own, self.limit), min(largest, self.limit)
        return own if -(-(own - start) // batch_size) == -(-(largest - start) // batch_size) else largest

    def batches(self, start: int, batch_size: int) -> int:
        """How many batches of this size every rank makes from ``start`` on."""
        left = max(self.end(start, batch_size, self.rank) - start, 0)
        return left // batch_size if self.drop_last else -(-left // batch_size)


class _SeedingIndex(int):
    """The first index of a batch, which seeds the random generators of the worker that it arrives in.

    torch calls nothing of ours in a worker before it fetches a batch; the indices themselves are all that travels.
    """

    key: tuple[int, ...]

    @classmethod
    def of(cls, index: int, key: tuple[int, ...]) -> "_SeedingIndex":
        """This index with this key."""
        seeding = cls(index)
        seeding.key = key
        return seeding

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (int(self), self.key)


def _arrive(index: int, key: tuple[int, ...]) -> int:
    if get_worker_info() is not None:
        random.seed(_mix(*key, 0))
        torch.manual_seed(_mix(*key, 1))
        np.random.seed(np.random.SeedSequence((*key, 2)).generate_state(8))
    return index


def _mix(*key: int) -> int:
    """A seed of 63 bits from several numbers, without the overlaps of adding them."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def _collate(fetched: Any) -> Any:
    return default_collate(fetched) if isinstance(fetched, list) else fetched


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
