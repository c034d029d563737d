"""When the batch size is tested, and what a test asks for."""

import math
from typing import Any, NamedTuple

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_opt.gradient_noise import BatchTest, GradientStatistics, required_batch_size
from lightning_opt.gradient_noise.moving_average import MovingAverage


class NoiseSettings(NamedTuple):
    """The arguments of :class:`AdaptiveBatchSize` of these names."""

    test: BatchTest
    eta: float
    theta: float
    nu: float
    quantile: float
    debias: bool
    ema: float
    test_interval: int

    @property
    def can_fail(self) -> bool:
        """Whether any noise fails the test, so that it is worth its cost."""
        thresholds = {
            "norm": (self.eta,),
            "coordinate": (self.eta,),
            "inner_product": (self.theta,),
            "augmented_inner_product": (self.theta, self.nu),
        }
        return min(thresholds[self.test]) < math.inf


class BatchDecision:
    """Tests every so many samples, and remembers what is to be remembered between tests.

    Attributes:
        start: Samples of the first step, in whose multiples the interval between tests is counted.
        skipped: Tests that met a number that is not finite.
    """

    def __init__(self, settings: NoiseSettings) -> None:
        self.settings = settings
        self.start = 0
        self.skipped = 0
        self._untested = -1  # samples of the steps since the last test, if there was one
        self._average = MovingAverage(settings.ema)

    def is_due(self) -> bool:
        """Whether the step that begins is to be tested."""
        return self._untested < 0 or self._untested >= self.settings.test_interval * self.start

    def count(self, batch: int, *, tested: bool) -> None:
        """Behind a step of so many samples."""
        if tested:
            self._untested = batch
        elif self._untested >= 0:
            self._untested += batch

    def decide(self, statistics: GradientStatistics) -> dict[str, float] | None:
        """What the test asks for, as it is logged; None where the gradient is not finite."""
        values = (statistics.var_trace, statistics.grad_norm_sq, statistics.var_along or 0.0)
        requested = math.nan
        if all(map(math.isfinite, values)):
            statistics = self._average.add(statistics)
            requested = required_batch_size(
                statistics,
                self.settings.test,
                eta=self.settings.eta,
                theta=self.settings.theta,
                nu=self.settings.nu,
                quantile=self.settings.quantile,
                debias=self.settings.debias,
            )
        if math.isnan(requested):
            self.skipped += 1
            if self.skipped == 1:
                rank_zero_warn("AdaptiveBatchSize: a gradient is not finite; such tests decide nothing.")
            return None
        return {
            "requested": requested,
            "var_trace": statistics.var_trace,
            "grad_norm_sq": statistics.grad_norm_sq,
            "ratio": requested / statistics.samples,
        }

    def state_dict(self) -> dict[str, Any]:
        """Builtins."""
        return {
            "start": self.start,
            "untested": self._untested,
            "skipped": self.skipped,
            "means": list(self._average.sums),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned; other entries are left alone."""
        self.start, self._untested, self.skipped = state["start"], state["untested"], state["skipped"]
        self._average.sums = list(state["means"])
