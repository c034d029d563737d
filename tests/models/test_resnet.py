import math

import pytest
import torch
from torch import Tensor, nn

from lightning_opt.models import ResNet


def convolution(inputs: int, outputs: int, size: int = 3) -> int:
    return inputs * outputs * size**2


def test_has_the_parameters_of_the_paper_s_blocks() -> None:
    expected = convolution(1, 16) + 2 * 16  # each BatchNorm has a scale and a shift for each channel
    expected += 2 * (2 * convolution(16, 16) + 4 * 16)
    for width in (32, 64):
        expected += convolution(width // 2, width) + convolution(width, width) + 4 * width
        expected += convolution(width // 2, width, size=1) + 2 * width  # the shortcut where the shape changes
        expected += 2 * convolution(width, width) + 4 * width
    expected += 64 * 10 + 10
    assert sum(p.numel() for p in ResNet().parameters()) == expected == 174_970


@pytest.mark.parametrize("size", [8, 9, 28, 32])
@pytest.mark.parametrize("blocks", [(1,), (1, 1), (2, 1, 3)])
def test_each_stage_but_the_first_halves_the_image_and_doubles_the_channels(size: int, blocks: tuple[int, ...]) -> None:
    net = ResNet(in_channels=3, width=4, blocks=blocks, num_classes=7)
    shapes: list[tuple[int, ...]] = []
    for block in net.blocks:
        block.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    assert net(torch.randn(2, 3, size, size)).shape == (2, 7)
    expected = []
    for stage, count in enumerate(blocks):
        side = math.ceil(size / 2**stage)
        expected += [(2, 4 * 2**stage, side, side)] * count
    assert shapes == expected


def test_a_block_adds_its_residual_to_its_input() -> None:
    block = ResNet(width=4, blocks=(1,)).blocks[0]
    images = torch.randn(2, 4, 8, 8)
    residual: list[Tensor] = []
    assert isinstance(block.residual, nn.Module)
    block.residual.register_forward_hook(lambda _, __, output: residual.append(output))
    output = block(images)
    assert torch.equal(output, (images + residual[0]).clamp(min=0))


def test_convolutions_start_with_the_variance_of_kaiming_initialization() -> None:
    for module in ResNet(width=32).modules():
        if isinstance(module, nn.Conv2d):
            count, fan_out = module.weight.numel(), module.out_channels * module.kernel_size[0] ** 2
            # the variance of n normal numbers has the relative standard error sqrt(2 / n)
            assert float(module.weight.detach().var() * fan_out / 2) == pytest.approx(1, abs=5 * math.sqrt(2 / count))


@pytest.mark.parametrize(
    ("name", "value"), [("in_channels", 0), ("width", 0), ("blocks", ()), ("blocks", (1, 0)), ("num_classes", 0)]
)
def test_a_wrong_value_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be >= 1"):
        ResNet(**{name: value})
