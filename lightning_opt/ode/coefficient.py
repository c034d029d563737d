from typing import Literal

from lightning_opt._checks import check_choice, check_interval

Decay = Literal["exponential", "constant"]


def check_coefficient(coeff: float, coeff_end: float, decay: Decay) -> None:
    """Raise ``ValueError`` for what :func:`coefficient` cannot compute."""
    check_interval("coeff", coeff, 0)
    check_choice("decay", decay, ("exponential", "constant"))
    if decay == "exponential":
        check_interval("coeff_end", coeff_end, 0, closed="()")


def coefficient(step: int, total: int, coeff: float, coeff_end: float, decay: Decay = "exponential") -> float:
    """The weight of a regularizer in a step: from ``coeff`` to ``coeff_end`` at the last, or ``coeff`` throughout.

    Args:
        step: Counted from 0.
        total: Steps in all.
        coeff: At the first step; 0 stays 0.
        coeff_end: At the last, with ``"exponential"``.
        decay: ``"exponential"`` (arXiv:2303.02262) or ``"constant"``.

    Example:
        >>> [round(coefficient(k, 2, 4.0, 1.0), 2) for k in range(3)]
        [4.0, 2.0, 1.0]
    """
    if decay == "constant" or coeff == 0.0:
        return coeff
    return coeff * (coeff_end / coeff) ** min(1.0, step / max(1, total))
