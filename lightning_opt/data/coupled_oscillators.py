import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_opt._checks import check_interval
from lightning_opt.registry import register

from .split_data_module import SplitDataModule

SeriesBatch = tuple[Tensor, Tensor, Tensor]


@register("data", summary="Damped coupled oscillators, observed at irregular times with gaps; generated, no download")
class CoupledOscillators(SplitDataModule):
    r"""Irregular time series: positions and velocities of two masses between springs, observed now and then.

    A batch is ``(times, values, observed)``: ``[B, T]``, ``[B, T, 4]`` and bool ``[B, T, 4]``. The channels are the two
    positions and the two velocities over the stiffest natural frequency. All series share one irregular grid of times
    from 0 to 1, but each is observed at a random part of it, and a channel may be missing where the others are there:
    ``values`` is 0 where ``observed`` is not. Every series has at least one value, at the first time.

    The masses obey :math:`x'' = -\Omega^2 K x - \gamma x'` with :math:`K = ((1 + \kappa, -\kappa), (-\kappa, 1 +
    \kappa))`. Every series has its own start, drawn from a normal distribution; all have the same system. The states
    are exact, by the matrix exponential in float64; observations are these and noise. They depend on the number of the
    series and ``split_seed`` alone: a smaller data set is the beginning of a larger one.

    Args:
        train_size: Number of series to train on.
        val_size: To validate on.
        test_size: To test on.
        num_times: Times of the grid.
        frequency: Cycles of the slower mode in the time span.
        coupling: :math:`\kappa`, the middle spring over an outer one.
        damping: :math:`\gamma`.
        noise: Standard deviation of the noise; starts have standard deviation 1.
        time_rate: Probability that a series is observed at a time at all.
        channel_rate: Probability that a channel is then there.
        batch_size: Series in a training batch.
        eval_batch_size: Series in a batch of validation, test and prediction.
        seed: Seed of the order of the training series.
        split_seed: Seed of the series.
        drop_last: Leave out an incomplete last training batch.
        num_workers: Processes that load batches.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> data = CoupledOscillators(train_size=20, num_times=10, batch_size=8)
        >>> data.setup()
        >>> times, values, observed = next(iter(data.train_dataloader()))
        >>> times.shape, values.shape, observed.dtype
        (torch.Size([8, 10]), torch.Size([8, 10, 4]), torch.bool)
    """

    channels = ("position 1", "position 2", "velocity 1", "velocity 2")
    train_set: "SeriesDataset | None"
    val_set: "SeriesDataset | None"
    test_set: "SeriesDataset | None"

    def __init__(
        self,
        *,
        train_size: int = 800,
        val_size: int = 200,
        test_size: int = 200,
        num_times: int = 40,
        frequency: float = 1.5,
        coupling: float = 0.5,
        damping: float = 1.0,
        noise: float = 0.05,
        time_rate: float = 0.5,
        channel_rate: float = 0.7,
        batch_size: int = 100,
        eval_batch_size: int = 200,
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
        sizes = {"train_size": train_size, "val_size": val_size, "test_size": test_size, "num_times": num_times}
        for name, size in sizes.items():
            check_interval(name, size, 2 if name == "num_times" else 1)
        check_interval("frequency", frequency, 0, closed="()")
        for name, number in {
            "coupling": coupling,
            "damping": damping,
            "noise": noise,
            "split_seed": split_seed,
        }.items():
            check_interval(name, number, 0)
        check_interval("time_rate", time_rate, 0, 1)
        check_interval("channel_rate", channel_rate, 0, 1)
        self.train_size, self.val_size, self.test_size, self.num_times = train_size, val_size, test_size, num_times
        self.frequency, self.coupling, self.damping, self.noise = frequency, coupling, damping, noise
        self.time_rate, self.channel_rate = time_rate, channel_rate
        self.split_seed = split_seed

    @property
    def system(self) -> Tensor:
        """The matrix ``[4, 4]`` of the first-order system of the channels, float64."""
        omega = 2 * math.pi * self.frequency
        fastest = omega * math.sqrt(1 + 2 * self.coupling)  # the masses against each other
        spring = torch.tensor([[1 + self.coupling, -self.coupling], [-self.coupling, 1 + self.coupling]]).double()
        identity = torch.eye(2, dtype=torch.float64)
        top = torch.cat([torch.zeros_like(identity), fastest * identity], dim=1)
        return torch.cat([top, torch.cat([-(omega**2) / fastest * spring, -self.damping * identity], dim=1)])

    def states(self, starts: Tensor, times: Tensor) -> Tensor:
        """The exact channels ``[N, T, 4]`` at times ``[T]`` from starts ``[N, 4]``, float64."""
        flows = torch.linalg.matrix_exp(times.double()[:, None, None] * self.system)
        return torch.einsum("tij,nj->nti", flows, starts.double())

    def times(self) -> Tensor:
        """The grid ``[T]``, float64: 0, 1, and points drawn uniformly between."""
        inner = torch.rand(self.num_times - 2, generator=self._generator(3), dtype=torch.float64)
        return torch.cat([torch.zeros(1).double(), inner.sort().values, torch.ones(1).double()])

    def setup(self, stage: str | None = None) -> None:
        """Generate the three parts, once."""
        if self.train_set is None:
            self.train_set, self.val_set, self.test_set = (
                self._generate(number, size)
                for number, size in enumerate((self.train_size, self.val_size, self.test_size))
            )

    def _generate(self, part: int, size: int) -> "SeriesDataset":
        times, count = self.times(), len(self.channels)
        generator = self._generator(part)
        starts, values, observed = [], [], []
        for _ in range(size):  # one after the other, so that the size does not change what is drawn
            starts.append(torch.randn(count, generator=generator, dtype=torch.float64))
            values.append(torch.randn(self.num_times, count, generator=generator, dtype=torch.float64))
            there = torch.rand(self.num_times, 1, generator=generator) < self.time_rate
            channel = torch.rand(self.num_times, count, generator=generator) < self.channel_rate
            there = there & channel
            there[0, 0] |= ~there.any()
            observed.append(there)
        seen = torch.stack(observed)
        noisy = self.states(torch.stack(starts), times) + self.noise * torch.stack(values)
        return SeriesDataset(times.float(), torch.where(seen, noisy, 0.0).float(), seen)

    def _generator(self, part: int) -> torch.Generator:
        return torch.Generator().manual_seed(4 * self.split_seed + part)


class SeriesDataset(Dataset[Any]):
    """Series on one grid of times; indexed with a whole batch at once (``__getitems__``).

    Args:
        times: ``[T]``.
        values: ``[N, T, C]``.
        observed: Which values are there, bool ``[N, T, C]``.
    """

    def __init__(self, times: Tensor, values: Tensor, observed: Tensor) -> None:
        self.times, self.values, self.observed = times, values, observed

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> SeriesBatch:
        return self.times, self.values[index], self.observed[index]

    def __getitems__(self, indices: Sequence[int]) -> SeriesBatch:
        rows = torch.as_tensor(indices)
        return self.times.expand(len(rows), -1), self.values[rows], self.observed[rows]
