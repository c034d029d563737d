"""Proximal SGD (the Euclidean case of composite stochastic mirror descent, arXiv:2312.08531)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack, override

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

from ._base import Optimizer, Options
from ._tensor_list import each

PROXES = ("l1", "box", "l2ball", "simplex")
_ELEMENTWISE = ("l1", "box")


@register(
    "optimizer",
    summary="SGD with a penalty or a constraint that holds exactly: l1, box, ball, simplex",
    paper="2312.08531",
    card="last-iterate-schedules",
    capabilities=("fused",),
)
class ProxSGD(Optimizer):
    r"""SGD on :math:`f + h`, with the gradient of f and the proximal operator of h.

    .. math:: x_{t+1} = \mathrm{prox}_{\gamma h}\big(x_t - \gamma\, (g_t + \lambda x_t)\big)

    (arXiv:2312.08531, the Euclidean step of CSMD.) What h asks for holds after every step and exactly: zeros are zeros,
    and a constraint is never left. A schedule that decays to zero, such as ``LinearDecayLR``, makes the last iterate
    good; nothing needs to be averaged.

    =========== ==================================================== =================================================
    prox        h                                                    proximal operator
    =========== ==================================================== =================================================
    ``l1``      ``strength`` times the 1-norm                        soft threshold at ``lr * strength``
    ``box``     elements in [-strength, strength]                    clip
    ``l2ball``  2-norm of each tensor <= ``strength``                scale
    ``simplex`` rows (last dimension) >= 0 with sum ``strength``     projection by sorting
    =========== ==================================================== =================================================

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate.
        prox: Name of h, or a function from a tensor and the learning rate to the proximal point, which no checkpoint
            holds: give it again.
        strength: Weight of the penalty, or size of the constraint.
        weight_decay: Coupled: :math:`\lambda / 2` times the squared norm is a part of f.
        **options: ``maximize``, ``foreach``, ``fused``, ``capturable``, ``differentiable``, ``state_dtype``,
            ``stochastic_rounding``, as :class:`lightning_opt.optim.Options` says.

    Raises:
        ValueError: If a value is out of range, or for complex parameters with ``simplex``.
        RuntimeError: In ``step``, for sparse gradients, or where ``fused=True`` cannot be honoured: the fused kernels
            cover l1 and box.

    Cost:
        No state; one pass over memory when fused, 12 bytes a parameter in float32. ``simplex`` sorts each row.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -0.2, 0.0]))
        >>> optimizer = ProxSGD([weight], lr=0.5, prox="l1", strength=1.0)
        >>> weight.grad = torch.zeros(3)
        >>> optimizer.step()
        >>> weight.data
        tensor([0.5000, 0.0000, 0.0000])
    """

    counts_steps = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        prox: str | Callable[[Tensor, float], Tensor] = "l1",
        strength: float = 1e-4,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        self._functions: dict[str, Callable[[Tensor, float], Tensor]] = {}
        defaults = {"lr": lr, "prox": prox, "strength": strength, "weight_decay": weight_decay}
        super().__init__(params, defaults, **options)

    @override
    def validate(self, group: dict[str, Any]) -> None:
        check_interval("weight_decay", group["weight_decay"], 0.0)
        if callable(group["prox"]):
            name = getattr(group["prox"], "__qualname__", type(group["prox"]).__qualname__)
            self._functions[name] = group["prox"]
            group["prox"] = name
        if group["prox"] not in self._functions:
            check_choice("prox", group["prox"], PROXES)
        check_interval("strength", group["strength"], 0.0, closed="[]" if group["prox"] == "l1" else "(]")
        if group["prox"] == "simplex" and any(p.is_complex() for p in group["params"]):
            raise ValueError("ProxSGD(prox='simplex') does not support complex parameters: they have no order")

    @override
    def coefficients(self, step: Any, lr: Any, group: dict[str, Any]) -> dict[str, Any]:
        return {
            "lr": lr,
            "decay": group["weight_decay"],
            "threshold": lr * group["strength"],
            "size": group["strength"],
        }

    @override
    def flags(self, group: dict[str, Any]) -> dict[str, Any]:
        if self.fused_kernel(group) is not None:
            return {"prox": group["prox"]}
        return {"prox": group["prox"], "function": self._functions.get(group["prox"])}

    @staticmethod
    def update(
        p: Any, g: Any, state: Any, c: Any, *, prox: str, function: Callable[[Tensor, float], Tensor] | None = None
    ) -> None:
        """A gradient step, and the proximal operator of h."""
        z = p - c.lr * (g + c.decay * p)
        if function is not None:
            p.copy_(each(lambda x: function(x, c.lr), z))
        elif prox == "l1":
            p.copy_(z - z.clamp(-c.threshold, c.threshold))
        elif prox == "box":
            p.copy_(z.clamp(-c.size, c.size) + 0.0 * z)  # what is infinite must show, and not be cut to the box
        elif prox == "l2ball":
            p.copy_(each(lambda x: x * _shrinkage(x, c.size), z))
        else:
            p.copy_(each(lambda x: project_simplex(x, c.size), z))

    @override
    def fused_kernel(self, group: dict[str, Any]) -> str | None:
        return "prox_sgd" if group["prox"] in _ELEMENTWISE else None

    @override
    def statistics(self, loss: Tensor | None = None) -> dict[str, Tensor]:
        """``zero_fraction``: share of weights that are exactly zero, which is what ``l1`` is for."""
        zeros = [(p == 0).sum() for group in self.param_groups for p in group["params"]]
        count = sum(p.numel() for group in self.param_groups for p in group["params"])
        return {"zero_fraction": torch.stack(zeros).sum() / max(1, count)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict.

        Raises:
            ValueError: If it was saved with a function as prox that this optimizer was not constructed with.
        """
        for group in state_dict["param_groups"]:
            prox = group.get("prox", "l1")
            if prox not in PROXES and prox not in self._functions:
                raise ValueError(
                    f"the state dict was saved with the function {prox!r} as prox, which it does not hold: construct"
                    " the optimizer with that function, then load"
                )
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_functions": self._functions}


def project_simplex(x: Tensor, total: float = 1.0) -> Tensor:
    r"""The nearest point with non-negative rows of a given sum.

    Args:
        x: Rows are along the last dimension; a 0-dim tensor is one row.
        total: Sum of each row, positive.

    Returns:
        :math:`\max(x - \tau, 0)` with the threshold of each row at which the sum is right, found by sorting; NaN where
        a row holds NaN or inf.

    Example:
        >>> project_simplex(torch.tensor([0.8, 0.6, -1.0]))
        tensor([0.6000, 0.4000, 0.0000])
    """
    if x.numel() == 0:
        return x
    rows = x.reshape(1) if x.ndim == 0 else x
    ordered = rows.sort(dim=-1, descending=True).values
    ranks = torch.arange(1, rows.shape[-1] + 1, dtype=x.dtype, device=x.device)
    excess = ordered.cumsum(-1) - total
    kept = (ordered * ranks > excess).sum(-1, keepdim=True).clamp_min(1)
    tau = excess.gather(-1, kept - 1) / kept.to(x.dtype)
    return ((rows - tau).clamp_min(0) + 0.0 * rows).reshape(x.shape)


def _shrinkage(x: Tensor, radius: float) -> Tensor:
    """The factor that brings a tensor into the ball."""
    norm = torch.linalg.vector_norm(x)
    return torch.where(norm > radius, radius / torch.where(norm > 0, norm, 1.0), 1.0)
