from typing import Literal, NamedTuple

from torch import Tensor

from lightning_opt._checks import check_choice

from .process import GeometricBrownianMotion

Sampler = Literal["dale", "ambient", "exp_euler", "ode"]
SAMPLERS = ("dale", "ambient", "exp_euler", "ode")


def log_reverse_drift(process: GeometricBrownianMotion, hyvarinen: Tensor, t: float | Tensor) -> Tensor:
    r"""The drift of log x in reversed time, beside the noise :math:`\sigma\,dW`.

    .. math::
        dY = \left[\tfrac{3}{2} \sigma^2 - \mu + \sigma^2 h\right] d\tau + \sigma\,dW

    Args:
        process: The forward process.
        hyvarinen: :math:`h = x \nabla \log p_t(x)`.
        t: Time of the forward process, broadcasting with ``hyvarinen``.

    Source: arXiv:2510.02730. Two of the three halves of :math:`\sigma^2` are the divergence of the multiplicative noise
    less Ito's correction; the test of the wrong equations shows what either is worth.
    """
    variance = process.volatility(t) ** 2
    return 1.5 * variance - process.drift(t) + variance * hyvarinen


def reverse_drift(process: GeometricBrownianMotion, x: Tensor, hyvarinen: Tensor, t: float | Tensor) -> Tensor:
    r"""The drift of x in reversed time, beside the noise :math:`\sigma X\,dW` in Ito's sense.

    .. math::
        dX = X \left[2 \sigma^2 - \mu + \sigma^2 h\right] d\tau + \sigma X\,dW

    The arguments are those of :func:`log_reverse_drift`, and the positive ``x`` itself.

    Source: arXiv:2510.02730; :math:`2 \sigma^2 x` is the divergence of :math:`\sigma^2 x^2`.
    """
    variance = process.volatility(t) ** 2
    return x * (2 * variance - process.drift(t) + variance * hyvarinen)


def log_probability_flow(process: GeometricBrownianMotion, hyvarinen: Tensor, t: float | Tensor) -> Tensor:
    r"""The velocity of log x, in forward time, of the deterministic flow with the marginals of the process.

    .. math::
        \frac{dy}{dt} = \mu - \sigma^2 - \tfrac{1}{2} \sigma^2 h, \qquad
        \text{and } \frac{dz}{d\rho} = \varepsilon \text{ for } z = y - m(t)

    The arguments are those of :func:`log_reverse_drift`; the velocity of x is x times this.
    """
    variance = process.volatility(t) ** 2
    return process.drift(t) - variance - 0.5 * variance * hyvarinen


class ReverseStep(NamedTuple):
    """One step of the logarithm: ``log_x + shift + epsilon * noise_prediction + noise * standard_normal``."""

    shift: float
    epsilon: float
    noise: float


def reverse_step(
    process: GeometricBrownianMotion, sampler: Sampler, t: float, s: float, step_scale: float = 1.0
) -> ReverseStep:
    r"""The step of a sampler from the time ``t`` down to ``s``, from the noise predicted at ``t``.

    With :math:`\Delta v = v(t) - v(s)` and :math:`\Delta m = m(t) - m(s)`:

    ============= ======================= =========================== =========================
    sampler       shift                   of the predicted noise      of the drawn noise
    ============= ======================= =========================== =========================
    ``dale``      :math:`-\Delta m`       :math:`-\Delta v / \rho_t`  :math:`\sqrt{\Delta v}`
    ``exp_euler`` :math:`-\Delta m`       :math:`-2 (\rho_t-\rho_s)`  :math:`\sqrt{\Delta v}`
    ``ode``       :math:`-\Delta m`       :math:`-(\rho_t - \rho_s)`  0
    ============= ======================= =========================== =========================

    ``dale`` is the paper's update :math:`x \exp(\delta \sigma^2 h - \delta (\mu - \tfrac{3}{2} \sigma^2) +
    \sqrt{\delta} \sigma Z)`. ``ambient``, the Euler-Maruyama step of x itself, is no exponential: its factor is 1 plus
    :math:`\Delta v / 2` plus what ``dale`` has in the exponent, and the step of ``dale`` is returned.
    ``exp_euler`` integrates the noise level exactly with the prediction frozen; ``ode`` is a step of the probability
    flow.

    Args:
        process: The forward process.
        sampler: One of the above.
        t: Time at the beginning.
        s: Time at the end, below ``t``.
        step_scale: Factor of the time step, in drift and noise, at the same ``t``: the authors' tuned step size.

    Raises:
        ValueError: If the sampler is unknown.

    Source: arXiv:2510.02730 (``dale``, ``ambient``); the others are ours.

    Example:
        >>> reverse_step(GeometricBrownianMotion(sigma=0.8), "ode", t=1.0, s=0.25)
        ReverseStep(shift=-0.0, epsilon=-0.4, noise=0.0)
    """
    check_choice("sampler", sampler, SAMPLERS)
    rho_t, rho_s = process.rho(t), process.rho(s)
    shift = -step_scale * (process.mean_shift(t) - process.mean_shift(s))
    variance = step_scale * (rho_t + rho_s) * (rho_t - rho_s)
    if sampler == "ode":
        return ReverseStep(shift, -step_scale * (rho_t - rho_s), 0.0)
    if sampler == "exp_euler":
        return ReverseStep(shift, -2 * step_scale * (rho_t - rho_s), variance**0.5)
    return ReverseStep(shift, -variance / rho_t, variance**0.5)
