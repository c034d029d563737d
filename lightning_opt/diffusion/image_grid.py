import math
from pathlib import Path

import torch
from torch import Tensor


def image_grid(images: Tensor, columns: int | None = None, *, padding: int = 1) -> Tensor:
    """Images side by side as one picture.

    Args:
        images: ``[N, C, H, W]`` with one channel (gray) or three (red, green, blue), from 0 to 1; what lies outside is
            clipped.
        columns: Images in a row; ``None`` for a square of them, or nearly so.
        padding: Width of the light lines between them and around, in pixels.

    Returns:
        uint8 ``[height, width, 3]`` on the CPU.

    Raises:
        ValueError: If there are no images, or not of one or three channels.

    Example:
        >>> image_grid(torch.zeros(6, 1, 8, 8), columns=3).shape
        torch.Size([19, 28, 3])
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"images must have the shape [N, 1 or 3, H, W] with N >= 1, got {list(images.shape)}")
    count, _, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    pixels = images.detach().float().cpu().clamp(0, 1).mul(255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    grid = torch.full((rows * (height + padding) + padding, columns * (width + padding) + padding, 3), 200).byte()
    for i, image in enumerate(pixels):
        top, left = padding + i // columns * (height + padding), padding + i % columns * (width + padding)
        grid[top : top + height, left : left + width] = image.permute(1, 2, 0)
    return grid


def save_picture(picture: Tensor, path: str | Path, *, min_side: int = 480) -> None:
    """Write a picture as PNG, small ones enlarged by a whole factor so that single pixels can be seen.

    Args:
        picture: uint8 ``[height, width, 3]``.
        path: Where to; the folder is made if need be.
        min_side: The shorter side in pixels that is aimed at.
    """
    from PIL import Image

    factor = max(1, round(min_side / min(picture.shape[:2])))
    enlarged = picture.repeat_interleave(factor, dim=0).repeat_interleave(factor, dim=1)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(enlarged.numpy()).save(path, format="PNG")
