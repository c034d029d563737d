"""AdaGrad-Norm: AdaGrad with one step size for all parameters (arXiv:1806.01811, algorithm 1)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack, override

from lightning_opt._checks import check_interval
from lightning_opt.registry import register

from ._base import Optimizer, Options


@register(
    "optimizer",
    summary="AdaGrad with one step size for all parameters, from the norms of their gradients",
    paper="1806.01811",
    card="adaptive-batch-size",
)
class AdaGradNorm(Optimizer):
    r"""AdaGrad-Norm: AdaGrad with the sum of the squared norms of all gradients in the place of each square.

    .. math::
        v_t = v_{t-1} + \lVert g_t \rVert^2, \qquad \theta_t = \theta_{t-1} - \gamma\, g_t / \sqrt{v_t}

    The norm is that of the gradients of **all** parameters, of every group, in one vector; :math:`v_0` is given. So the
    direction is that of gradient descent, and the step size adapts to the unknown smoothness and noise. It is one of
    the two methods that arXiv:2402.11215 analyses under batches that grow
    (:class:`lightning_opt.callbacks.AdaptiveBatchSize`).

    A gradient that is not finite makes its own coordinates NaN; it does not enter the sum, and nothing
    else moves but by the weight decay.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate; with 1 the first step has a length below 1.
        v0: :math:`v_0`, positive. Of the first group; it is one number for all.
        weight_decay: Decay of the weights, by ``lr * weight_decay`` (decoupled).
        **options: ``maximize``, ``foreach``, ``capturable``, ``differentiable``, as
            :class:`lightning_opt.optim.Options` says. There is no fused kernel.

    Raises:
        ValueError: If a value is out of range.
        RuntimeError: In ``step``, for sparse gradients.

    Cost:
        One number of state; two passes over the gradients.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = AdaGradNorm([p], lr=1.0, v0=11.0)
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> p.data
        tensor([-0.5000, -0.6667])
    """

    counts_steps = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        v0: float = 1e-2,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "v0": v0, "weight_decay": weight_decay}, **options)

    @override
    def validate(self, group: dict[str, Any]) -> None:
        check_interval("v0", group["v0"], 0.0, closed="(]")
        check_interval("weight_decay", group["weight_decay"], 0.0)

    @override
    def prepare(self, gradients: Sequence[Tensor]) -> None:
        device = gradients[0].device
        before = self.param_groups[0].get("sum_sq", self.param_groups[0]["v0"])
        before = torch.as_tensor(before, dtype=torch.float64, device=device)
        after = before + sum(g.abs().double().square().sum().to(device) for g in gradients)
        self._finite = after.isfinite()
        for group in self.param_groups:
            group["sum_sq"] = torch.where(self._finite, after, before)

    @override
    def coefficients(self, step: Any, lr: Any, group: dict[str, Any]) -> dict[str, Any]:
        return {"size": lr * (self._finite / group["sum_sq"].sqrt()), "shrink": 1 - group["weight_decay"] * lr}

    @staticmethod
    def update(p: Any, g: Any, state: Any, c: Any) -> None:
        """Algorithm 1 of arXiv:1806.01811."""
        p.mul_(c.shrink).sub_(g * c.size)

    @override
    def statistics(self, loss: Tensor | None = None) -> dict[str, Tensor]:
        """``step_size``, the learning rate over the root of the sum, before the coming step adds to it."""
        group = self.param_groups[0]
        total = torch.as_tensor(group.get("sum_sq", group["v0"]), dtype=torch.float64)
        return {"step_size": group["lr"] / total.sqrt()}
