"""STEER: a random end of the time span."""

import torch

from lightning_opt._checks import check_interval
from lightning_opt.registry import register


@register("tool", summary="STEER: a random end of the time span", paper="2006.10711")
def steer_end(t0: float, t1: float, b: float, generator: torch.Generator | None = None) -> float:
    """An end time drawn uniformly from ``t1`` plus or minus ``b`` (arXiv:2006.10711, equation 3).

    Args:
        t0: Start.
        t1: End; may lie before the start.
        b: Half the width, below the length of the span so that the order of times stays.
        generator: On the CPU.

    Raises:
        ValueError: If ``b`` is not in [0, abs(t1 - t0)).

    Example:
        >>> 0.5 <= steer_end(0.0, 1.0, 0.5, torch.Generator().manual_seed(0)) < 1.5
        True
    """
    check_interval("b", b, 0, abs(t1 - t0), closed="[)")
    return t1 + b * (2.0 * torch.rand((), generator=generator, dtype=torch.float64).item() - 1.0)
