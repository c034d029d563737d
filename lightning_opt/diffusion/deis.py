r"""Diffusion exponential integrators as linear rules over noise predictions (Zhang & Chen, 2022, arXiv:2204.13902).

A diffusion with marginals :math:`x_t = a(t) x_0 + s(t) \epsilon` has, with :math:`v = x / a` and :math:`\rho = s / a`,
the probability-flow ODE

.. math:: dv / d\rho = \epsilon(x, t)

of which nothing but the noise prediction is left to discretize. Every solver here replaces :math:`\epsilon` by a
polynomial and integrates it exactly, so that a step is ``v_next = v + sum_k c_k eps_k`` with numbers ``c_k`` that
depend on the grid alone. Nothing in this file knows a network: coefficients, tableaus, and the plan of calls.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

Basis = Literal["rho", "t", "logrho"]
Warmup = Literal["low_order", "heun", "kutta"]
TimeMap = Callable[[Tensor], Tensor]


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method for ``dv/d rho = eps``.

    Attributes:
        nodes: Where in the step each stage lies, from 0 to 1.
        matrix: Row i: the weights of the stages before stage i + 1 in its argument.
        weights: The weights of the stages in the step.
        order: Its order of convergence.
    """

    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    order: int


#: The methods of rhoRK-DEIS under the names of the authors' code; ``2heun`` is the step of EDM (arXiv:2206.00364).
TABLEAUS: dict[str, Tableau] = {
    "1euler": Tableau((0.0,), (), (1.0,), 1),
    "2heun": Tableau((0.0, 1.0), ((1.0,),), (1 / 2, 1 / 2), 2),
    "3kutta": Tableau((0.0, 1 / 2, 1.0), ((1 / 2,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6), 3),
    "3ral": Tableau((0.0, 1 / 2, 3 / 4), ((1 / 2,), (0.0, 3 / 4)), (2 / 9, 1 / 3, 4 / 9), 3),
    "3heun": Tableau((0.0, 1 / 3, 2 / 3), ((1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4), 3),
    "3vdh": Tableau((0.0, 8 / 15, 2 / 3), ((8 / 15,), (1 / 4, 5 / 12)), (1 / 4, 0.0, 3 / 4), 3),
    "3ssprk": Tableau((0.0, 1.0, 1 / 2), ((1.0,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 2 / 3), 3),
    "4rk": Tableau(
        (0.0, 1 / 2, 1 / 2, 1.0), ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), 4
    ),
}

#: iPNDM: the Adams-Bashforth weights of a uniform grid, newest first, by order.
IPNDM_WEIGHTS: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}

_BASES: dict[str, Basis] = {"t_ab": "t", "rho_ab": "rho", "logrho_ab": "logrho"}

#: Every solver of the paper and the log-rho variant of diffusers; ``rk_<tableau>`` are rhoRK-DEIS.
ALGORITHMS: tuple[str, ...] = (*_BASES, "ipndm", *(f"rk_{name}" for name in TABLEAUS))


class NetworkCall(NamedTuple):
    """One call of the network and the update that follows it.

    Attributes:
        rho: Noise level at which the network is called.
        rho_next: Noise level of the sample after the update.
        coefficients: Of the noise predictions so far, newest first, in ``v_next = v_start + sum_k c_k eps_k``.
        stage: 0 where a step starts: ``v_start`` is then the sample at hand, otherwise that of stage 0.
    """

    rho: float
    rho_next: float
    coefficients: tuple[float, ...]
    stage: int


@register("tool", summary="Coefficients of exponential integrators for diffusion ODEs", paper="2204.13902")
def deis_coefficients(
    rho: Tensor, order: int | Sequence[int], basis: Basis = "rho", *, time: TimeMap | None = None
) -> Tensor:
    r"""The weights of the past noise predictions in each multistep update: tAB-, rhoAB- and log-rho-AB-DEIS.

    With :math:`\phi(\rho)` the basis variable (:math:`\rho` itself, :math:`t(\rho)` or :math:`\log \rho`), the
    coefficient of the prediction at :math:`\rho_{i-j}` in the step from :math:`\rho_i` is

    .. math:: C_{ij} = \int_{\rho_i}^{\rho_{i+1}} \prod_{k \ne j}
              \frac{\phi(u) - \phi(\rho_{i-k})}{\phi(\rho_{i-j}) - \phi(\rho_{i-k})}\, du,

    the paper's :math:`C_{ij}` (arXiv:2204.13902, section 3) in the variables :math:`v = x / a`, :math:`\rho = s / a`,
    where the transition matrix is the identity and the weight of the integral is :math:`d\rho`; multiply by
    :math:`a(t_{i+1})` for coefficients of :math:`x`. The authors sum 10,000 points; here it is Gauss-Legendre
    quadrature with 64 nodes in :math:`u^{1/8}`, exact to rounding for polynomials in :math:`\rho`, for
    :math:`\log \rho` down to a last level of 0, and for a smooth ``time``; for one with kinks (an interpolated
    schedule) to some 1e-7 of the step.

    Args:
        rho: Noise levels ``[N + 1]``, falling; the last may be 0.
        order: 1 to 4, the number of predictions used: the degree of the polynomial plus one. Step i uses
            ``min(order, i + 1)``, the low-order start. A sequence gives the number of each step.
        basis: The variable of the polynomial.
        time: For ``basis="t"``: maps noise levels to times, elementwise, strictly rising.

    Returns:
        Coefficients ``[N, max(order)]`` in float64, newest first, with zeros behind each step's own number.

    Raises:
        ValueError: If ``rho`` is not falling, an order is outside 1 to 4 or beyond the history, or ``time`` is missing
            or not rising.

    Example:
        >>> deis_coefficients(torch.tensor([3.0, 2.0, 1.0, 0.0]), 2)
        tensor([[-1.0000,  0.0000],
                [-1.5000,  0.5000],
                [-1.5000,  0.5000]], dtype=torch.float64)
    """
    check_choice("basis", basis, get_args(Basis))
    rho = _falling(rho)
    orders = _orders(order, len(rho) - 1)
    nodes, weights = _quadrature(rho)
    phi = _basis_variable(basis, time)
    at_grid, at_nodes = phi(rho[:-1]), phi(nodes)
    if basis == "t" and bool((at_grid.diff() >= 0).any()):
        raise ValueError("time must map higher noise levels to later times")
    coefficients = torch.zeros(len(orders), max(orders), dtype=torch.float64)
    for q in sorted(set(orders)):
        rows = torch.tensor([i for i, of_step in enumerate(orders) if of_step == q])
        past = at_grid[rows[:, None] - torch.arange(q)]
        for j in range(q):
            factors = [
                (at_nodes[rows] - past[:, k, None]) / (past[:, j] - past[:, k])[:, None] for k in range(q) if k != j
            ]
            lagrange = functools.reduce(torch.mul, factors, torch.ones_like(at_nodes[rows]))
            coefficients[rows, j] = (weights[rows] * lagrange).sum(dim=1)
    return coefficients


def network_calls(
    rho: Tensor,
    algorithm: str,
    order: int = 3,
    *,
    warmup: Warmup = "low_order",
    lower_order_final: bool = False,
    denoise: bool = False,
    skip: int = 0,
    time: TimeMap | None = None,
) -> list[NetworkCall]:
    """What a sampler does on a grid of noise levels: one entry a call of the network, each with its update.

    Args:
        rho: Noise levels ``[N + 1]``, falling.
        algorithm: One of ``ALGORITHMS``. Multistep methods make N calls, ``rk_*`` N times their stages.
        order: Order of the multistep methods, 1 to 4; of no account for ``rk_*``.
        warmup: How a multistep method starts. ``"low_order"`` uses the few predictions that there are, which costs no
            call and limits the order of convergence to 2. ``"heun"`` makes the first step of an order above 2 by Heun's
            method (one call more), which carries order 3; ``"kutta"`` makes the first two steps of order 4 by
            Kutta's of order 3 (four calls more), which carries order 4.
        lower_order_final: End with an order of at most the steps left: 2 in the last step but one, 1 in the last.
        denoise: Extend the last update to noise level 0 with the newest prediction, at no call's cost.
        skip: Begin behind so many steps, with no predictions; the calls left are at the same levels.
        time: For ``"t_ab"``: maps noise levels to times.

    Returns:
        The calls in order.

    Raises:
        ValueError: If a name is unknown, an order is outside 1 to 4, a multistep method of order r has fewer than r
            steps, or all steps are skipped.

    Example:
        >>> for call in network_calls(torch.tensor([2.0, 1.0, 0.0]), "rk_2heun"):
        ...     print(call)
        NetworkCall(rho=2.0, rho_next=1.0, coefficients=(-1.0,), stage=0)
        NetworkCall(rho=1.0, rho_next=1.0, coefficients=(-0.5, -0.5), stage=1)
        NetworkCall(rho=1.0, rho_next=0.0, coefficients=(-1.0,), stage=0)
        NetworkCall(rho=0.0, rho_next=0.0, coefficients=(-0.5, -0.5), stage=1)
    """
    check_choice("algorithm", algorithm, ALGORITHMS)
    check_choice("warmup", warmup, get_args(Warmup))
    rho = _falling(rho)
    steps = len(rho) - 1
    check_interval("skip", skip, 0, steps - 1)
    rho = rho[skip:]
    if algorithm.startswith("rk_"):
        tableau, levels = TABLEAUS[algorithm.removeprefix("rk_")], rho.tolist()
        calls = [call for pair in zip(levels, levels[1:], strict=False) for call in _runge_kutta(*pair, tableau)]
    else:
        check_interval("order", order, 1, 4)
        if steps < order:
            raise ValueError(f"a multistep method of order {order} needs at least {order} steps, got {steps}")
        single_steps, tableau = _start(order, warmup)
        calls = _multistep(rho, algorithm, order, lower_order_final, max(0, single_steps - skip), tableau, time)
    if denoise and calls[-1].rho_next > 0:
        rho_last, rho_next, (newest, *others), stage = calls[-1]
        calls[-1] = NetworkCall(rho_last, 0.0, (newest - rho_next, *others), stage)
    return calls


def ipndm_coefficients(rho: Tensor, order: int | Sequence[int]) -> Tensor:
    """The weights of iPNDM: those of a uniform grid times the step in rho, whatever the grid.

    Args:
        rho: Noise levels ``[N + 1]``, falling.
        order: As in :func:`deis_coefficients`.

    Returns:
        Coefficients ``[N, max(order)]`` in float64, newest first.

    Raises:
        ValueError: As there.
    """
    rho = _falling(rho)
    orders = _orders(order, len(rho) - 1)
    weights = torch.zeros(len(orders), max(orders), dtype=torch.float64)
    for i, q in enumerate(orders):
        weights[i, :q] = torch.tensor(IPNDM_WEIGHTS[q], dtype=torch.float64)
    return rho.diff()[:, None] * weights


def _multistep(
    rho: Tensor,
    algorithm: str,
    order: int,
    lower_order_final: bool,
    single_steps: int,
    tableau: Tableau,
    time: TimeMap | None,
) -> list[NetworkCall]:
    levels, steps = rho.tolist(), len(rho) - 1
    orders = [min(order, i + 1, steps - i if lower_order_final else order) for i in range(steps)]
    if algorithm == "ipndm":
        table = ipndm_coefficients(rho, orders)
    else:
        table = deis_coefficients(rho, orders, _BASES[algorithm], time=time)
    calls: list[NetworkCall] = []
    places: list[int] = []  # of each step's first call among the calls
    for i, (now, after) in enumerate(zip(levels, levels[1:], strict=False)):
        places.append(len(calls))
        if i < single_steps:
            calls += _runge_kutta(now, after, tableau)
            continue
        coefficients = [0.0] * (places[-1] - places[-orders[i]] + 1)  # the inner stages of the start do not count
        for j, value in enumerate(table[i, : orders[i]].tolist()):
            coefficients[places[-1] - places[i - j]] = value
        calls.append(NetworkCall(now, after, tuple(coefficients), 0))
    return calls


def _start(order: int, warmup: str) -> tuple[int, Tableau]:
    """How many steps are made by which method before the multistep method has enough predictions for its order."""
    if warmup == "heun" and order > 2:
        return 1, TABLEAUS["2heun"]
    if warmup == "kutta" and order > 2:
        return order - 2, TABLEAUS["3kutta"]
    return 0, TABLEAUS["1euler"]


def _runge_kutta(now: float, after: float, tableau: Tableau) -> list[NetworkCall]:
    step = after - now
    levels = [now + node * step if node < 1 else after for node in tableau.nodes]
    rows = [*tableau.matrix, tableau.weights]
    return [
        NetworkCall(level, following, tuple(step * weight for weight in reversed(row)), stage)
        for stage, (level, following, row) in enumerate(zip(levels, [*levels[1:], after], rows, strict=True))
    ]


def _orders(order: int | Sequence[int], steps: int) -> list[int]:
    """The number of predictions that each step uses."""
    asked = [order] * steps if isinstance(order, int) else list(order)
    if len(asked) != steps:
        raise ValueError(f"order must be one number or one for each of the {steps} steps, got {len(asked)}")
    for i, q in enumerate(asked):
        check_interval("order", q, 1, 4)
        if q > i + 1 and not isinstance(order, int):
            raise ValueError(f"order must be at most {i + 1} in step {i}, which has no more predictions; got {q}")
    return [min(q, i + 1) for i, q in enumerate(asked)]


def _falling(rho: Tensor) -> Tensor:
    rho = rho.detach().to("cpu", torch.float64)
    if rho.ndim != 1 or len(rho) < 2:
        raise ValueError(f"rho must hold at least two noise levels in one dimension, got shape {tuple(rho.shape)}")
    if not bool(rho.isfinite().all()) or bool((rho.diff() >= 0).any()) or rho[-1] < 0:
        raise ValueError(f"rho must be finite, falling and not negative, got {rho.tolist()}")
    return rho


def _basis_variable(basis: Basis, time: TimeMap | None) -> TimeMap:
    if basis == "t":
        if time is None:
            raise ValueError("basis='t' needs time, which maps noise levels to times")
        return time
    return torch.log if basis == "logrho" else lambda rho: rho


def _quadrature(rho: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights ``[N, 64]`` of the integrals over each step: Gauss-Legendre in w, with rho = w ** 8.

    A power of the logarithm is singular at 0; after the substitution it comes with a factor w ** 7, and 64 nodes see a
    smooth function. Polynomials of degree 3 in rho, or in rho ** 2, stay polynomials of degree below 128.
    """
    nodes, weights = (torch.from_numpy(part) for part in _legendre())
    w = rho ** (1 / 8)
    middle, half = (w[1:] + w[:-1]) / 2, (w[1:] - w[:-1]) / 2
    at = middle[:, None] + half[:, None] * nodes
    return at**8, half[:, None] * weights * 8 * at**7


@functools.cache
def _legendre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(64)
