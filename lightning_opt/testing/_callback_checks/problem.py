"""The problem that callbacks are tested on."""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from lightning_opt.ode import NeuralODE


class Problem(pl.LightningModule):
    """A small classifier with what a run may lose: dropout, BatchNorm, a schedule and Adam's state.

    Args:
        plain: Leave dropout and BatchNorm out, and train by SGD: no random state is used, and the loss of a batch is
            the mean over its halves.
        groups: Two parameter groups, the second with another learning rate.
        frozen: Freeze one layer, and never use another.
        compiled: Compile the inner network.
        manual: Optimize by hand.
        scheduled: Have a schedule.
        ode: Have a layer that solves a differential equation.
        adam: Train by Adam, where it is not plain; otherwise by SGD with momentum.
        fail_at: Raise ``error`` in this batch, counted from 0.

    Attributes:
        batches: How many training batches have begun.
        seen: The epoch and the numbers of the examples of each training batch.
        steps: For each optimizer step the number of batches that had begun, and the options of each group.
    """

    options = ("plain", "groups", "frozen", "compiled", "manual", "scheduled", "adam", "ode", "fail_at")

    def __init__(
        self,
        *,
        plain: bool = False,
        groups: bool = False,
        frozen: bool = False,
        compiled: bool = False,
        manual: bool = False,
        scheduled: bool = True,
        adam: bool = True,
        ode: bool = False,
        fail_at: int | None = None,
    ) -> None:
        super().__init__()
        noise = [] if plain else [nn.BatchNorm1d(8), nn.Dropout(0.3)]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            solve = [NeuralODE(_Dynamics(), method="bosh3", rtol=1e-2, atol=1e-2)] if ode else []
            net = nn.Sequential(nn.Linear(6, 8), *noise, nn.Tanh(), *solve, nn.Linear(8, 8), nn.Linear(8, 3))
            self.unused = nn.Linear(2, 2) if frozen else None
        if frozen:
            net[-2].requires_grad_(False)
        self.net: nn.Module = torch.compile(net, backend="eager") if compiled else net  # type: ignore[assignment]
        self.plain, self.groups, self.scheduled, self.adam, self.fail_at = plain, groups, scheduled, adam, fail_at
        self.error = RuntimeError("planted by the check")
        self.automatic_optimization = not manual
        self.batches = 0
        self.seen: list[tuple[int, Tensor]] = []
        self.steps: list[tuple[int, list[dict[str, Any]]]] = []
        self.made: list[torch.optim.Optimizer] = []

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Keep what is trained on; ``training_step`` may be called by a callback too."""
        self.batches += 1
        self.seen.append((self.current_epoch, torch.cdist(batch[0].float(), data()[0]).argmin(dim=1)))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep what the step is made with, behind the callbacks' hooks."""
        options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        self.steps.append((self.batches, copy.deepcopy(options)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits."""
        return self.net(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        if self.fail_at is not None and self.batches > self.fail_at:
            raise self.error
        loss = self._loss(batch)
        self.log("train/loss", loss)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            assert not isinstance(optimizer, list)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Cross-entropy."""
        self.log("val/loss", self._loss(batch))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Cross-entropy."""
        self.log("test/loss", self._loss(batch))

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Logits."""
        return self.net(batch[0])

    def sample(self, num: int, *, generator: torch.Generator, progress: Any = iter) -> Tensor:
        """What the network makes of noise, as images of one row; a generative module draws such ones."""
        noise = torch.randn(num, 6, generator=generator, device=self.device)
        return self.net(noise).sigmoid()[:, None, None]

    def configure_optimizers(self) -> Any:
        """Adam or SGD with a schedule by step."""
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": [p for _, p in named]}]
        if self.groups:
            groups = [
                {"params": [p for name, p in named if "weight" in name]},
                {"params": [p for name, p in named if "weight" not in name], "lr": 0.05},
            ]
        optimizer: torch.optim.Optimizer = torch.optim.Adam(groups, lr=0.01)
        if self.plain or not self.adam:
            optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.0 if self.plain else 0.9)
        self.made = [optimizer]
        if not self.scheduled:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self(inputs), labels)


class _Dynamics(nn.Module):
    """Of the layer that solves a differential equation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The derivative of the state."""
        return torch.tanh(self.linear(y)) * (1 + t)


class WithoutLength(IterableDataset):
    """The training data as a stream."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(*data(), strict=True))


@functools.cache
def data() -> tuple[Tensor, Tensor]:
    """48 examples."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(48, 6, generator=generator)
    return inputs, (inputs @ torch.randn(6, 3, generator=generator)).argmax(dim=1)
