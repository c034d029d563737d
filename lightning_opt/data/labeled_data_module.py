import abc
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import Dataset

from lightning_opt._checks import check_interval

from .split_data_module import Batch, SplitDataModule, check_size

Split = Literal["train", "test"]


class LabeledDataModule(SplitDataModule, abc.ABC):
    """Labeled samples that fit into memory, as one tensor, with a stratified validation split.

    A batch is ``(inputs, labels)``: the inputs as a subclass gives them, and int64 ``[B]``. It is one indexing
    operation on the tensor of all samples, not a Python loop over samples, which on a CPU takes about as long as the
    training step of a small network.

    A subclass sets the class attributes below and reads the samples in :meth:`load`; where they must be fetched first,
    it does so in ``prepare_data``, which Lightning calls on one process of each machine.

    Attributes:
        classes: The names of the classes, in the order of the labels.
        noun: What a sample is called in messages, in the plural.

    Args:
        batch_size: Samples in a training batch.
        eval_batch_size: Samples in a batch of validation, test and prediction.
        val_size: Share (float below 1) or number (int) of the training samples to validate on. To train without
            validation set the Trainer's ``limit_val_batches=0``.
        train_size: Train on a stratified subset of this many samples; ``None`` for all that validation leaves. A
            smaller subset is part of a larger one.
        seed: Seed of the order of the training batches.
        split_seed: Seed of the choice of validation samples and subset.
        drop_last: Leave out an incomplete last training batch, for example because BatchNorm fails on one sample.
        num_workers: Processes that load batches. With samples in memory 0 is fastest, and Lightning's advice to take
            more is silenced; workers, if any, persist over epochs.

    Raises:
        ValueError: If a number is out of its range.
        MisconfigurationException: In ``setup``, if there are fewer samples than asked for.

    Cost: the memory of the samples in their own dtype, twice that for a moment while they are split.

    Example:
        >>> class Signs(LabeledDataModule):
        ...     classes = ("negative", "positive")
        ...
        ...     def load(self, split):
        ...         inputs = torch.linspace(-1, 1, 100)[:, None]
        ...         return inputs, (inputs[:, 0] > 0).long()
        >>> data = Signs(batch_size=10, val_size=20)
        >>> data.setup("fit")
        >>> inputs, labels = next(iter(data.train_dataloader()))
        >>> inputs.shape, bool(((inputs[:, 0] > 0) == labels).all()), len(data.train_dataloader())
        (torch.Size([10, 1]), True, 8)
    """

    train_set: "LabeledDataset | None"
    val_set: "LabeledDataset | None"
    test_set: "LabeledDataset | None"
    classes: tuple[str, ...]
    noun: ClassVar[str] = "samples"

    def __init__(
        self,
        *,
        batch_size: int = 64,
        eval_batch_size: int = 512,
        val_size: int | float = 0.1,
        train_size: int | None = None,
        seed: int = 0,
        split_seed: int = 0,
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
        check_size("val_size", val_size)
        if train_size is not None:
            check_interval("train_size", train_size, 1)
        check_interval("split_seed", split_seed, 0)
        self.val_size = val_size
        self.train_size = train_size
        self.split_seed = split_seed

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @abc.abstractmethod
    def load(self, split: Split) -> tuple[Tensor, Tensor]:
        """Read all samples of one split.

        Args:
            split: ``"train"`` is divided into training and validation samples afterwards.

        Returns:
            Inputs ``[N, ...]`` and labels ``[N]`` of an integer dtype.
        """

    def make_dataset(self, inputs: Tensor, labels: Tensor) -> "LabeledDataset":
        """The dataset of a part of the samples; a subclass may prepare batches in its own."""
        return LabeledDataset(inputs, labels)

    def setup(self, stage: str | None = None) -> None:
        """Read what a stage needs (``"fit"``, ``"validate"``, ``"test"``, ``"predict"``), all for ``None``."""
        splits = splits_of(stage)
        if "train" in splits and self.train_set is None:
            self._split(*self.load("train"))
        if "test" in splits and self.test_set is None:
            self.test_set = self.make_dataset(*self.load("test"))

    def _split(self, inputs: Tensor, labels: Tensor) -> None:
        val = round(self.val_size * len(labels)) if isinstance(self.val_size, float) else self.val_size
        train = len(labels) - val if self.train_size is None else self.train_size
        if min(val, train) < 1 or val + train > len(labels):
            raise MisconfigurationException(
                f"{type(self).__name__} has {len(labels)} {self.noun} for training and validation:"
                f" val_size={self.val_size} takes {val} and leaves {max(len(labels) - val, 0)},"
                f" train_size={self.train_size} asks for {'at least 1' if self.train_size is None else train}"
            )
        order = stratified_order(labels, self.split_seed)
        val_part, train_part = order[:val].sort().values, order[val : val + train].sort().values
        self.val_set = self.make_dataset(inputs[val_part], labels[val_part])
        self.train_set = self.make_dataset(inputs[train_part], labels[train_part])


class LabeledDataset(Dataset[Batch]):
    """All samples of a split in one tensor; indexed with a whole batch at once (``__getitems__``).

    :class:`ResumableLoader` hands such a batch on as it is; a plain ``DataLoader`` needs a ``collate_fn`` that does.

    Args:
        inputs: ``[N, ...]``, kept as they are.
        labels: ``[N]``.
        noun: What a sample is called in messages, in the plural.

    Raises:
        ValueError: If there are not as many labels as inputs.
    """

    def __init__(self, inputs: Tensor, labels: Tensor, noun: str = "samples") -> None:
        if len(inputs) != len(labels):
            raise ValueError(f"{len(inputs)} {noun} but {len(labels)} labels")
        self.inputs = inputs
        self.labels = labels.long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        inputs, labels = self.__getitems__([index])
        return inputs[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(indices)
        return self.inputs[chosen], self.labels[chosen]


def splits_of(stage: str | None) -> tuple[Split, ...]:
    """The splits that a stage of the Trainer reads; all for ``None``."""
    if stage in ("fit", "validate"):
        return ("train",)
    return ("test",) if stage in ("test", "predict") else ("train", "test")


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """A random order in which every prefix, and so every slice, has the classes in their shares.

    The k-th member of a class of n, in random order, is put at (k + 1/2) / n of the way; ties are in random order.

    Args:
        labels: ``[N]``, integer.
        seed: Seed of the order; the global random state is neither used nor changed.

    Returns:
        A permutation of ``range(N)``, int64.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1])
        >>> labels[stratified_order(labels, seed=0)[:3]].bincount()
        tensor([2, 1])
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = labels[shuffled] == label
        count = int(members.sum())
        position[members] = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return shuffled[position.argsort(stable=True)]
