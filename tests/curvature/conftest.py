"""What the tests of curvature share."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.reference.curvature import dense_hessian


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture(scope="session")
def thousand() -> tuple[nn.Module, Tensor, Tensor]:
    """A network of 945 parameters in float64, some steps into training, with its data."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(128, 20, generator=generator, dtype=torch.float64)
    y = x[:, :5].argmax(dim=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        net = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 5)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.zero_grad()
    return net, x, y


@pytest.fixture(scope="session")
def matrix(thousand: tuple[nn.Module, Tensor, Tensor]) -> Tensor:
    """The Hessian of that network."""
    net, x, y = thousand
    h = dense_hessian(net, functional.cross_entropy, x, y)
    return (h + h.T) / 2
