import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_opt._checks import check_choice, check_interval


@dataclass(frozen=True)
class DataMap:
    r"""From images to the logarithm of positive data, and back.

    ============= ================================= ====================
    kind          log of the positive image         for
    ============= ================================= ====================
    ``shift``     :math:`\log(\text{shift} + img)`  images in [0, 1]
    ``exp``       :math:`a (2\,img - 1)`            images in [0, 1]
    ``identity``  :math:`\log img`                  positive data of any size
    ============= ================================= ====================

    The paper shifts by 1, so that a black pixel has the logarithm 0; without a shift it would be minus infinity. Under
    ``exp`` the logarithm is the image in its usual scale.

    Args:
        kind: One of the above.
        shift: Positive.
        scale: :math:`a`, positive; half the range of the logarithm under ``exp``.
        clip: Whether :meth:`to_images` clamps to [0, 1] (not under ``identity``).

    Raises:
        ValueError: If a number is not positive or the kind unknown.

    Source: arXiv:2510.02730 (``shift``).

    Example:
        >>> data_map = DataMap("shift")
        >>> log_image = data_map.to_log(torch.tensor([0.0, 0.5, 1.0]))
        >>> log_image, data_map.to_images(log_image + 0.1)
        (tensor([0.0000, 0.4055, 0.6931]), tensor([0.1052, 0.6578, 1.0000]))
    """

    kind: Literal["shift", "exp", "identity"] = "shift"
    shift: float = 1.0
    scale: float = 0.35
    clip: bool = True

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("shift", "exp", "identity"))
        check_interval("shift", self.shift, 0, closed="()")
        check_interval("scale", self.scale, 0, closed="()")

    @property
    def log_range(self) -> tuple[float, float]:
        """The smallest and the largest logarithm of data."""
        if self.kind == "shift":
            return math.log(self.shift), math.log(self.shift + 1)
        if self.kind == "exp":
            return -self.scale, self.scale
        return -math.inf, math.inf

    def to_log(self, images: Tensor, *, check: bool = True) -> Tensor:
        """The logarithm of the positive image.

        Args:
            images: Any shape.
            check: Whether to look at the values, which waits for the device that they are on.

        Raises:
            ValueError: If the images are not in the map's range; the message has their own.
        """
        if check:
            self.check(images)
        if self.kind == "identity":
            return torch.log(images)
        if self.kind == "shift":
            return torch.log(images + self.shift)
        return self.scale * (2 * images - 1)

    def check(self, images: Tensor) -> None:
        """Raise ValueError if images are not in the map's range."""
        if self.kind == "identity":
            check_positive(images)
        else:
            check_unit_range(images, f" for the map {self.kind!r}")

    def to_images(self, log_state: Tensor) -> Tensor:
        """The inverse of :meth:`to_log`, clamped to the range of images where asked."""
        if self.kind == "identity":
            return log_state.exp()
        images = log_state.exp() - self.shift if self.kind == "shift" else 0.5 * (log_state / self.scale + 1)
        return images.clamp(0, 1) if self.clip else images


def check_unit_range(images: Tensor, why: str = "") -> None:
    """Raise ValueError, with the range of the images, unless they are in [0, 1]."""
    low, high = (value.item() for value in images.aminmax())
    if not (low >= 0 and high <= 1):  # NaN too
        raise ValueError(f"images must be in [0, 1]{why}, got values from {low} to {high}")


def check_positive(x: Tensor, name: str = "data") -> Tensor:
    """Return ``x``.

    Raises:
        ValueError: If an entry is zero, negative or NaN; the message has their number and the smallest.
    """
    bad = ~(x > 0)
    if bad.any():
        raise ValueError(
            f"{name} must be positive, got {int(bad.sum())} of {x.numel()} entries that are not; "
            f"the smallest is {x.min().item()}. A DataMap maps images in [0, 1] to positive data"
        )
    return x


def log_moments(log_images: Tensor, per_channel: bool = False) -> tuple[float, float] | tuple[list[float], list[float]]:
    """Mean and standard deviation of log x0, which the schedulers call ``log_mean`` and ``log_std``.

    Args:
        log_images: Logarithms of positive images, shape (n, channels, ...).
        per_channel: Whether to return a list with an entry for each channel.

    Raises:
        ValueError: If an entry is not finite.

    Example:
        >>> log_moments(DataMap("shift").to_log(torch.tensor([[0.0], [1.0]])))
        (0.34657..., 0.34657...)
    """
    if not torch.isfinite(log_images).all():
        raise ValueError("log_images must be finite; take them from DataMap.to_log")
    logs = log_images.double()
    if not per_channel:
        return logs.mean().item(), logs.std(correction=0).item()
    logs = logs.transpose(0, 1).flatten(1)
    return logs.mean(1).tolist(), logs.std(1, correction=0).tolist()
