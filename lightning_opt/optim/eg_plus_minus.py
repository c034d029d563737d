"""EG+- (Kivinen & Warmuth, 1997): exponentiated gradient for weights of both signs."""

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
    summary="Exponentiated gradient for weights of both signs, with an optional budget of the 1-norm",
    paper="2510.02730",
    card="exponentiated-gradient",
)
class EGPlusMinus(Optimizer):
    r"""EG+-: :math:`w = p - q` with :math:`p \leftarrow p\, e^{-\gamma g}` and :math:`q \leftarrow q\, e^{\gamma g}`.

    With a ``budget`` U both are then scaled to :math:`\sum (p + q) = U` in each tensor, so :math:`\|w\|_1 \le U`
    (Kivinen and Warmuth, 1997); without, the product :math:`p q` never changes (the unnormalised EGU+-, whose
    memory-free twin is ``ExponentiatedSGD(variant="hyper")``). Regret grows with the logarithm of the dimension: for
    few relevant inputs.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate.
        budget: Bound of the 1-norm of each tensor, or None.
        momentum: Momentum of the gradient.
        beta: Without a budget, sets :math:`p q = \beta^2 / 4` at the start.
        max_log_step: Largest change of :math:`\log p` and :math:`\log q` in a step before scaling, or None (ours: a
            single large gradient would overflow).
        **options: ``maximize``, ``foreach``, ``capturable``, ``differentiable``, ``state_dtype``, as
            :class:`lightning_opt.optim.Options` says. There is no fused kernel.

    Raises:
        ValueError: If a value is out of range; in the first step, if a tensor exceeds its budget; in
            ``load_state_dict``, if the loaded parts do not make up the weights.
        RuntimeError: In ``step``, for sparse gradients.

    Cost:
        Two state tensors, three with momentum (8 or 12 bytes a parameter in float32).

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(4))
        >>> optimizer = EGPlusMinus([weight], lr=0.5, budget=1.0)
        >>> weight.grad = torch.tensor([1.0, 0.0, 0.0, 0.0])
        >>> optimizer.step()
        >>> weight.abs().sum().item() <= 1.0
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        budget: float | None = None,
        momentum: float = 0.0,
        *,
        beta: float = 1e-3,
        max_log_step: float | None = 1.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "budget": budget, "momentum": momentum, "beta": beta, "max_log_step": max_log_step}
        super().__init__(params, defaults, **options)

    @override
    def validate(self, group: dict[str, Any]) -> None:
        check_interval("momentum", group["momentum"], 0.0)
        check_interval("beta", group["beta"], 0.0, closed="(]")
        if group["max_log_step"] is not None:
            check_interval("max_log_step", group["max_log_step"], 0.0, closed="(]")
        if group["budget"] is not None:
            check_interval("budget", group["budget"], 0.0, closed="(]")
        for p in group["params"]:
            if p.is_complex():
                raise ValueError("EGPlusMinus does not support complex parameters: they have no sign")

    @override
    def states_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("p", "q", "momentum_buffer") if group["momentum"] else ("p", "q")

    @override
    def init_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = super().init_state(p, group)
        w = p.to(state["p"].dtype)
        if group["budget"] is None:
            larger = (w.abs() + (w.square() + group["beta"] ** 2).sqrt()) / 2
            smaller = group["beta"] ** 2 / 4 / larger  # = larger - |w| without its cancellation
            positive, negative = torch.where(w >= 0, larger, smaller), torch.where(w >= 0, smaller, larger)
        else:
            rest = (group["budget"] - w.abs().sum()) / (2 * max(1, w.numel()))
            if rest < 0:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} has 1-norm {w.abs().sum().item():.4g}, "
                    f"above budget={group['budget']}: scale it down or raise the budget"
                )
            positive, negative = w.clamp_min(0) + rest, (-w).clamp_min(0) + rest
        state["p"].copy_(positive)
        state["q"].copy_(negative)
        return state

    @override
    def coefficients(self, step: Any, lr: Any, group: dict[str, Any]) -> dict[str, Any]:
        limit = float("inf") if group["max_log_step"] is None else group["max_log_step"]
        return {"lr": lr, "momentum": group["momentum"], "budget": group["budget"], "limit": limit}

    @override
    def flags(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"momentum": group["momentum"] > 0, "normalised": group["budget"] is not None}

    @staticmethod
    def update(p: Any, g: Any, state: Any, c: Any, *, momentum: bool, normalised: bool) -> None:
        """Section 3 of Kivinen and Warmuth (1997)."""
        if momentum:
            g = state.momentum_buffer.mul_(c.momentum).add_(g)
        g = g + 0.0 * g  # NaN where it is infinite: clamped below, it would stay unseen
        factor = (-c.lr * g).clamp(-c.limit, c.limit).exp()
        state.p.mul_(factor)
        state.q.div_(factor)
        if normalised:
            scale = c.budget / (state.p + state.q).sum()
            state.p.mul_(scale)
            state.q.mul_(scale)
        p.copy_(state.p - state.q)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict.

        Raises:
            ValueError: If the loaded parts do not make up the weights: load the model's weights first.
        """
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                state = self.state.get(p)
                if state and not _make_up(p.detach(), state["p"], state["q"]):
                    name = group["param_names"][i] if group.get("param_names") else i
                    raise ValueError(
                        f"parameter {name} is not the difference of the loaded parts p and q: "
                        "load the model's weights of the same checkpoint first"
                    )


def _make_up(w: Tensor, p: Tensor, q: Tensor) -> bool:
    """Whether w = p - q up to the rounding of each."""
    slack = torch.finfo(p.dtype).eps * torch.maximum(p, q).double() + torch.finfo(w.dtype).eps * w.abs().double()
    return bool(((p.double() - q.double() - w.double()).abs() <= slack).all())
