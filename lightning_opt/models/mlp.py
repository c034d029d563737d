from torch import Tensor, nn

from lightning_opt._checks import check_interval
from lightning_opt.registry import register


@register("module", summary="Multilayer perceptron with ReLU")
class MLP(nn.Module):
    """A multilayer perceptron with ReLU; images are flattened. Weights are initialized as torch does by default.

    Args:
        in_features: Number of inputs: C * H * W of an image.
        hidden: Widths of the hidden layers; empty for a linear classifier.
        num_classes: Number of outputs.
        dropout: Probability to drop a hidden unit in training.

    Raises:
        ValueError: If a width is below 1 or ``dropout`` is not in [0, 1).

    Example:
        >>> import torch
        >>> MLP(in_features=64, hidden=(32,))(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self, in_features: int = 784, hidden: tuple[int, ...] = (256, 128), num_classes: int = 10, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_interval("dropout", dropout, 0, 1, closed="[)")
        widths = [in_features, *hidden, num_classes]
        for name, width in zip(["in_features", *["hidden"] * len(hidden), "num_classes"], widths, strict=True):
            check_interval(name, width, 1)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in zip(widths[:-2], hidden, strict=True):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-2], num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, ...]`` with ``in_features`` values each."""
        return self.layers(images)
