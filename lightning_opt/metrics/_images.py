import torch
from torch import Tensor


def check_images(name: str, images: Tensor, shape: tuple[int, ...] | None = None) -> None:
    """Raise ``ValueError`` unless these are images ``[N, C, H, W]`` of floating point in [0, 1].

    Args:
        name: What the user called them.
        images: The images.
        shape: ``(C, H, W)`` of an image; None for any.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{name} must be a floating-point tensor with values in [0, 1], got {kind}")
    wanted = "[N, C, H, W]" if shape is None else f"[N, {', '.join(map(str, shape))}]"
    if images.ndim != 4 or (shape is not None and tuple(images.shape[1:]) != tuple(shape)):
        raise ValueError(f"{name} must be of shape {wanted}, got {list(images.shape)}")
    if len(images) == 0:
        raise ValueError(f"{name} must hold at least one image, got none")
    low, high = (float(end) for end in torch.aminmax(images.detach()))
    if not (low >= 0 and high <= 1):  # false for NaN
        raise ValueError(f"{name} must be in [0, 1] and finite, got values from {low:.6g} to {high:.6g}")
