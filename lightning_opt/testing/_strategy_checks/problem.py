"""The problem that strategies are tested on."""

import functools
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import IterableDataset

LR = 0.1


class Problem(pl.LightningModule):
    """A small classifier that uses no random state: the gradient of a batch is the mean over its halves.

    Args:
        plain: Without momentum and schedule.
        groups: Two parameter groups, the second with a smaller learning rate.
        frozen: Freeze one layer.
        unused: Have a layer that the loss does not depend on.
        sparse: Have an embedding with sparse gradients.
        compiled: Compile the inner network.
        manual: Optimize by hand.
        fail_at: Raise ``error`` in this batch, counted from 0, on every rank.
        poisoned_at: In this batch the loss of rank 1 is infinite.

    Attributes:
        batches: How many training batches have begun.
        moves: By step, the Euclidean length of what the step added to the parameters.
    """

    options = ("plain", "groups", "frozen", "unused", "sparse", "compiled", "manual", "fail_at", "poisoned_at")

    def __init__(
        self,
        *,
        plain: bool = False,
        groups: bool = False,
        frozen: bool = False,
        unused: bool = False,
        sparse: bool = False,
        compiled: bool = False,
        manual: bool = False,
        fail_at: int | None = None,
        poisoned_at: int | None = None,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3))
            self.unused = nn.Linear(2, 2) if unused else None
            self.embedding = nn.Embedding(6, 3, sparse=True) if sparse else None
        if frozen:
            net[2].requires_grad_(False)
        self.net: nn.Module = torch.compile(net, backend="eager") if compiled else net  # type: ignore[assignment]
        self.plain, self.groups, self.fail_at, self.poisoned_at = plain, groups, fail_at, poisoned_at
        self.error = RuntimeError("planted by the check")
        self.automatic_optimization = not manual
        self.batches = 0
        self.moves: list[float] = []
        self._last = self._flat()

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count; ``training_step`` may be called many times a batch."""
        self.batches += 1

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        if self.fail_at is not None and self.batches > self.fail_at:
            raise self.error
        loss = self._loss(batch)
        if self.poisoned_at is not None and self.batches == self.poisoned_at + 1 and dist.get_rank() == 1:
            loss = loss * float("inf")
        self.log("train/loss", loss)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            assert not isinstance(optimizer, list)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure what the step before has done."""
        self.measure()

    def measure(self) -> None:
        """Keep how far the parameters have moved since they were last seen, if they have."""
        now = self._flat()
        move = (now - self._last).norm().item()
        if move:
            self.moves.append(move)
        self._last = now

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Cross-entropy."""
        self.log("val/loss", self._loss(batch), sync_dist=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Cross-entropy."""
        self.log("test/loss", self._loss(batch), sync_dist=True)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Logits."""
        return self._logits(batch[0])

    def configure_optimizers(self) -> Any:
        """SGD, with a schedule by step."""
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": [p for _, p in named]}]
        if self.groups:
            groups = [
                {"params": [p for name, p in named if "weight" in name]},
                {"params": [p for name, p in named if "weight" not in name], "lr": LR / 2},
            ]
        plain = self.plain or self.embedding is not None
        optimizer = torch.optim.SGD(groups, lr=LR, momentum=0.0 if plain else 0.9)
        if plain:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def _logits(self, inputs: Tensor) -> Tensor:
        logits = self.net(inputs)
        return logits if self.embedding is None else logits + self.embedding(inputs.argmax(dim=1))

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self._logits(inputs), labels)

    def _flat(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters()])


class WithoutLength(IterableDataset):
    """The training data as a stream, the same on every rank."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(*data(), strict=True))


@functools.cache
def data() -> tuple[Tensor, Tensor]:
    """48 examples."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(48, 6, generator=generator)
    return inputs, (inputs @ torch.randn(6, 3, generator=generator)).argmax(dim=1)
