"""Checks of options that several optimizers share."""

from typing import Any

from lightning_opt._checks import check_interval


def check_betas(betas: Any) -> None:
    """Raise ValueError unless ``betas`` is a pair of numbers in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers in [0, 1), got {betas!r}")
    for i, beta in enumerate(betas):
        check_interval(f"betas[{i}]", beta, 0.0, 1.0, closed="[)")
