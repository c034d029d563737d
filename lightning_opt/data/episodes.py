import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_opt._checks import check_interval
from lightning_opt.registry import register

from .resumable_loader import ResumableLoader


@register("data", summary="Seeds of episodes, for modules that play them")
class Episodes(pl.LightningDataModule):
    """The data of reinforcement learning: batches of seeds, from which an environment makes episodes.

    A batch is int64 ``[B]``, one seed an episode; those of training, validation and test are different. A module such
    as :class:`lightning_opt.models.GymnasiumPolicy` plays them.

    Args:
        batch_size: Episodes of a training batch.
        eval_batch_size: Episodes played at once in validation and test.
        batches: Training batches of an epoch.
        val_episodes: Episodes to validate on.
        test_episodes: Episodes to test on.
        seed: Seed of the order of the training seeds.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> data = Episodes(batch_size=5, batches=10)
        >>> data.setup()
        >>> next(iter(data.train_dataloader())).shape, len(data.train_dataloader())
        (torch.Size([5]), 10)
    """

    def __init__(
        self,
        *,
        batch_size: int = 1,
        eval_batch_size: int = 20,
        batches: int = 100,
        val_episodes: int = 20,
        test_episodes: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("batches", batches),
            ("val_episodes", val_episodes),
            ("test_episodes", test_episodes),
        ):
            check_interval(name, value, 1)
        check_interval("seed", seed, 0)
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        self.batches, self.val_episodes, self.test_episodes = batches, val_episodes, test_episodes

    def setup(self, stage: str | None = None) -> None:
        """Nothing is read: seeds are counted."""
        self.val_seeds = _Seeds(0, self.val_episodes)
        self.test_seeds = _Seeds(self.val_episodes, self.test_episodes)
        self.train_seeds = _Seeds(self.val_episodes + self.test_episodes, self.batch_size * self.batches)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Seeds in an order that depends on ``seed`` and the epoch."""
        return self._loader(self.train_seeds, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """The same seeds in every validation."""
        return self._loader(self.val_seeds, self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Seeds that no training or validation sees."""
        return self._loader(self.test_seeds, self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """Those of the test."""
        return self.test_dataloader()

    def _loader(self, seeds: Dataset[Tensor], batch_size: int, *, shuffle: bool = False) -> DataLoader[Tensor]:
        warnings.filterwarnings("ignore", ".*does not have many workers.*", category=PossibleUserWarning)
        return ResumableLoader(seeds, batch_size=batch_size, shuffle=shuffle, seed=self.seed)


class _Seeds(Dataset[Tensor]):
    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(self.first + index)

    def __getitems__(self, indices: list[int]) -> Tensor:
        return self.first + torch.as_tensor(indices)
