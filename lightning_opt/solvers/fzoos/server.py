"""The server's part of FZooS, which is to average: over clients in this process, or over those of other processes."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .client import Client
from .evaluate import NonFiniteObjectiveError, Objective

T = TypeVar("T")


class Simulated:
    """All clients in one process.

    Args:
        clients: Of one x0 and one settings.
        objectives: Of each.
    """

    def __init__(self, clients: Sequence[Client], objectives: Sequence[Objective]) -> None:
        self._pairs = list(zip(clients, objectives, strict=True))
        self.first = clients[0]

    def round(self) -> None:
        """One round."""
        for client, objective in self._pairs:
            while not client.round_is_over:
                client.step(objective)
        point = torch.stack([client.point_message() for client, _ in self._pairs]).sum(0) / len(self._pairs)
        weights = [client.weights_message(point, objective) for client, objective in self._pairs]
        mean = torch.stack(weights).sum(0) / len(weights)
        for client, _ in self._pairs:
            client.end_round(mean)


class Rank:
    """One client in this process, and the others in others.

    A rank whose objective is not finite goes on without evaluating until the end of the round. Only there the ranks
    talk to each other, so there all of them learn of it, and all raise.

    Args:
        client: Of this rank.
        total: Sums a float64 vector over ranks.
        rank: Number of this one.
        size: How many there are.
    """

    def __init__(self, client: Client, total: Callable[[Tensor], Tensor], rank: int, size: int) -> None:
        self.first = self.client = client
        self.total, self.rank, self.size = total, rank, size
        self.failure: NonFiniteObjectiveError | None = None

    def round(self, objective: Objective) -> None:
        """One round."""
        while not self.client.round_is_over:
            before = self.client.steps
            self.attempt(lambda: self.client.step(objective))
            self.count(before)
        self.end_round(objective)

    def attempt(self, action: Callable[[], T]) -> T | None:
        """What an action returns, or None if an objective is not finite, in it or before."""
        if self.failure is None:
            try:
                return action()
            except NonFiniteObjectiveError as error:
                self.failure = error
        return None

    def count(self, before: int) -> None:
        """Count a step that a failure cut short, so that all ranks come to the end of the round together.

        Args:
            before: ``client.steps`` before the step.
        """
        if self.failure is not None and self.client.steps == before:
            self.client.skip()

    def end_round(self, objective: Objective) -> None:
        """Exchange both messages.

        Raises:
            NonFiniteObjectiveError: On every rank, if one has failed; it names that.
        """
        client = self.client
        point = self.mean(self.attempt(client.point_message), client.point_size)
        weights = self.attempt(lambda: client.weights_message(point, objective))
        client.end_round(self.mean(weights, client.weights_size))

    def mean(self, message: Tensor | None, size: int) -> Tensor:
        """The mean over ranks of messages ``[size]``; None of a rank that has failed."""
        mean = self.total(torch.full((size,), torch.nan, dtype=torch.float64) if message is None else message.clone())
        if bool(mean.isfinite().all()):
            return mean / self.size
        failed = torch.zeros(self.size, dtype=torch.float64)
        failed[self.rank] = self.failure is not None
        ranks = ", ".join(map(str, self.total(failed).nonzero().flatten().tolist()))
        raise NonFiniteObjectiveError(
            f"the objective of rank {ranks} is not finite" if ranks else "the sum over ranks is not finite"
        ) from self.failure
