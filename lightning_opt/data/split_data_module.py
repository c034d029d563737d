import warnings

import lightning.pytorch as pl
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_opt._checks import check_interval

from .resumable_loader import ResumableLoader

Batch = tuple[Tensor, Tensor]


class SplitDataModule(pl.LightningDataModule):
    """Loaders over training, validation and test sets that fit into memory; a subclass makes the sets in ``setup``.

    Attributes:
        train_set: None before ``setup``, and so the others.
        val_set: Read in order.
        test_set: Read in order, also to predict.

    Args:
        batch_size: Samples in a training batch.
        eval_batch_size: Samples in a batch of validation, test and prediction.
        seed: Seed of the order of the training batches.
        drop_last: Leave out an incomplete last training batch.
        num_workers: Processes that load batches, and persist over epochs. With samples in memory 0 is fastest, and
            Lightning's advice to take more is silenced.

    Raises:
        ValueError: If a number is out of its range.
    """

    train_set: Dataset[Batch] | None
    val_set: Dataset[Batch] | None
    test_set: Dataset[Batch] | None

    def __init__(
        self, *, batch_size: int, eval_batch_size: int, seed: int = 0, drop_last: bool = False, num_workers: int = 0
    ) -> None:
        super().__init__()
        check_interval("batch_size", batch_size, 1)
        check_interval("eval_batch_size", eval_batch_size, 1)
        check_interval("seed", seed, 0)
        check_interval("num_workers", num_workers, 0)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.num_workers = num_workers
        self.train_set = self.val_set = self.test_set = None

    def train_dataloader(self) -> DataLoader[Batch]:
        """The training samples in an order that depends on ``seed`` and the epoch."""
        return self._loader(self.train_set, self.batch_size, shuffle=True, drop_last=self.drop_last)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation samples, in their order in the data."""
        return self._loader(self.val_set, self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test samples, in their order in the data."""
        return self._loader(self.test_set, self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test samples, in their order in the data."""
        return self._loader(self.test_set, self.eval_batch_size)

    def _loader(
        self, dataset: Dataset[Batch] | None, batch_size: int, *, shuffle: bool = False, drop_last: bool = False
    ) -> DataLoader[Batch]:
        if dataset is None:
            raise RuntimeError(f"call setup() of {type(self).__name__} first; the Trainer does so by itself")
        if self.num_workers == 0:
            warnings.filterwarnings("ignore", ".*does not have many workers.*", category=PossibleUserWarning)
        return ResumableLoader(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=self.seed,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


def check_size(name: str, size: int | float) -> None:
    """Raise ``ValueError`` unless ``size`` is a share (a float in (0, 1)) or a positive number (an int)."""
    if isinstance(size, float):
        check_interval(f"{name} as a share", size, 0, 1, closed="()")
    else:
        check_interval(name, size, 1)
