import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_opt._checks import check_choice, check_interval

Rule = Literal["effective", "nesterov", "polyak", "ssgdmn", "gd"]
LowerEnd = Literal["median", "min"]
RULES: tuple[Rule, ...] = ("effective", "nesterov", "polyak", "ssgdmn", "gd")
LEAST_MOMENTUM = 0.8
"""Of the rule "effective": with less, its rate would come near the largest stable one."""
MU_FLOOR = 1e-8
"""The smallest condition that is believed, as a share of the sharpness."""


class Step(NamedTuple):
    """What an optimizer is told.

    Attributes:
        lr: Learning rate.
        momentum: Momentum; None where the rule leaves it alone.
        guards: Names of the guards that changed something, in the order in which they act.
    """

    lr: float
    momentum: float | None
    guards: tuple[str, ...] = ()


class Guards(NamedTuple):
    """Limits of what a rule may ask for.

    Attributes:
        safety: The rate is at most this share of the largest stable one, 2 (1 + momentum) / L.
        growth: The effective rate, rate / (1 - momentum), is at most this multiple of the one before.
        momentum_max: Largest momentum.
        lr_min: Smallest rate.
        lr_max: Largest rate.
    """

    safety: float = 1.0
    growth: float = 2.0
    momentum_max: float = 0.99
    lr_min: float = 0.0
    lr_max: float = math.inf


def curvature_range(
    ritz_values: Tensor, weights: Tensor, lower: LowerEnd = "median", weight_threshold: float = 0.5
) -> tuple[float, float]:
    r"""Sharpness and lower end of the curvature from the Ritz values of a Lanczos run.

    Negative curvature counts by its size: with :math:`a_i = |\theta_i|`, the sharpness is :math:`L = \max a_i`.

    Args:
        ritz_values: ``[m]``, of any order.
        weights: ``[m]``, squared first components of the eigenvectors of the tridiagonal matrix; they sum to 1.
        lower: ``"median"``: :math:`\mu` is the median of all :math:`a_i`; ``"min"``: the smallest, where the value
            whose weight exceeds ``weight_threshold`` (the bulk near zero; at most one can) is left out.
        weight_threshold: See ``lower``.

    Returns:
        :math:`L` and :math:`\mu`, not below :math:`10^{-8} L`. Both are NaN if any value is.

    Raises:
        ValueError: If ``lower`` is neither, or shapes differ.

    Source: arXiv:2006.09092 and the authors' scripts; the floor is ours.

    Example:
        >>> values, weights = torch.tensor([-1.0, 0.01, 2.0, 8.0]), torch.tensor([0.1, 0.7, 0.1, 0.1])
        >>> curvature_range(values, weights), curvature_range(values, weights, "min")
        ((8.0, 1.5), (8.0, 1.0))
    """
    check_choice("lower", lower, ("median", "min"))
    if ritz_values.ndim != 1 or ritz_values.shape != weights.shape or not len(weights):
        raise ValueError(
            f"ritz_values and weights must be two vectors of one length, got {ritz_values.shape} and {weights.shape}"
        )
    sizes = ritz_values.detach().abs().to("cpu", torch.float64)
    if not bool(sizes.isfinite().all()):
        return math.nan, math.nan
    largest = sizes.max().item()
    if lower == "median":
        smallest = sizes.quantile(0.5).item()
    else:
        kept = sizes[weights.to("cpu") <= weight_threshold]
        smallest = kept.min().item() if len(kept) else largest
    return largest, max(smallest, MU_FLOOR * largest)


def step_rule(
    rule: Rule,
    sharpness: float,
    mu: float,
    *,
    effective: float = 4.0,
    fixed_momentum: float | None = None,
    paper_bug: bool = False,
) -> Step:
    r"""Learning rate and momentum for curvature between :math:`\mu` and :math:`L`.

    ========== ============================================= ========================================================
    rule       rate                                          momentum
    ========== ============================================= ========================================================
    effective  :math:`c (1 - \beta) / L`                      :math:`\beta` as nesterov, at least 0.8
    nesterov   :math:`1 / L`                                 :math:`(\sqrt L - \sqrt\mu) / (\sqrt L + \sqrt\mu)`
    polyak     :math:`(2 / (\sqrt L + \sqrt\mu))^2`          :math:`((\sqrt L - \sqrt\mu) / (\sqrt L + \sqrt\mu))^2`
    ssgdmn     :math:`\sqrt{\mu / L}`                        as nesterov
    gd         :math:`2 / (L + \mu)`                         left alone
    ========== ============================================= ========================================================

    All but ``ssgdmn`` (which the authors ran) are scale-equivariant: a loss multiplied by c divides the rate by c and
    changes nothing else. ``effective`` is ours: what a gradient moves the weights in all, rate / (1 - momentum), is
    the same share of 1 / L whatever the momentum, which the textbook rules, made for exact gradients, multiply. For
    ``ssgdmn`` the effective rate is (1 + sqrt(mu / L)) / 2, in (0.5, 1], whatever the loss.

    Args:
        rule: Which.
        sharpness: :math:`L`, positive.
        mu: :math:`\mu`, in [0, L].
        effective: :math:`c`, rate / (1 - momentum) times :math:`L`, of the rule ``effective``; positive.
        fixed_momentum: That of an optimizer whose momentum is to be left alone.
        paper_bug: Divide the momentum's root of ``polyak`` by :math:`\sqrt L + \mu`, as the authors' script does.

    Raises:
        ValueError: If the rule is unknown or a number is out of its range.

    Source: arXiv:2006.09092 and the authors' scripts.

    Example:
        >>> lr, momentum, _ = step_rule("ssgdmn", 1448.47, 2.44788)  # a line of the authors' logs
        >>> round(lr, 7), round(momentum, 6)
        (0.0411093, 0.921028)
    """
    check_choice("rule", rule, RULES)
    check_interval("sharpness", sharpness, 0, closed="()")
    check_interval("mu", mu, 0, sharpness)
    check_interval("effective", effective, 0, closed="()")
    high, low = math.sqrt(sharpness), math.sqrt(mu)
    contraction = (high - low) / (high + low)
    momentum: float | None = contraction
    if rule == "effective":
        momentum = max(contraction, LEAST_MOMENTUM) if fixed_momentum is None else fixed_momentum
        lr = effective * (1 - momentum) / sharpness
    elif rule == "nesterov":
        lr = 1 / sharpness
    elif rule == "polyak":
        lr = (2 / (high + low)) ** 2
        momentum = ((high - low) / (high + mu) if paper_bug else contraction) ** 2
    elif rule == "ssgdmn":
        lr = low / high
    else:
        lr, momentum = 2 / (sharpness + mu), None
    return Step(lr, momentum if fixed_momentum is None else None)


def guarded(
    step: Step, sharpness: float, previous: Step | None = None, momentum: float = 0.0, guards: Guards | None = None
) -> Step:
    """Keep what a rule asks for within limits.

    Args:
        step: What the rule asks for.
        sharpness: L, which it was computed from.
        previous: Rate and momentum so far; None for no limit of growth.
        momentum: That of the optimizer, where the rule leaves it alone.
        guards: The limits.

    Returns:
        Rate and momentum within the limits, and which of ``"momentum"``, ``"stability"``, ``"growth"``, ``"lr_min"``,
        ``"lr_max"`` acted.

    Example:
        >>> guarded(Step(4.0, 0.5), sharpness=0.25, previous=Step(0.1, 0.5))
        Step(lr=0.2, momentum=0.5, guards=('growth',))
    """
    guards = guards or Guards()
    lr, acted = step.lr, []
    if step.momentum is not None:
        momentum = min(step.momentum, guards.momentum_max)
        if momentum < step.momentum:
            acted.append("momentum")
    growth = math.inf
    if previous is not None and guards.growth < math.inf:
        before = momentum if previous.momentum is None else previous.momentum
        growth = guards.growth * previous.lr * (1 - momentum) / (1 - before)
    limits = [
        ("stability", min, guards.safety * 2 * (1 + momentum) / sharpness),
        ("growth", min, growth),
        ("lr_min", max, guards.lr_min),
        ("lr_max", min, guards.lr_max),
    ]
    for name, within, limit in limits:
        if within(lr, limit) != lr:
            lr = limit
            acted.append(name)
    return Step(lr, None if step.momentum is None else momentum, tuple(acted))
