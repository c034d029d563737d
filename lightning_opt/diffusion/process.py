import math
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from lightning_opt._checks import check_choice, check_interval

Number = TypeVar("Number", float, Tensor, float | Tensor)


@dataclass(frozen=True)
class GeometricBrownianMotion:
    r"""The forward noise of the multiplicative model, :math:`dX = \mu(t) X\,dt + \sigma(t) X\,dW` in Ito's sense.

    The noise multiplies, so positive data stay positive. In the logarithm it is a Gaussian that is added,

    .. math::
        \log x_t = \log x_0 + m(t) + \rho(t)\,\varepsilon, \qquad
        m(t) = \int_0^t \mu - \tfrac{1}{2} \sigma^2, \qquad \rho(t)^2 = v(t) = \int_0^t \sigma^2,

    with :math:`\varepsilon \sim N(0, I)`. Where :math:`\mu = \sigma^2 / 2`, as in the paper, :math:`m = 0` and the
    logarithm is an ordinary variance-exploding diffusion.

    Every method takes a time as a float or as a tensor of any shape, and returns the same.

    Args:
        sigma: Volatility, positive, of the constant schedule.
        mu: Drift, constant; None is :math:`\sigma(t)^2 / 2`.
        sigma_schedule: ``"constant"``, or ``"geometric"``: :math:`v(t) = \rho_{min}^2 (g^t - 1)`, a volatility that
            grows by a constant factor in time.
        rho_min: Smallest noise level at which a network is called, positive.
        rho_max: Largest noise level, above ``rho_min``; None is ``sigma``. A constant schedule reaches it at the time
            ``(rho_max / sigma)**2``, a geometric one at time 1.

    Raises:
        ValueError: If a number is out of its range or the schedule unknown.

    Source: arXiv:2510.02730; the forward equation and its log-normal kernel. The geometric schedule is ours.

    Example:
        >>> process = GeometricBrownianMotion(sigma=0.8)
        >>> process.rho(0.25), process.mean_shift(0.25), round(process.time(0.4), 12)
        (0.4, 0.0, 0.25)
        >>> round(GeometricBrownianMotion(sigma=0.8, rho_max=4.0).t_end, 12)
        25.0
    """

    sigma: float = 0.8
    mu: float | None = None
    sigma_schedule: Literal["constant", "geometric"] = "constant"
    rho_min: float = 0.01
    rho_max: float | None = None

    def __post_init__(self) -> None:
        check_interval("sigma", self.sigma, 0, closed="()")
        if self.mu is not None and not math.isfinite(self.mu):
            raise ValueError(f"mu must be finite, got {self.mu}")
        check_choice("sigma_schedule", self.sigma_schedule, ("constant", "geometric"))
        check_interval("rho_min", self.rho_min, 0, closed="()")
        name = "sigma, which is rho_max where none is given," if self.rho_max is None else "rho_max"
        check_interval(name, self.largest_rho, self.rho_min, closed="()")

    @property
    def largest_rho(self) -> float:
        """The noise level at the last time."""
        return self.sigma if self.rho_max is None else self.rho_max

    @property
    def t_end(self) -> float:
        """The last time."""
        return (self.largest_rho / self.sigma) ** 2 if self.sigma_schedule == "constant" else 1.0

    def variance(self, t: Number) -> Number:
        """v(t), the variance that the logarithm has gained."""
        if self.sigma_schedule == "constant":
            return self.sigma**2 * t
        return self.rho_min**2 * _expm1(self._growth * t)

    def rho(self, t: Number) -> Number:
        """The noise level, the square root of the variance."""
        return self.variance(t) ** 0.5

    def time(self, rho: Number) -> Number:
        """The time at which a noise level is reached."""
        if self.sigma_schedule == "constant":
            return (rho / self.sigma) ** 2
        return _log1p((rho / self.rho_min) ** 2) / self._growth

    def mean_shift(self, t: Number) -> Number:
        """m(t), how far the mean of the logarithm has moved."""
        if self.mu is None:
            return 0.0 * t
        return self.mu * t - 0.5 * self.variance(t)

    def volatility(self, t: Number) -> Number:
        """sigma(t)."""
        if self.sigma_schedule == "constant":
            return self.sigma + 0.0 * t
        return (self._growth * (self.variance(t) + self.rho_min**2)) ** 0.5

    def drift(self, t: Number) -> Number:
        """mu(t)."""
        if self.mu is None:
            return 0.5 * self.volatility(t) ** 2
        return self.mu + 0.0 * t

    def noised(self, log_x0: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """The logarithm of x_t: data and standard normal noise of one shape, at one time or at one for each sample."""
        if isinstance(t, Tensor):
            t = per_sample(t, log_x0)
        return log_x0 + self.mean_shift(t) + self.rho(t) * noise

    def hyvarinen_score(self, log_x: Tensor, log_x0: Tensor, t: float | Tensor) -> Tensor:
        r"""Hyvarinen's score of the kernel, :math:`x_t \nabla \log p(x_t | x_0) = -1 - (\log x_t - \log x_0 - m) / v`.

        Dividing it by :math:`x_t` gives the Stein score, adding 1 the score of the logarithm.
        """
        if isinstance(t, Tensor):
            t = per_sample(t, log_x)
        return -1.0 - (log_x - log_x0 - self.mean_shift(t)) / self.variance(t)

    @property
    def _growth(self) -> float:
        """The logarithm of g, from v(1) = rho_max^2."""
        return math.log1p((self.largest_rho / self.rho_min) ** 2)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """A value for each sample, or one for all, shaped so that it broadcasts over the other dimensions.

    Example:
        >>> per_sample(torch.ones(5), torch.ones(5, 3, 8, 8)).shape
        torch.Size([5, 1, 1, 1])
    """
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def _expm1(x: Number) -> Number:
    return torch.expm1(x) if isinstance(x, Tensor) else math.expm1(x)


def _log1p(x: Number) -> Number:
    return torch.log1p(x) if isinstance(x, Tensor) else math.log1p(x)
