"""The local optimizer of the clients: Adam, for one vector in float64."""

import torch
from torch import Tensor


class Adam:
    """Adam's steps (arXiv:1412.6980) for a vector; its moments start from zero every round.

    Args:
        lr: Rate.
        like: A vector of the size.

    Attributes:
        first: Mean of gradients.
        second: Mean of their squares.
        steps: Steps so far.
    """

    def __init__(self, lr: float, like: Tensor) -> None:
        self.lr = lr
        self.first, self.second = torch.zeros_like(like), torch.zeros_like(like)
        self.steps = 0

    def step(self, gradient: Tensor) -> Tensor:
        """What is to be subtracted from the vector."""
        self.steps += 1
        self.first = self.first.lerp(gradient, 1 - _BETAS[0])
        self.second = self.second.lerp(gradient.square(), 1 - _BETAS[1])
        first, second = self.first / (1 - _BETAS[0] ** self.steps), self.second / (1 - _BETAS[1] ** self.steps)
        return self.lr * first / (second.sqrt() + _EPS)


_BETAS, _EPS = (0.9, 0.999), 1e-8
