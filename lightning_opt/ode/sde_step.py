r"""One step of a stochastic differential equation with an estimate of its error, which can be differentiated.

The equation is :math:`dy = f(t, y)\,dt + g(t, y)\,dW`. Where a solver of ordinary equations compares two Runge-Kutta
formulas on the same stages, one of stochastic equations compares two answers on the same Brownian path:

- :func:`step_doubling`: one step against two of half the size, for any solver; this is the error by which torchsde
  chooses its steps;
- :func:`sri_step`: the step of torchsde's ``srk`` and one of lower order on the same stages, for diagonal noise;
- :func:`euler_heun_step`: Lamba's estimate for the Stratonovich Euler-Heun step, for diagonal noise.
"""

from collections.abc import Callable
from typing import Any

import torch
import torchsde
from torch import Tensor

from lightning_opt.registry import register

from .embedded_step import EmbeddedStep

Coefficient = Callable[[Tensor, Tensor], Tensor]
"""``drift(t, y)`` or ``diffusion(t, y)``, with a 0-dim time and a state ``[batch, dim]``."""


@register("tool", summary="One step of a neural SDE with its local error, by step doubling", paper="2303.02262")
def step_doubling(
    sde: Any,
    t: Tensor | float,
    y: Tensor,
    dt: Tensor | float,
    noise: torchsde.BaseBrownian,
    method: str,
    options: dict[str, Any] | None = None,
) -> EmbeddedStep:
    """Two half steps of a torchsde solver, and how far one whole step on the same Brownian path is from them.

    Nothing is detached: gradients reach the state and the parameters of the equation.

    Args:
        sde: The equation, as torchsde takes it: ``f(t, y)``, ``g(t, y)``, ``noise_type``, ``sde_type``.
        t: Time at the start.
        y: State ``[batch, dim]``.
        dt: Size of the step, positive.
        noise: A Brownian motion over at least ``[t, t + dt]`` that answers every query of an interval alike.
        method: A method of torchsde, such as ``"euler"``.
        options: Of the method.

    Returns:
        The state after the half steps, and the whole step minus the half steps; no stages.

    Cost: that of three steps. torchsde looks at the shapes of drift and diffusion before every solve, which makes three
    more evaluations of both; :class:`NeuralSDE` evaluates neither twice at the same place.

    Example:
        >>> class Decay:
        ...     noise_type, sde_type = "diagonal", "ito"
        ...     f = staticmethod(lambda t, y: -y)
        ...     g = staticmethod(lambda t, y: 0 * y)
        >>> y = torch.ones(1, 1, dtype=torch.float64)
        >>> path = torchsde.BrownianInterval(0, 1, y.shape, dtype=y.dtype, entropy=0)
        >>> step = step_doubling(Decay(), 0.0, y, 0.1, path, "euler")
        >>> round(step.y1.item(), 12), round(step.error.item(), 12)  # 0.95**2, 0.9 - 0.95**2
        (0.9025, -0.0025)
    """
    start = torch.as_tensor(t, dtype=y.dtype, device=y.device)
    end = start + dt
    middle = 0.5 * (start + end)  # as in torchsde's adaptive loop
    whole = _single_step(sde, start, end, y, noise, method, options)
    half = _single_step(sde, start, middle, y, noise, method, options)
    y1 = _single_step(sde, middle, end, half, noise, method, options)
    wide = torch.promote_types(y.dtype, torch.float32)
    return EmbeddedStep(y1, whole.to(wide) - y1.to(wide))


def sri_step(
    drift: Coefficient,
    diffusion: Coefficient,
    t: Tensor | float,
    y: Tensor,
    dt: Tensor | float,
    increment: Tensor,
    area: Tensor,
) -> EmbeddedStep:
    r"""The step of strong order 1.5 of torchsde's ``srk`` for diagonal noise (Ito), with an embedded error estimate.

    The pair is made as Rackauckas and Nie make theirs for methods of Roessler's class (arXiv:1608.01250): the step of
    lower order uses the first stage alone for the drift and leaves out the two highest stochastic integrals of the
    diffusion, so that it is of strong order 1 and

    .. math:: e = h \Big(\sum_i \alpha_i f_i - f_1\Big)
        + \sum_i \Big(\beta^{(3)}_i \frac{I_{(1,0)}}{h} + \beta^{(4)}_i \frac{I_{(1,1,1)}}{h}\Big) g_i .

    Args:
        drift: ``drift(t, y)``, of the state's shape.
        diffusion: ``diffusion(t, y)``, of the state's shape.
        t: Time at the start.
        y: State ``[batch, dim]``.
        dt: Size of the step, positive.
        increment: :math:`W(t + h) - W(t)`, of the state's shape.
        area: :math:`\int_t^{t+h} (W(s) - W(t))\,ds`; torchsde's ``return_U``.

    Returns:
        State, the error estimate, and the stages of the drift.

    Cost: 3 evaluations of the drift, 4 of the diffusion; torchsde evaluates both 10 times in this step.

    Example:
        >>> y, dw = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[0.1]], dtype=torch.float64)
        >>> step = sri_step(lambda t, y: 0 * y, lambda t, y: 0 * y + 2, 0.0, y, 0.01, dw, 0.0005 * dw)
        >>> round(step.y1.item(), 12)  # 1 + 2 dW, whatever the area
        1.2
    """
    h = torch.as_tensor(dt, dtype=y.dtype, device=y.device)
    t = torch.as_tensor(t, dtype=y.dtype, device=y.device)
    root, moment = h.sqrt(), area / h
    second = (increment**2 - h) / 2
    third = (increment**3 - 3 * h * increment) / 6
    f1, g1 = drift(t, y), diffusion(t, y)
    f2 = drift(t + h, y + h * f1)
    g2 = diffusion(t + h / 4, y + h / 4 * f1 - root / 2 * g1)
    f3 = drift(t + h / 2, y + h / 4 * (f1 + f2) + moment * (g1 + g2 / 2))
    g3 = diffusion(t + h, y + h * f1 + root * g1)
    g4 = diffusion(t + h / 4, y + h / 4 * f3 + root * (2 * g1 - g2 + g3 / 2))
    low = y + h * f1 + increment * (-g1 + 4 / 3 * g2 + 2 / 3 * g3) + second / root * (g1 - 4 / 3 * g2 + 1 / 3 * g3)
    error = (
        h * ((f1 + f2 + 4 * f3) / 6 - f1)
        + moment * (2 * g1 - 4 / 3 * g2 - 2 / 3 * g3)
        + third / h * (-2 * g1 + 5 / 3 * g2 - 2 / 3 * g3 + g4)
    )
    return EmbeddedStep(low + error, error.to(torch.promote_types(y.dtype, torch.float32)), (f1, f2, f3))


def euler_heun_step(
    drift: Coefficient,
    diffusion: Coefficient,
    t: Tensor | float,
    y: Tensor,
    dt: Tensor | float,
    increment: Tensor,
) -> EmbeddedStep:
    r"""The Stratonovich Euler-Heun step for diagonal noise with Lamba's error estimate.

    The estimate (Lamba 2003, J. Comput. Appl. Math. 161, as in the adaptive Euler-Heun method of SciML) adds what the
    Heun step would change in the drift and the size of the Milstein term, with the derivative of the diffusion along
    itself as a difference quotient:

    .. math:: e = \tfrac h2 \big(f(t + h, y + h f) - f\big)
        + \frac{g(t, y + \sqrt h\, g) - g}{\sqrt h} \, \frac{\Delta W^2}{2} .

    Args:
        drift: ``drift(t, y)``, of the state's shape.
        diffusion: ``diffusion(t, y)``, of the state's shape.
        t: Time at the start.
        y: State ``[batch, dim]``.
        dt: Size of the step, positive.
        increment: :math:`W(t + h) - W(t)`, of the state's shape.

    Returns:
        State, the error estimate, and the stages of the drift.

    Cost: 2 evaluations of the drift, 3 of the diffusion.

    Example:
        >>> y, dw = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[0.1]], dtype=torch.float64)
        >>> step = euler_heun_step(lambda t, y: 0 * y, lambda t, y: 2 * y, 0.0, y, 0.01, dw)
        >>> round(step.y1.item(), 12), round(step.error.item(), 12)  # 1 + 0.2 + 0.2**2 / 2 and the last term
        (1.22, 0.02)
    """
    h = torch.as_tensor(dt, dtype=y.dtype, device=y.device)
    t = torch.as_tensor(t, dtype=y.dtype, device=y.device)
    f1, g1 = drift(t, y), diffusion(t, y)
    f2 = drift(t + h, y + h * f1)
    g2 = diffusion(t + h, y + increment * g1)
    along = (diffusion(t, y + h.sqrt() * g1) - g1) / h.sqrt()
    y1 = y + h * f1 + increment * (g1 + g2) / 2
    error = h / 2 * (f2 - f1) + along * increment**2 / 2
    return EmbeddedStep(y1, error.to(torch.promote_types(y.dtype, torch.float32)), (f1, f2))


def _single_step(
    sde: Any,
    start: Tensor,
    end: Tensor,
    y: Tensor,
    noise: torchsde.BaseBrownian,
    method: str,
    options: dict[str, Any] | None,
) -> Tensor:
    """A solve with a step that is longer than the span, which torchsde cuts to it."""
    longer = 2 * float(end - start)
    return torchsde.sdeint(sde, y, torch.stack([start, end]), bm=noise, method=method, dt=longer, options=options)[-1]
