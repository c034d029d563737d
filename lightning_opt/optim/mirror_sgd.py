"""Stochastic mirror descent (Nemirovski & Yudin, 1983; with last-iterate rates, arXiv:2312.08531)."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack, override

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

from ._base import Optimizer, Options
from ._tensor_list import each


@register(
    "optimizer",
    summary="Mirror descent: entropy (probabilities stay probabilities) and p-norm",
    paper="2312.08531",
    card="last-iterate-schedules",
)
class MirrorSGD(Optimizer):
    r"""SGD in the geometry of a mirror map :math:`\psi`: :math:`\nabla \psi(x_{t+1}) = \nabla \psi(x_t) - \gamma g_t`.

    =============== ======================================== ========================================================
    mirror          :math:`\psi`                             step
    =============== ======================================== ========================================================
    ``euclidean``   :math:`\frac12 \lVert x \rVert_2^2`      SGD
    ``entropy``     :math:`\sum x \log x` on the simplex     :math:`x \propto x \exp(-\gamma g)`, rows of sum 1
    ``pnorm`` (p)   :math:`\frac12 \lVert x \rVert_p^2`      a step in the dual variable of each tensor
    =============== ======================================== ========================================================

    (arXiv:2312.08531, CSMD with h = 0.) Entropy pays where the rows of the last dimension are probabilities (mixture
    weights, attention over experts): its error grows with the logarithm of their number. ``pnorm`` with p close to 1
    does the same for sparse weights of any sign. For weights that keep their signs see
    :class:`~lightning_opt.optim.ExponentiatedSGD`. The dual variable is a function of the weights and is not kept.

    Args:
        params: Parameters, named parameters or groups; with ``entropy`` non-negative, no row all zero. A zero stays.
        lr: Learning rate.
        mirror: See above.
        p: Exponent in (1, 2] of ``pnorm``; None otherwise.
        **options: ``maximize``, ``foreach``, ``fused``, ``capturable``, ``differentiable``, ``state_dtype``,
            ``stochastic_rounding``, as :class:`lightning_opt.optim.Options` says.

    Raises:
        ValueError: If a value is out of range, ``p`` is missing or given without use, or parameters do not fit
            ``entropy``: negative, a row of zeros, complex.
        RuntimeError: In ``step``, for sparse gradients, or for ``fused=True``: there is no fused kernel.

    Cost:
        No state; some ten passes over memory.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([0.5, 0.25, 0.25]))
        >>> optimizer = MirrorSGD([weight], lr=1.0, mirror="entropy")
        >>> weight.grad = torch.tensor([0.0, 0.0, -0.6931472])  # doubles the last one's share
        >>> optimizer.step()
        >>> weight.data
        tensor([0.4000, 0.2000, 0.4000])
    """

    counts_steps = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        mirror: Literal["euclidean", "entropy", "pnorm"] = "euclidean",
        p: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "mirror": mirror, "p": p}, **options)

    @override
    def validate(self, group: dict[str, Any]) -> None:
        check_choice("mirror", group["mirror"], ["euclidean", "entropy", "pnorm"])
        if (group["mirror"] == "pnorm") != (group["p"] is not None):
            raise ValueError(f"p must be given with mirror='pnorm' and with no other, got p={group['p']}")
        if group["p"] is not None:
            check_interval("p", group["p"], 1.0, 2.0, closed="(]")
        if group["mirror"] == "entropy":
            for p in group["params"]:
                _check_simplex(p)

    @override
    def coefficients(self, step: Any, lr: Any, group: dict[str, Any]) -> dict[str, Any]:
        return {"lr": lr}

    @override
    def flags(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"mirror": group["mirror"], "exponent": group["p"]}

    @staticmethod
    def update(p: Any, g: Any, state: Any, c: Any, *, mirror: str, exponent: float | None) -> None:
        """A gradient step in the dual variable."""
        if mirror == "euclidean":
            p.sub_(c.lr * g)
        elif mirror == "entropy":
            d = c.lr * g
            # an infinite gradient would give a weight of 0, which is finite: what is wrong must show
            p.copy_(each(lambda x, y: (x.log() - y).softmax(dim=-1) + 0.0 * y, p, d))
        else:
            assert exponent is not None
            dual = each(lambda x: norm_gradient(x, exponent), p) - c.lr * g
            p.copy_(each(lambda x: norm_gradient(x, exponent / (exponent - 1)), dual))


def norm_gradient(x: Tensor, p: float) -> Tensor:
    r"""The gradient of half the squared p-norm, :math:`\mathrm{sign}(x) |x|^{p-1} \lVert x \rVert_p^{2-p}`.

    That of :math:`q = p / (p - 1)` is its inverse.

    Args:
        x: Any shape, taken as one vector.
        p: Above 1.

    Example:
        >>> x = torch.tensor([3.0, -4.0, 0.0])
        >>> norm_gradient(norm_gradient(x, 1.5), 3.0)
        tensor([ 3.0000, -4.0000,  0.0000])
    """
    if p == 2 or x.numel() == 0:
        return x
    largest = x.detach().abs().amax()
    scale = torch.where(largest > 0, largest, 1.0)  # powers of large and of small numbers would leave the range
    unit = x / scale
    norm = unit.abs().pow(p).sum().pow(1 / p)
    norm = torch.where(largest > 0, norm, 1.0)
    return scale * unit.sign() * unit.abs().pow(p - 1) * norm ** (2 - p) + 0.0 * x


def _check_simplex(p: Tensor) -> None:
    if p.is_complex():
        raise ValueError("MirrorSGD(mirror='entropy') does not support complex parameters: they have no order")
    if p.device.type == "meta" or p.numel() == 0:
        return
    if not bool((p >= 0).all()):
        raise ValueError(f"mirror='entropy' needs parameters >= 0, got {p.min().item()}")
    if not bool((p.reshape(1) if p.ndim == 0 else p).sum(dim=-1).all()):
        raise ValueError("mirror='entropy' needs a positive number in every row of the last dimension, got only zeros")
