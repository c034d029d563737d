from torch import Tensor, nn


class Autonomous(nn.Module):
    """A network of the state as the dynamics of an equation, which do not depend on time."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The network of the state."""
        return self.net(y)
