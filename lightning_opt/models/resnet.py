from torch import Tensor, nn
from torch.nn import functional

from lightning_opt._checks import check_interval
from lightning_opt.registry import register


@register("module", summary="Small residual network for images of 8x8 to 32x32", paper="1512.03385")
class ResNet(nn.Module):
    """A small residual network with BatchNorm for images of about 8x8 to 32x32.

    A 3x3 convolution, then stages of basic blocks; each stage but the first halves the image and doubles the channels;
    then the mean over the image and a linear layer. The default has 175,000 parameters.

    Source: He et al., arXiv 1512.03385, section 4.2 and fig. 2 (with a 1x1 convolution where the shape changes);
    initialization arXiv 1502.01852, eq. 10.

    Args:
        in_channels: Channels of the images.
        width: Channels of the first stage.
        blocks: Number of blocks in each stage.
        num_classes: Number of outputs.

    Raises:
        ValueError: If a number is below 1 or ``blocks`` is empty.

    Example:
        >>> import torch
        >>> ResNet(width=8, blocks=(1, 1))(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self, in_channels: int = 1, width: int = 16, blocks: tuple[int, ...] = (2, 2, 2), num_classes: int = 10
    ) -> None:
        super().__init__()
        check_interval("the number of stages in blocks", len(blocks), 1)
        names = ["in_channels", "width", "num_classes", *["blocks"] * len(blocks)]
        for name, value in zip(names, [in_channels, width, num_classes, *blocks], strict=True):
            check_interval(name, value, 1)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        stages: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(_BasicBlock(channels, width * 2**stage, stride))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, in_channels, H, W]``."""
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        return functional.relu(self.residual(images) + self.shortcut(images))
