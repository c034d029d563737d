"""Bounds of the search, and the coordinates in which they are the unit box."""

from collections.abc import Sequence

import torch
from torch import Tensor

Bounds = tuple[float | Sequence[float] | Tensor, float | Sequence[float] | Tensor] | None


class Box:
    """Maps a box to ``[0, 1]^d`` and back; without bounds it maps nothing.

    Args:
        bounds: Lowest and highest value, numbers for all coordinates or one each; None for none.
        dim: d.

    Raises:
        ValueError: If a bound is not finite, lengths do not fit, or a lowest value is not below its highest.

    Example:
        >>> box = Box((-1.0, 3.0), dim=2)
        >>> box.to_unit(torch.tensor([0.0, 3.0])).tolist(), box.from_unit(torch.tensor([0.25, 1.0])).tolist()
        ([0.25, 1.0], [0.0, 3.0])
    """

    def __init__(self, bounds: Bounds, dim: int) -> None:
        self.dim = dim
        self.is_bounded = bounds is not None
        if bounds is None:
            return
        if len(bounds) != 2:
            raise ValueError(f"bounds must be a lowest and a highest value, got {bounds!r}")
        self.low, self.high = (torch.as_tensor(bound, dtype=torch.float64).detach() for bound in bounds)
        for bound in (self.low, self.high):
            if bound.ndim > 1 or (bound.ndim == 1 and len(bound) != dim):
                raise ValueError(f"bounds must be numbers or have length {dim}, got shape {tuple(bound.shape)}")
        if not bool(((self.high - self.low).isfinite() & (self.low < self.high)).all()):
            raise ValueError(f"bounds must be finite, the lowest value below the highest, got {bounds!r}")

    def to_unit(self, x: Tensor) -> Tensor:
        """Search coordinates of a point ``[d]``.

        Raises:
            ValueError: If it is outside of the bounds by more than rounding.
        """
        x = x.detach().to(torch.float64)
        if not self.is_bounded:
            return x.clone()
        unit = (x - self.low) / (self.high - self.low)
        if not bool(((unit >= -1e-6) & (unit <= 1 + 1e-6)).all()):
            raise ValueError(f"the start lies outside of the bounds: its values are from {x.min():g} to {x.max():g}")
        return unit.clamp(0, 1)

    def from_unit(self, unit: Tensor) -> Tensor:
        """The point ``[d]`` of search coordinates."""
        return self.low + unit * (self.high - self.low) if self.is_bounded else unit

    def clip(self, unit: Tensor) -> Tensor:
        """The nearest search coordinates inside."""
        return unit.clamp(0, 1) if self.is_bounded else unit
