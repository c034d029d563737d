"""Noise schedules of the common diffusion models, all in the form ``x_t = signal * (x_0 + rho * eps)``."""

import math
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lightning_opt._checks import check_interval

from .time_grid import NoiseInTime

Number = TypeVar("Number", float, Tensor)


class NoiseSchedule(NoiseInTime, Protocol):
    """What a sampler asks of a schedule: what a grid does, and the signal; elementwise, a float or a tensor.

    The noise level is noise over signal, and the network is conditioned on its time.
    """

    def rho(self, t: Number, /) -> Number:
        """The noise level at a time."""

    def time(self, rho: Number, /) -> Number:
        """The time of a noise level."""

    def signal(self, rho: Number, /) -> Number:
        """The factor of x_0 in x_t."""


class VariancePreserving:
    r""":math:`x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon`, from a table at t = 0, 1, ...

    Between the entries :math:`\log \rho` is linear in time, as in diffusers' grids of Karras.

    Args:
        alphas_cumprod: The table, falling, within (0, 1).
        rho_min: Smallest noise level; None is that of time 0.
        rho_max: Largest noise level; None is that of the last time.

    Raises:
        ValueError: If the table does not fall or a level is outside it.

    Example:
        >>> schedule = VariancePreserving(torch.tensor([0.8, 0.5, 0.2], dtype=torch.float64))
        >>> schedule.rho(1.0), round(schedule.largest_rho, 12), schedule.time(1.0)
        (1.0, 2.0, 1.0)
    """

    def __init__(self, alphas_cumprod: Tensor, rho_min: float | None = None, rho_max: float | None = None) -> None:
        table = alphas_cumprod.detach().to("cpu", torch.float64)
        if table.ndim != 1 or len(table) < 2 or bool((table.diff() >= 0).any()) or not 0 < table[-1] < table[0] < 1:
            raise ValueError("alphas_cumprod must be a table that falls, with entries in (0, 1)")
        self._logs = ((1 - table) / table).log() / 2
        self._times = torch.arange(len(table), dtype=torch.float64)
        least, most = math.exp(self._logs[0]), math.exp(self._logs[-1])
        self.rho_min = least if rho_min is None else rho_min
        self.largest_rho = most if rho_max is None else rho_max
        check_interval("the smallest noise level", self.rho_min, least, most)
        check_interval("the largest noise level", self.largest_rho, self.rho_min, most, closed="(]")
        self.t_end = self.time(self.largest_rho)

    def rho(self, t: Number) -> Number:
        """The noise level at a time."""
        if isinstance(t, Tensor):
            return _interpolate(t, self._times, self._logs).exp()
        return math.exp(_interpolate(torch.tensor(t, dtype=torch.float64), self._times, self._logs))

    def time(self, rho: Number) -> Number:
        """The time of a noise level."""
        if isinstance(rho, Tensor):
            return _interpolate(rho.log(), self._logs, self._times)
        return _interpolate(torch.tensor(math.log(rho), dtype=torch.float64), self._logs, self._times).item()

    def signal(self, rho: Number) -> Number:
        """The factor of x_0."""
        return (1 + rho**2) ** -0.5


class VarianceExploding:
    r""":math:`x_t = x_0 + \sigma \epsilon`; time is the noise level itself, as in score-SDE models.

    Args:
        rho_min: Smallest noise level, positive.
        rho_max: Largest noise level.

    Raises:
        ValueError: If they are not in order.
    """

    def __init__(self, rho_min: float, rho_max: float) -> None:
        check_interval("the smallest noise level", rho_min, 0, closed="()")
        check_interval("the largest noise level", rho_max, rho_min, closed="()")
        self.rho_min = rho_min
        self.largest_rho = self.t_end = rho_max

    def rho(self, t: Number) -> Number:
        """The noise level at a time: the same."""
        return t

    def time(self, rho: Number) -> Number:
        """The time of a noise level: the same."""
        return rho

    def signal(self, rho: Number) -> Number:
        """The factor of x_0: 1."""
        return 1.0 + 0.0 * rho


class FlowMatching:
    r""":math:`x_t = (1 - s)\, x_0 + s\, \epsilon` with :math:`s = t / T` and :math:`\rho = s / (1 - s)`.

    At s = 1 there is no signal and :math:`\rho` is infinite: the largest s is 1 - 1 / T, the smallest 1 / T.

    Args:
        num_train_timesteps: T, above 2.

    Raises:
        ValueError: If T is too small.

    Example:
        >>> schedule = FlowMatching(1000)
        >>> schedule.rho(500.0), schedule.time(3.0), schedule.signal(3.0)
        (1.0, 750.0, 0.25)
    """

    def __init__(self, num_train_timesteps: int) -> None:
        check_interval("num_train_timesteps", num_train_timesteps, 2, closed="()")
        self._count = num_train_timesteps
        self.largest_rho = float(num_train_timesteps - 1)
        self.rho_min = 1 / self.largest_rho
        self.t_end = self.largest_rho

    def rho(self, t: Number) -> Number:
        """The noise level at a time."""
        return t / (self._count - t)

    def time(self, rho: Number) -> Number:
        """The time of a noise level."""
        return self._count * rho / (1 + rho)

    def signal(self, rho: Number) -> Number:
        """The factor of x_0."""
        return 1 / (1 + rho)


def _interpolate(at: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear through the points, constant outside."""
    xs, ys = xs.to(at), ys.to(at)
    right = torch.searchsorted(xs, at.contiguous()).clamp(1, len(xs) - 1)
    share = ((at - xs[right - 1]) / (xs[right] - xs[right - 1])).clamp(0, 1)
    return torch.lerp(ys[right - 1], ys[right], share)
