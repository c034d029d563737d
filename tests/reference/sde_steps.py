"""Steps of stochastic differential equations with diagonal noise, written from their formulas, one number at a time."""

import math
from collections.abc import Callable

Function = Callable[[float, float], float]


def euler(f: Function, g: Function, t: float, y: float, h: float, dw: float) -> float:
    return y + h * f(t, y) + dw * g(t, y)


def milstein(f: Function, g: Function, dg: Function, t: float, y: float, h: float, dw: float) -> float:
    """Ito; ``dg`` is the derivative of ``g`` in the state."""
    return euler(f, g, t, y, h, dw) + g(t, y) * dg(t, y) * (dw**2 - h) / 2


def euler_heun(f: Function, g: Function, t: float, y: float, h: float, dw: float) -> float:
    """Stratonovich."""
    return y + h * f(t, y) + dw * (g(t, y) + g(t + h, y + dw * g(t, y))) / 2


def doubled_error(step: Callable[..., float], t: float, y: float, h: float, first: float, second: float) -> float:
    """``step(t, y, h, dw)`` once minus twice at half the size, over increments of the two halves."""
    return step(t, y, h, first + second) - step(t + h / 2, step(t, y, h / 2, first), h / 2, second)


def sri(f: Function, g: Function, t: float, y: float, h: float, dw: float, area: float) -> tuple[float, float]:
    """Roessler's SRI method of strong order 1.5 (SIAM J. Numer. Anal. 48(3), 2010), with the sums of its definition.

    Returns:
        The step, and the same without the integrals of higher order and with the first stage alone as the drift.
    """
    alpha = (1 / 6, 1 / 6, 2 / 3, 0)
    beta = ((-1, 4 / 3, 2 / 3, 0), (1, -4 / 3, 1 / 3, 0), (2, -4 / 3, -2 / 3, 0), (-2, 5 / 3, -2 / 3, 1))
    c0, c1 = (0, 1, 1 / 2, 0), (0, 1 / 4, 1, 1 / 4)
    a0 = ((), (1,), (1 / 4, 1 / 4), (0, 0, 0))
    a1 = ((), (1 / 4,), (1, 0), (0, 0, 1 / 4))
    b0 = ((), (0,), (1, 1 / 2), (0, 0, 0))
    b1 = ((), (-1 / 2,), (1, 0), (2, -1, 1 / 2))
    integrals = (dw, (dw**2 - h) / 2 / math.sqrt(h), area / h, (dw**3 - 3 * h * dw) / 6 / h)
    drifts: list[float] = []
    diffusions: list[float] = []
    for i in range(4):
        h0 = y + sum(h * a0[i][j] * drifts[j] + area / h * b0[i][j] * diffusions[j] for j in range(i))
        h1 = y + sum(h * a1[i][j] * drifts[j] + math.sqrt(h) * b1[i][j] * diffusions[j] for j in range(i))
        drifts.append(f(t + c0[i] * h, h0))
        diffusions.append(g(t + c1[i] * h, h1))
    noise = [
        sum(b * d for b, d in zip(row, diffusions, strict=True)) * i for row, i in zip(beta, integrals, strict=True)
    ]
    high = y + h * sum(a * d for a, d in zip(alpha, drifts, strict=True)) + sum(noise)
    return high, y + h * drifts[0] + noise[0] + noise[1]
