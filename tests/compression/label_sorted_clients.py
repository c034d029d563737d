"""Softmax regression on scikit-learn's digits, whose ten clients hold the images in the order of their labels."""

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from lightning_opt.compression import CompressionState

CLIENTS, SIZE, DECAY = 10, 650, 1e-3


class LabelSortedClients:
    """The loss of each client is the mean cross-entropy of its images, plus decay; their mean is to be minimized."""

    def __init__(self) -> None:
        pixels, labels = load_digits(return_X_y=True)
        order = torch.tensor(labels).argsort(stable=True)
        x = functional.pad(torch.tensor(pixels)[order] / 16, (0, 1), value=1.0)
        y = functional.one_hot(torch.tensor(labels)[order], 10).double()
        parts = torch.arange(len(x)).tensor_split(CLIENTS)
        most = max(map(len, parts))
        weight = torch.stack(
            [functional.pad(torch.full((len(p),), 1 / len(p)).double(), (0, most - len(p))) for p in parts]
        )
        pad = lambda t: torch.stack([functional.pad(t[p], (0, 0, 0, most - len(p))) for p in parts])  # noqa: E731
        self.x, self.y, self.weight = pad(x), pad(y), weight[..., None]

    def gradients(self, w: Tensor) -> Tensor:
        """Of each client, (10, 650)."""
        outputs = self.x @ w.view(10, 65).T
        residual = (torch.softmax(outputs, -1) - self.y) * self.weight
        return (residual.mT @ self.x).flatten(1) + DECAY * w

    def loss(self, w: Tensor) -> Tensor:
        """The mean over clients."""
        outputs = self.x @ w.view(10, 65).T
        cross = -(torch.log_softmax(outputs, -1) * self.y * self.weight).sum() / CLIENTS
        return cross + DECAY / 2 * w @ w

    def minimum(self) -> float:
        """Of the mean loss."""
        w = torch.zeros(SIZE, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [w], max_iter=1000, history_size=50, line_search_fn="strong_wolfe", tolerance_grad=1e-9
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(w)
            loss.backward()
            return loss

        optimizer.step(closure)
        return float(self.loss(w.detach()))

    @torch.no_grad()
    def train(self, states: Sequence[CompressionState], steps: int, lr: float = 1.0) -> Tensor:
        """The weights after so many steps with full gradients; without states those of dense gradient descent."""
        w = torch.zeros(SIZE, dtype=torch.float64)
        for _ in range(steps):
            gradients = self.gradients(w)
            w = w - lr * (average(states, gradients) if states else gradients.mean(0))
        return w


def average(states: Sequence[CompressionState], gradients: Sequence[Tensor]) -> Tensor:
    """What the first rank makes of the messages of all, each of which goes on by a step."""
    gradients = [state.average("w", g) for state, g in zip(states, gradients, strict=True)]
    words = torch.stack([state.encode("w", g) for state, g in zip(states, gradients, strict=True)])
    means = [state.decode("w", g, words).clone() for state, g in zip(states, gradients, strict=True)]
    for state in states:
        state.step += 1
    return means[0]
