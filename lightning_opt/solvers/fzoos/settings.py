"""What FZooS can be told, checked once for the function and the strategy."""

import dataclasses
import math
from typing import Literal

from lightning_opt._checks import check_interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class FZooSSettings:
    """The numbers of FZooS; lengths are in the coordinates that the search sees, the unit box where bounds are given.

    Attributes:
        local_steps: T, steps of a client in a round.
        lr: Rate of the local Adam, about the largest move of a coordinate in one step.
        gamma: The correction's length is ``gamma / t`` in step t of a round; 0 leaves it out.
        n_features: M, random features that carry a surrogate; M numbers up and down a round.
        lengthscale: Of the kernel: ``"auto"`` for ``0.3 sqrt(d)``, ``"fit"`` to choose among 8 values by the clients'
            mean marginal likelihood at the end of the first round, or a number.
        noise: Variance of the noise of a value as a share of the variance of the values near by; ``"auto"`` measures
            it by 5 evaluations at the start, and takes at least 1e-6.
        max_local: Queries, the nearest, that the local surrogate is fitted to.
        max_global: Queries, the nearest, that the weights of the features are fitted to.
        active: Queries besides the step's own that every step but a round's last makes where the gradient is unsure.
        active_pool: Random candidates that they are chosen from.
        sync_active: The same at the end of a round, beside one at the new point.
        sync_pool: The same at the end of a round.
        init: Random queries before the first step.
        radius: Half the edge of the box around a point that candidates are drawn from.
        keep_best: Return to the round's start where its end is not better. Costs no query: both values are known.
        seed: Of features and candidates.

    Raises:
        ValueError: If a number is out of its range.
    """

    local_steps: int = 10
    lr: float = 0.01
    gamma: float = 1.0
    n_features: int = 1000
    lengthscale: float | Literal["auto", "fit"] = "auto"
    noise: float | Literal["auto"] = 1e-6
    max_local: int = 150
    max_global: int = 500
    active: int = 5
    active_pool: int = 100
    sync_active: int = 50
    sync_pool: int = 200
    init: int = 10
    radius: float = 0.01
    keep_best: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("local_steps", "n_features", "max_local", "max_global"):
            check_interval(name, getattr(self, name), 1)
        for name in ("active", "sync_active", "init", "gamma", "seed"):
            check_interval(name, getattr(self, name), 0)
        for name in ("lr", "radius"):
            check_interval(name, getattr(self, name), 0, closed="()")
        check_interval("active_pool", self.active_pool, max(self.active, 1))  # as many as are chosen from it
        check_interval("sync_pool", self.sync_pool, max(self.sync_active, 1))
        if isinstance(self.lengthscale, str):
            if self.lengthscale not in ("auto", "fit"):
                raise ValueError(f"lengthscale must be a number, 'auto' or 'fit', got {self.lengthscale!r}")
        else:
            check_interval("lengthscale", self.lengthscale, 0, closed="()")
        if isinstance(self.noise, str):
            if self.noise != "auto":
                raise ValueError(f"noise must be a number or 'auto', got {self.noise!r}")
        else:
            check_interval("noise", self.noise, 0)

    def first_lengthscale(self, dim: int) -> float:
        """The lengthscale before any fit."""
        return 0.3 * math.sqrt(dim) if isinstance(self.lengthscale, str) else float(self.lengthscale)
