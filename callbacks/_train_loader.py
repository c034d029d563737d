from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_opt.data import ResumableLoader

_KEPT = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
)


def as_resumable(loader: Any, who: str, seed: int) -> ResumableLoader:
    """A loader whose batch size can change, reading what the user's loader reads.

    A :class:`ResumableLoader` is returned as it is. A plain DataLoader over a dataset with a length, in order or
    shuffled, is made anew as one, which is said.

    Args:
        loader: What the Trainer would train on.
        who: The plugin that asks.
        seed: Of the shuffling.

    Raises:
        MisconfigurationException: For anything else, with what to do.
    """
    if isinstance(loader, ResumableLoader):
        return loader
    use = "use lightning_opt.data.ResumableLoader for the training data"
    if type(loader) is not DataLoader:
        raise MisconfigurationException(
            f"{who} changes the batch size of one training loader, and got {type(loader).__name__}; {use}."
        )
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise MisconfigurationException(
            f"{who} needs a dataset with a length that is read by index, and {type(loader.dataset).__name__} is a"
            f" stream; read it into a dataset with __len__ and __getitem__ and {use}."
        )
    if type(loader.batch_sampler) is not BatchSampler or loader.batch_size is None:
        raise MisconfigurationException(
            f"{who} makes the batches itself and cannot change those of {type(loader.batch_sampler).__name__};"
            f" leave batch_sampler out and {use}."
        )
    sampler: Any = loader.sampler
    if type(sampler) is DistributedSampler:
        shuffle, seed = sampler.shuffle, sampler.seed
    elif type(sampler) in (RandomSampler, SequentialSampler) and not getattr(sampler, "replacement", False):
        shuffle = type(sampler) is RandomSampler
    else:
        raise MisconfigurationException(
            f"{who} draws the samples itself, each once an epoch, and cannot follow {type(sampler).__name__};"
            f" leave the sampler out and {use}."
        )
    kept = {name: getattr(loader, name) for name in _KEPT}
    if loader.num_workers == 0:
        kept.pop("prefetch_factor")
    collate_fn = None if loader.collate_fn is default_collate else loader.collate_fn
    rank_zero_info(
        f"{who} reads the training data through lightning_opt.data.ResumableLoader(batch_size={loader.batch_size},"
        f" shuffle={shuffle}, seed={seed}) in the place of your DataLoader, whose batch size cannot change; the order"
        " of the samples is that of this seed."
    )
    return ResumableLoader(
        loader.dataset,
        loader.batch_size,
        shuffle=shuffle,
        seed=seed,
        drop_last=loader.drop_last,
        collate_fn=collate_fn,
        **kept,
    )
