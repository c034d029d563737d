"""Embedded Runge-Kutta pairs, with coefficients as exact as they were published."""

import dataclasses
import functools
from fractions import Fraction

import numpy as np

from lightning_opt._checks import check_choice

Row = tuple[Fraction, ...]


@dataclasses.dataclass(frozen=True)
class Tableau:
    r"""The coefficients of an explicit Runge-Kutta pair.

    Stage i is :math:`k_i = f(t + c_i h, y + h \sum_j a_{ij} k_j)`, the step :math:`y_1 = y + h \sum_i b_i k_i`, and the
    error estimate :math:`h \sum_i e_i k_i` with ``error`` the weights of the step less those of the embedded one.

    All are fractions: exact where the published ones are rational, otherwise the decimals as published.

    Attributes:
        name: As :func:`find_tableau` knows it.
        order: Of the step that is carried on; the embedded one has an order less.
        c: Nodes.
        a: Row i holds the i weights of the stages before stage i.
        b: Weights of the step.
        error: Weights of the error estimate.
        dense: Coefficients of :math:`\theta, \theta^2, \dots` for each stage, of the weights that give the state at
            :math:`t + \theta h`; empty for a pair that the solver does not run.

    Example:
        >>> TSIT5.first_same_as_last, sum(DOPRI5.b), sum(DOPRI5.error)
        (True, Fraction(1, 1), Fraction(0, 1))
    """

    name: str
    order: int
    c: Row
    a: tuple[Row, ...]
    b: Row
    error: Row
    dense: tuple[Row, ...] = ()

    @property
    def stages(self) -> int:
        """How many evaluations a step takes; one less where the first is known."""
        return len(self.c)

    @property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is evaluated at the end of the step, and so is the first of the next."""
        return self.c[-1] == 1 and self.a[-1] == self.b[:-1] and self.b[-1] == 0

    @functools.cached_property
    def floats(self) -> tuple[list[float], list[list[float]], list[float], list[float]]:
        """``c, a, b, error`` as floats, rounded once."""
        return _floats(self.c), [_floats(row) for row in self.a], _floats(self.b), _floats(self.error)

    @functools.cached_property
    def dense_floats(self) -> list[list[float]]:
        """``dense`` as floats."""
        return [_floats(row) for row in self.dense]

    @functools.cached_property
    def stability_size(self) -> float:
        r"""The largest s such that the step is stable for :math:`y' = \lambda y` with all :math:`h\lambda` in [-s, 0].

        Example:
            >>> f"{TSIT5.stability_size:.4f} {DOPRI5.stability_size:.4f}"
            '3.5068 3.3066'
        """
        powers, row = [Fraction(1)], [Fraction(1)] * self.stages  # the function is sum_j b A^(j-1) 1 z^j
        for _ in range(self.stages):
            powers.append(sum((w * x for w, x in zip(self.b, row, strict=True)), Fraction(0)))
            row = [sum((w * x for w, x in zip(r, row, strict=False)), Fraction(0)) for r in self.a]
        growth = np.polynomial.Polynomial(_floats(tuple(powers)))
        ends = np.concatenate([(growth - side).roots() for side in (1, -1)])
        return float(min(-ends.real[(np.abs(ends.imag) < 1e-9) & (ends.real < -1e-6)]))


def find_tableau(name: str) -> Tableau:
    """The pair of this name.

    Raises:
        ValueError: If there is none.

    Example:
        >>> find_tableau("bosh3").order
        3
    """
    check_choice("tableau", name, TABLEAUS)
    return TABLEAUS[name]


def _floats(row: Row) -> list[float]:
    return [float(x) for x in row]


def _row(text: str) -> Row:
    return tuple(Fraction(word) for word in text.split())


def _times(p: Row, q: Row) -> Row:
    """The product of two polynomials, lowest power first."""
    product = [Fraction(0)] * (len(p) + len(q) - 1)
    for i, x in enumerate(p):
        for j, y in enumerate(q):
            product[i + j] += x * y
    return tuple(product)


def _dense(scale: str, *factors: str) -> Row:
    """Coefficients of theta, theta^2, ... of a product of polynomials that has no constant term."""
    product = functools.reduce(_times, map(_row, factors), _row(scale))
    assert product[0] == 0
    return product[1:]


def _hermite(b: Row, bump: Row) -> tuple[Row, ...]:
    """The cubic through both ends with their slopes, and ``bump`` times theta^2 (1 - theta)^2 of each stage."""
    rows = []
    for i, (weight, extra) in enumerate(zip(b, bump, strict=True)):
        first, last = int(i == 0), int(i == len(b) - 1)
        linear = Fraction(first)
        square = 3 * weight - 2 * first - last + extra
        cube = -2 * weight + first + last - 2 * extra
        rows.append((linear, square, cube, extra))
    return tuple(rows)


_DOPRI5_B = _row("35/384 0 500/1113 125/192 -2187/6784 11/84 0")

DOPRI5 = Tableau(
    name="dopri5",
    order=5,
    c=_row("0 1/5 3/10 4/5 8/9 1 1"),
    a=(
        (),
        _row("1/5"),
        _row("3/40 9/40"),
        _row("44/45 -56/15 32/9"),
        _row("19372/6561 -25360/2187 64448/6561 -212/729"),
        _row("9017/3168 -355/33 46732/5247 49/176 -5103/18656"),
        _DOPRI5_B[:-1],
    ),
    b=_DOPRI5_B,
    error=_row("71/57600 0 -71/16695 71/1920 -17253/339200 22/525 -1/40"),
    dense=_hermite(
        _DOPRI5_B,
        _row(
            "-12715105075/11282082432 0 87487479700/32700410799 -10690763975/1880347072"
            " 701980252875/199316789632 -1453857185/822651844 69997945/29380423"
        ),
    ),
)
"""Dormand and Prince 1980, error weights and dense output of Hairer, Norsett and Wanner (DOPRI5, as scipy's RK45).

torchdiffeq, torchode and diffrax take error weights that are 2/3 of these.
"""

_TSIT5_B = _row("0.09646076681806523 0.01 0.4798896504144996 1.379008574103742 -3.290069515436081 2.324710524099774 0")

TSIT5 = Tableau(
    name="tsit5",
    order=5,
    c=_row("0 0.161 0.327 0.9 0.9800255409045097 1 1"),
    a=(
        (),
        _row("0.161"),
        _row("-0.008480655492356989 0.335480655492357"),
        _row("2.8971530571054935 -6.359448489975075 4.3622954328695815"),
        _row("5.325864828439257 -11.748883564062828 7.4955393428898365 -0.09249506636175525"),
        _row("5.86145544294642 -12.92096931784711 8.159367898576159 -0.071584973281401 -0.02826905039406838"),
        _TSIT5_B[:-1],
    ),
    b=_TSIT5_B,
    error=_row(
        "-0.00178001105222577714 -0.0008164344596567469 0.007880878010261995 -0.1447110071732629 0.5823571654525552"
        " -0.45808210592918697 1/66"
    ),
    dense=(
        _dense("-1.0530884977290216", "0 1", "-1.3299890189751412 1", "0.7139816917074209 -1.4364028541716351 1"),
        _dense("0.1017", "0 0 1", "1.2949852507374631 -2.1966568338249754 1"),
        _dense("2.490627285651252793", "0 0 1", "1.57803468208092486 -2.38535645472061657 1"),
        _dense("-16.54810288924490272", "0 0 1", "-1.21712927295533244 1", "-0.61620406037800089 1"),
        _dense("47.37952196281928122", "0 0 1", "-1.203071208372362603 1", "-0.658047292653547382 1"),
        _dense("-34.87065786149660974", "0 0 1", "-1.2 1", "-2/3 1"),
        _dense("2.5", "0 0 1", "-1 1", "-0.6 1"),
    ),
)
"""Tsitouras 2011, published in decimals."""

_BOSH3_B = _row("2/9 1/3 4/9 0")

BOSH3 = Tableau(
    name="bosh3",
    order=3,
    c=_row("0 1/2 3/4 1"),
    a=((), _row("1/2"), _row("0 3/4"), _BOSH3_B[:-1]),
    b=_BOSH3_B,
    error=_row("-5/72 1/12 1/9 -1/8"),
    dense=_hermite(_BOSH3_B, _row("0 0 0 0")),
)
"""Bogacki and Shampine 1989."""

ADAPTIVE_HEUN = Tableau(
    name="adaptive_heun",
    order=2,
    c=_row("0 1"),
    a=((), _row("1")),
    b=_row("1/2 1/2"),
    error=_row("-1/2 1/2"),
)
"""Heun's method with Euler's embedded."""

FEHLBERG2 = Tableau(
    name="fehlberg2",
    order=2,
    c=_row("0 1/2 1"),
    a=((), _row("1/2"), _row("1/256 255/256")),
    b=_row("1/512 255/256 1/512"),
    error=_row("-1/512 0 1/512"),
)
"""Fehlberg 1969, order 2 with order 1 embedded."""

FEHLBERG45 = Tableau(
    name="fehlberg45",
    order=5,
    c=_row("0 1/4 3/8 12/13 1 1/2"),
    a=(
        (),
        _row("1/4"),
        _row("3/32 9/32"),
        _row("1932/2197 -7200/2197 7296/2197"),
        _row("439/216 -8 3680/513 -845/4104"),
        _row("-8/27 2 -3544/2565 1859/4104 -11/40"),
    ),
    b=_row("16/135 0 6656/12825 28561/56430 -9/50 2/55"),
    error=_row("1/360 0 -128/4275 -2197/75240 1/50 2/55"),
)
"""Fehlberg 1969, order 5 carried on with order 4 embedded."""

TABLEAUS = {pair.name: pair for pair in (TSIT5, DOPRI5, BOSH3, ADAPTIVE_HEUN, FEHLBERG2, FEHLBERG45)}
