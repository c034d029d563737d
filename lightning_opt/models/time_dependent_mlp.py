import torch
from torch import Tensor, nn

from lightning_opt._checks import check_interval
from lightning_opt.registry import register


@register(
    "module", summary="Multilayer perceptron with tanh that reads the time before every layer", paper="2303.02262"
)
class TimeDependentMLP(nn.Module):
    """Dynamics of a neural ODE: layers with tanh between, each of which also reads the time as one more input.

    The last layer has no tanh. Weights are initialized as torch does by default.

    Args:
        features: Size of the state.
        hidden: Widths of the hidden layers; empty for dynamics that are affine in state and time.

    Raises:
        ValueError: If a width is below 1.

    Shape: times, 0-dim or ``[B]``, and states ``[B, features]`` to derivatives ``[B, features]``.

    Example:
        >>> dynamics = TimeDependentMLP(64, hidden=(50,))
        >>> dynamics(torch.tensor(0.5), torch.zeros(3, 64)).shape
        torch.Size([3, 64])
    """

    def __init__(self, features: int, hidden: tuple[int, ...] = (100,)) -> None:
        super().__init__()
        check_interval("features", features, 1)
        for width in hidden:
            check_interval("hidden", width, 1)
        widths = [features, *hidden, features]
        self.layers = nn.ModuleList(
            nn.Linear(inputs + 1, outputs) for inputs, outputs in zip(widths, widths[1:], strict=False)
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The derivative of the state."""
        t = t.to(y)[..., None]
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            y = y if number == 0 else y.tanh()
            # the layer of [y, t], without a copy of y
            y = torch.addmm(layer.bias + t * layer.weight[:, -1], y, layer.weight[:, :-1].T)
        return y
