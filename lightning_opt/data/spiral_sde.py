from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_opt._checks import check_interval
from lightning_opt.registry import register

from .split_data_module import SplitDataModule

TrajectoryBatch = tuple[Tensor, Tensor]


@register("data", summary="Trajectories of the spiral SDE, for neural SDEs; generated, no download")
class SpiralSDE(SplitDataModule):
    r"""Trajectories of a stochastic spiral in the plane, the example of SciML's tutorial on neural SDEs.

    .. math:: dx = (-0.1\, x^3 + 2\, y^3)\, dt + \sigma x \, dW_1, \qquad
        dy = (-2\, x^3 - 0.1\, y^3)\, dt + \sigma y \, dW_2, \qquad (x, y)(0) = (2, 0)

    in the sense of Ito. A batch is ``(times, trajectories)``: ``[B, T]``, equally spaced from 0 to 1, and
    ``[B, T, 2]``, float32. They are simulated in float64 by Milstein's method, of strong order 1, with ``num_steps``
    steps, and depend on the split and ``split_seed`` alone; training, validation and test trajectories have their own
    noise.

    Args:
        train_size: Number of trajectories to train on.
        val_size: To validate on.
        test_size: To test on.
        num_times: Times, both ends included.
        noise: :math:`\sigma`.
        num_steps: Steps of the simulation; a multiple of ``num_times - 1``.
        batch_size: Trajectories in a training batch.
        eval_batch_size: Trajectories in a batch of validation, test and prediction.
        seed: Seed of the order of the training trajectories.
        split_seed: Seed of the trajectories.
        drop_last: Leave out an incomplete last training batch.
        num_workers: Processes that load batches.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> data = SpiralSDE(train_size=20, num_times=11, batch_size=8)
        >>> data.setup()
        >>> times, trajectories = next(iter(data.train_dataloader()))
        >>> times.shape, trajectories.shape, trajectories[0, 0].tolist()
        (torch.Size([8, 11]), torch.Size([8, 11, 2]), [2.0, 0.0])
    """

    start = (2.0, 0.0)
    matrix = ((-0.1, 2.0), (-2.0, -0.1))
    train_set: "TrajectoryDataset | None"
    val_set: "TrajectoryDataset | None"
    test_set: "TrajectoryDataset | None"

    def __init__(
        self,
        *,
        train_size: int = 2000,
        val_size: int = 1000,
        test_size: int = 2000,
        num_times: int = 11,
        noise: float = 0.2,
        num_steps: int = 1000,
        batch_size: int = 200,
        eval_batch_size: int = 2000,
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
        for name, size in {"train_size": train_size, "val_size": val_size, "test_size": test_size}.items():
            check_interval(name, size, 2)  # a variance
        check_interval("num_times", num_times, 2)
        check_interval("noise", noise, 0)
        check_interval("num_steps", num_steps, 1)
        check_interval("split_seed", split_seed, 0)
        if num_steps % (num_times - 1):
            raise ValueError(f"num_steps must be a multiple of num_times - 1 = {num_times - 1}, got {num_steps}")
        self.train_size, self.val_size, self.test_size = train_size, val_size, test_size
        self.num_times, self.noise, self.num_steps, self.split_seed = num_times, noise, num_steps, split_seed

    def setup(self, stage: str | None = None) -> None:
        """Simulate the three parts, once."""
        if self.train_set is None:
            self.train_set, self.val_set, self.test_set = (
                TrajectoryDataset(self.times().float(), self._simulate(part, size).float())
                for part, size in enumerate((self.train_size, self.val_size, self.test_size))
            )

    def times(self) -> Tensor:
        """``[T]``, float64."""
        return torch.linspace(0, 1, self.num_times, dtype=torch.float64)

    def simulate(self, increments: Tensor) -> Tensor:
        """Trajectories ``[N, T, 2]``, float64, over increments ``[steps, N, 2]`` of the Brownian motions."""
        steps, count, _ = increments.shape
        h, every = 1 / steps, steps // (self.num_times - 1)
        matrix = torch.tensor(self.matrix, dtype=torch.float64)
        y = torch.tensor(self.start, dtype=torch.float64).expand(count, 2)
        kept = [y]
        for step, dw in enumerate(increments, start=1):
            correction = self.noise**2 / 2 * (dw**2 - h)  # of Milstein: g g' (dW^2 - h) / 2
            y = y + h * y**3 @ matrix.T + y * (self.noise * dw + correction)
            if step % every == 0:
                kept.append(y)
        return torch.stack(kept, dim=1)

    def _simulate(self, part: int, size: int) -> Tensor:
        generator = torch.Generator().manual_seed(3 * self.split_seed + part)
        shape = (self.num_steps, size, 2)
        return self.simulate(torch.randn(shape, generator=generator, dtype=torch.float64) * self.num_steps**-0.5)


class TrajectoryDataset(Dataset[TrajectoryBatch]):
    """Trajectories at the same times; indexed with a whole batch at once (``__getitems__``).

    Args:
        times: ``[T]``.
        trajectories: ``[N, T, dim]``.
    """

    def __init__(self, times: Tensor, trajectories: Tensor) -> None:
        self.times, self.trajectories = times, trajectories

    def __len__(self) -> int:
        return len(self.trajectories)

    def __getitem__(self, index: int) -> TrajectoryBatch:
        return self.times, self.trajectories[index]

    def __getitems__(self, indices: Sequence[int]) -> TrajectoryBatch:
        rows = torch.as_tensor(indices)
        return self.times.expand(len(rows), -1), self.trajectories[rows]
