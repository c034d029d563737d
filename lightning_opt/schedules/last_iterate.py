"""Step sizes with a guarantee for the last iterate (Liu & Zhou, 2023, arXiv:2312.08531)."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

from ._base import StepSchedule, check_steps
from .linear_decay import linear_decay

Kind = Literal[
    "linear",
    "sqrt",
    "constant",
    "strongly_convex",
    "strongly_convex_squared",
    "two_phase",
    "heavy_tail",
    "heavy_tail_linear",
]


class _Relative(NamedTuple):
    """A factor of the base rate: the one at the first step, and the others divided by it."""

    first: Callable[[int, float], float]  # of total_steps and p
    shape: Callable[[int, int, float], float]  # of the steps done from 0, total_steps and p
    needs_total: bool


_RELATIVE: dict[str, _Relative] = {
    "sqrt": _Relative(lambda T, p: 1.0, lambda s, T, p: (s + 1) ** -0.5, False),  # S1
    "constant": _Relative(lambda T, p: T**-0.5, lambda s, T, p: 1.0, True),  # S2
    "linear": _Relative(lambda T, p: T**-0.5, lambda s, T, p: linear_decay(s, T), True),  # S3
    "heavy_tail": _Relative(lambda T, p: 1.0, lambda s, T, p: (s + 1) ** (-1 / p), False),  # S6
    "heavy_tail_linear": _Relative(lambda T, p: T ** (-1 / p), lambda s, T, p: linear_decay(s, T), True),  # S6
}
_ABSOLUTE = ("strongly_convex", "strongly_convex_squared", "two_phase")


@register(
    "schedule",
    summary="Step sizes with a guarantee for the last iterate: convex, strongly convex, heavy tails",
    paper="2312.08531",
    card="last-iterate-schedules",
)
class LastIterateLR(StepSchedule):
    r"""The step sizes for which the last iterate of (proximal, mirror) SGD converges at the best known rate.

    At step :math:`t = 1, 2, \dots` of :math:`T`, with the group's ``lr`` as :math:`\eta`, smoothness :math:`L`
    (``lipschitz``), strong convexity :math:`\mu` and :math:`\kappa = L / \mu`:

    ========================== ===================================================== ==================================
    kind                       step size                                             for
    ========================== ===================================================== ==================================
    ``linear``                 :math:`\eta (T - t + 1) / T^{3/2}`                    convex
    ``constant``               :math:`\eta / \sqrt T`                                convex; loses a factor log T
    ``sqrt``                   :math:`\eta / \sqrt t`                                convex, T unknown; loses log T
    ``strongly_convex``        :math:`1 / (\mu (t + 2 \kappa))`                      strongly convex, T unknown
    ``strongly_convex_squared``:math:`2 / (\mu (t + 1 + 4 \kappa))`                  the same, start forgotten sooner
    ``two_phase``              :math:`1 / (\mu (1.5 + 2 \kappa))` for                strongly convex
                               :math:`t \le \tau = \lceil T/2 \rceil`, then
                               :math:`2 / (\mu (t - \tau + 2 + 4 \kappa))`
    ``heavy_tail``             :math:`\eta\, t^{-1/p}`                               noise with p moments, T unknown
    ``heavy_tail_linear``      :math:`\eta (T - t + 1) / T^{1 + 1/p}`                noise with p moments
    ========================== ===================================================== ==================================

    With ``normalize=True`` the factor of :math:`\eta` is divided by its value at the first step, so that ``lr`` is the
    peak rate; ``linear`` is then :class:`LinearDecayLR`, and ``heavy_tail_linear`` is the same. With ``lipschitz`` the
    step sizes of the convex kinds are at most :math:`1 / (2 L)`. The strongly convex kinds ignore ``lr``: their rates
    are absolute.

    Which to take: T known, ``linear``. T unknown, ``sqrt``; with rare huge gradients ``heavy_tail``. Strongly convex
    with known constants and no wish to tune, ``strongly_convex``. The rates of the last five kinds are quoted from
    memory of the paper and not confirmed; the card says what was checked.

    Args:
        optimizer: Its groups' ``lr`` are :math:`\eta`.
        kind: See above.
        total_steps: Optimizer steps of the run; None where the kind does not depend on them, or for the
            ``lightning-opt`` command, which finds it out.
        lipschitz: Lipschitz constant :math:`L` of the gradient.
        mu: Strong convexity; None takes each group's ``weight_decay``, which must be coupled (as in SGD) and positive.
        p: How many moments the noise has, in (1, 2].
        kappa: :math:`L / \mu` in the place of ``lipschitz``; 0 for Lipschitz functions that are not smooth.
        normalize: Let ``lr`` be the peak rate.
        extend: What a step beyond ``total_steps`` does where the kind depends on them: raise RuntimeError, or hold the
            final rate.
        last_epoch: Index of the last step done; -1 to begin.

    Raises:
        ValueError: If a value is out of range, ``total_steps`` is needed and missing, or a strongly convex kind is not
            given exactly one of ``lipschitz`` and ``kappa`` (without them its first steps would be of size
            :math:`1 / \mu`).
        RuntimeError: In ``step``, beyond ``total_steps``.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> scheduler = LastIterateLR(optimizer, kind="sqrt")
        >>> for _ in range(3):
        ...     print(f"{scheduler.get_last_lr()[0]:.3f}")
        ...     optimizer.step()
        ...     scheduler.step()
        0.500
        0.354
        0.289
    """

    def __init__(
        self,
        optimizer: Optimizer,
        kind: Kind = "linear",
        total_steps: int | None = None,
        lipschitz: float | None = None,
        mu: float | None = None,
        p: float = 2.0,
        kappa: float | None = None,
        normalize: bool = True,
        extend: Literal["raise", "hold"] = "raise",
        last_epoch: int = -1,
    ) -> None:
        check_choice("kind", kind, [*_RELATIVE, *_ABSOLUTE])
        check_choice("normalize", normalize, [True, False])
        check_interval("p", p, 1.0, 2.0, closed="(]")
        for name, value, closed in (("lipschitz", lipschitz, "(]"), ("mu", mu, "(]"), ("kappa", kappa, "[]")):
            if value is not None:
                check_interval(name, value, 0.0, closed=closed)
        self.kind, self.lipschitz, self.mu, self.p, self.kappa, self.normalize = (
            kind,
            lipschitz,
            mu,
            p,
            kappa,
            normalize,
        )
        if self.ends or total_steps is not None:
            total_steps = check_steps("total_steps", total_steps, 1)
        if kind in _ABSOLUTE:
            self._check_strong_convexity(optimizer)
        super().__init__(optimizer, total_steps, extend, last_epoch)

    @property
    @override
    def ends(self) -> bool:
        relative = _RELATIVE.get(self.kind)
        return self.kind == "two_phase" if relative is None else relative.needs_total

    @override
    def rate(self, step: int, base: float | Tensor, group: dict[str, Any]) -> float | Tensor:
        total = self.total_steps or 0
        if self.kind in _ABSOLUTE:
            mu = group["weight_decay"] if self.mu is None else self.mu
            kappa = self.kappa if self.lipschitz is None else self.lipschitz / mu
            return absolute_rate(self.kind, step + 1, total, mu, kappa)
        relative = _RELATIVE[self.kind]
        factor = relative.shape(step, total, self.p)
        rate = base * (factor if self.normalize else relative.first(total, self.p) * factor)
        if self.lipschitz is None:
            return rate
        limit = 1 / (2 * self.lipschitz)
        return rate.clamp(max=limit) if isinstance(rate, Tensor) else min(rate, limit)

    def _check_strong_convexity(self, optimizer: Optimizer) -> None:
        if (self.lipschitz is None) == (self.kappa is None):
            raise ValueError(
                f"kind={self.kind!r} needs one of lipschitz and kappa, got lipschitz={self.lipschitz} and"
                f" kappa={self.kappa}: without them its first steps would be of size 1/mu"
            )
        for number, group in enumerate(optimizer.param_groups):
            if self.mu is None and not group.get("weight_decay", 0) > 0:
                raise ValueError(
                    f"mu must be given, since group {number} has weight_decay={group.get('weight_decay', 0)}"
                    f" and kind={self.kind!r} needs mu > 0"
                )


def absolute_rate(kind: str, t: int, total_steps: int, mu: Any, kappa: Any) -> float:
    """The step sizes for strongly convex functions, at step t = 1, 2, ... (S4 and S5)."""
    if kind == "strongly_convex":
        return 1 / (mu * (t + 2 * kappa))
    if kind == "strongly_convex_squared":
        return 2 / (mu * (t + 1 + 4 * kappa))
    tau = (total_steps + 1) // 2
    return 1 / (mu * (1.5 + 2 * kappa)) if t <= tau else 2 / (mu * (t - tau + 2 + 4 * kappa))
