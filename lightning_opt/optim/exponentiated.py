"""Exponentiated gradient under Dale's law (Cornford et al., 2024; Shetty et al., 2025, arXiv:2510.02730)."""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack, override

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

from ._base import Optimizer, Options
from ._checks import check_betas
from ._tensor_list import select
from .dale import eg_param_groups


class ExponentiatedOptimizer(Optimizer):
    """What the sign-preserving optimizers share: additive groups, guards against dead weights."""

    @override
    def validate(self, group: dict[str, Any]) -> None:
        check_interval("weight_decay", group["weight_decay"], 0.0)
        if group["max_log_step"] is not None:
            check_interval("max_log_step", group["max_log_step"], 0.0, closed="(]")
        check_interval("min_abs", group["min_abs"], 0.0)
        for p in group["params"]:
            if p.is_complex():
                raise ValueError(f"{type(self).__name__} does not support complex parameters: they have no sign")
            if 0 < group["min_abs"] < torch.finfo(p.dtype).smallest_normal and not group["additive"]:
                raise ValueError(f"min_abs={group['min_abs']} vanishes in {p.dtype}: raise it, or use float32")

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if not self.state:
            self._warn_of_zeros()
        return super().step(closure)

    def _warn_of_zeros(self) -> None:
        dead = []
        for i, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{j} of group {i}" for j in range(len(group["params"]))]
            if not group["additive"] and group.get("variant") not in ("hyper", "gd_sign"):
                dead += [name for name, p in zip(names, group["params"], strict=True) if p.numel() and not p.any()]
        if dead:
            warnings.warn(
                f"{type(self).__name__} can never move a weight that is exactly zero, and these parameters are zero "
                f"throughout: {', '.join(dead)}. Put them into an additive group (eg_param_groups does) or initialise "
                "them",
                stacklevel=4,
            )

    @classmethod
    @override
    def param_groups_for(cls, module: nn.Module) -> list[dict[str, Any]]:
        """As :func:`lightning_opt.optim.eg_param_groups`: additive updates for biases, norms and zero parameters."""
        return eg_param_groups(module)


@register(
    "optimizer",
    summary="Multiplicative SGD: weights keep their sign and move by a factor",
    paper="2510.02730",
    card="exponentiated-gradient",
    capabilities=("fused", "sign-preserving"),
)
class ExponentiatedSGD(ExponentiatedOptimizer):
    r"""Stochastic exponentiated gradient: :math:`w \leftarrow w \exp(-\gamma\, \mathrm{sign}(w)\, g)`.

    Every weight keeps its sign (Dale's law) and moves by a factor; an exact zero stays zero. It is mirror descent
    with the potential :math:`\sum |w| \log |w| - |w|`. ``lr`` is the change of :math:`\log |w|` per unit of gradient,
    so rates are larger than SGD's; too large a rate collapses a layer: watch ``dale/frozen_fraction`` of
    ``DaleLawMonitor``.

    Args:
        params: Parameters, named parameters or groups. A group with ``additive=True`` takes plain SGD steps; make the
            groups with :func:`lightning_opt.optim.eg_param_groups`.
        lr: Learning rate.
        momentum: Momentum of the gradient, as in torch.optim.SGD.
        dampening: Dampening of the momentum.
        weight_decay: Relative shrink of both signs, ``exp(-lr * weight_decay)`` a step; added as ``weight_decay * w``
            to the gradient in the other variants and in additive groups.
        nesterov: Nesterov momentum.
        variant: ``"eg"``; ``"gd_sign"``, SGD that stops at zero (the control experiment of the papers); or ``"hyper"``,
            :math:`w \leftarrow \beta \sinh(\mathrm{asinh}(w / \beta) - \gamma g)`, which may change signs (Ghai et
            al., 2020).
        beta: Scale of ``"hyper"``, positive: from exponentiated gradient (small) to SGD (large).
        max_log_step: Largest change of :math:`\log |w|` (of the mirror variable with ``"hyper"``) in a step, or None.
        min_abs: Smallest magnitude that a weight can reach: a weight that underflows to zero would be dead.
        additive: Take plain SGD steps; meant for groups.
        **options: ``maximize``, ``foreach``, ``fused``, ``capturable``, ``differentiable``, ``state_dtype``,
            ``stochastic_rounding``, as :class:`lightning_opt.optim.Options` says.

    Raises:
        ValueError: If a value is out of range, for Nesterov without momentum, for complex parameters.
        RuntimeError: In ``step``, for sparse gradients, or where ``fused=True`` cannot be honoured.

    Cost:
        No state, or one tensor with momentum; one pass over memory when fused, 12 or 20 bytes a parameter in float32.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.5]))
        >>> optimizer = ExponentiatedSGD([weight], lr=0.1)
        >>> weight.grad = torch.ones(3)
        >>> optimizer.step()
        >>> weight.data / torch.tensor([2.0, -1.0, 0.5])  # exp(-0.1), exp(0.1), exp(-0.1)
        tensor([0.9048, 1.1052, 0.9048])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        variant: Literal["eg", "gd_sign", "hyper"] = "eg",
        beta: float = 1e-3,
        max_log_step: float | None = 1.0,
        min_abs: float = 1e-18,
        additive: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "variant": variant,
            "beta": beta,
            "max_log_step": max_log_step,
            "min_abs": min_abs,
            "additive": additive,
        }
        super().__init__(params, defaults, **options)

    @override
    def validate(self, group: dict[str, Any]) -> None:
        super().validate(group)
        check_interval("momentum", group["momentum"], 0.0)
        check_interval("dampening", group["dampening"], 0.0)
        check_choice("variant", group["variant"], ["eg", "gd_sign", "hyper"])
        check_interval("beta", group["beta"], 0.0, closed="(]")
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError("nesterov=True needs momentum > 0 and dampening = 0")

    @override
    def states_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    @override
    def coefficients(self, step: Any, lr: Any, group: dict[str, Any]) -> dict[str, Any]:
        first = step <= 1 if isinstance(step, (int, float, Tensor)) else step < 1.5  # the buffer starts as the gradient
        momentum = group["momentum"]
        limit = group["max_log_step"]
        return {
            "lr": lr,
            "keep": select(first, 0.0 * step, momentum + 0.0 * step) if momentum else 0.0,
            "enter": select(first, 1.0 + 0.0 * step, 1.0 - group["dampening"] + 0.0 * step) if momentum else 1.0,
            "momentum": momentum,
            "decay": group["weight_decay"],
            "limit": float("inf") if limit is None else limit,
            "floor": group["min_abs"],
            "beta": group["beta"],
        }

    @override
    def flags(self, group: dict[str, Any]) -> dict[str, Any]:
        return {
            "variant": "additive" if group["additive"] else group["variant"],
            "momentum": group["momentum"] > 0,
            "nesterov": group["nesterov"],
        }

    @staticmethod
    def update(p: Any, g: Any, state: Any, c: Any, *, variant: str, momentum: bool, nesterov: bool) -> None:
        """The step of the class docstring."""
        s = p.sign()
        g = g + c.decay * (s if variant == "eg" else p)
        if momentum:
            state.momentum_buffer.mul_(c.keep).add_(c.enter * g)
            g = g + c.momentum * state.momentum_buffer if nesterov else state.momentum_buffer
            g = g + 0.0 * state.momentum_buffer  # NaN where it is infinite: clamped below, it would stay unseen
        if variant == "eg":
            log_step = (c.lr * s * g).clamp(-c.limit, c.limit)
            p.copy_(s * (p.abs() * (-log_step).exp()).clamp_min(c.floor))
        elif variant == "gd_sign":
            moved = p - c.lr * g
            p.copy_(s * (s * moved).clamp_min(c.floor) + (1 - s.abs()) * moved)
        elif variant == "hyper":
            p.copy_(c.beta * ((p / c.beta).asinh() - (c.lr * g).clamp(-c.limit, c.limit)).sinh())
        else:
            p.sub_(c.lr * g)

    @override
    def fused_kernel(self, group: dict[str, Any]) -> str | None:
        return "exponentiated_sgd"


@register(
    "optimizer",
    summary="AdamW in the exponent: weights keep their sign",
    paper="2510.02730",
    card="exponentiated-gradient",
    capabilities=("fused", "sign-preserving"),
)
class ExponentiatedAdamW(ExponentiatedOptimizer):
    r"""AdamW with a multiplicative step.

    :math:`w \leftarrow w \exp(-\gamma\, \mathrm{sign}(w)\, \hat m / (\sqrt{\hat v} + \epsilon))`

    As in the reference code of arXiv:2510.02730: decoupled decay first, then the moments, ``eps`` outside the root.

    Args:
        params: Parameters, named parameters or groups. A group with ``additive=True`` takes AdamW steps; make the
            groups with :func:`lightning_opt.optim.eg_param_groups`.
        lr: Learning rate: about the relative change of a weight in a step; 0.01 to 0.03 where AdamW takes 1e-3.
        betas: Decay of the averages of the gradient and of its square, each in [0, 1).
        eps: Added to the root.
        weight_decay: Decoupled decay, ``lr * weight_decay < 1``.
        amsgrad: Divide by the largest second moment so far.
        max_log_step: Largest change of :math:`\log |w|` in a step, or None.
        min_abs: Smallest magnitude that a weight can reach: a weight that underflows to zero would be dead.
        additive: Take AdamW steps; meant for groups.
        **options: ``maximize``, ``foreach``, ``fused``, ``capturable``, ``differentiable``, ``state_dtype``,
            ``stochastic_rounding``, as :class:`lightning_opt.optim.Options` says.

    Raises:
        ValueError: If a value is out of range, or for complex parameters.
        RuntimeError: In ``step``, for sparse gradients, or where ``fused=True`` cannot be honoured.

    Cost:
        Two state tensors (8 bytes a parameter in float32); one pass over memory when fused, 28 bytes a parameter.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = ExponentiatedAdamW(eg_param_groups(model), lr=0.01)
        >>> model(torch.ones(2, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        max_log_step: float | None = 1.0,
        min_abs: float = 1e-18,
        additive: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "max_log_step": max_log_step,
            "min_abs": min_abs,
            "additive": additive,
        }
        super().__init__(params, defaults, **options)

    @override
    def validate(self, group: dict[str, Any]) -> None:
        super().validate(group)
        check_betas(group["betas"])
        check_interval("eps", group["eps"], 0.0)
        shrink = torch.as_tensor(group["lr"]).item() * group["weight_decay"]
        if shrink >= 1 and not group["additive"]:
            raise ValueError(f"lr * weight_decay must be below 1, got {shrink}")

    @override
    def states_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return (*self.state_names, "max_exp_avg_sq") if group["amsgrad"] else self.state_names

    @override
    def coefficients(self, step: Any, lr: Any, group: dict[str, Any]) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        limit = group["max_log_step"]
        return {
            "beta1": beta1,
            "weight1": 1 - beta1,
            "beta2": beta2,
            "weight2": 1 - beta2,
            "scale": 1 / (1 - beta2**step),
            "eps": group["eps"],
            "size": lr / (1 - beta1**step),
            "shrink": 1 - lr * group["weight_decay"],
            "limit": float("inf") if limit is None else limit,
            "floor": group["min_abs"],
        }

    @override
    def flags(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"additive": group["additive"], "amsgrad": group["amsgrad"]}

    @staticmethod
    def update(p: Any, g: Any, state: Any, c: Any, *, additive: bool, amsgrad: bool) -> None:
        """The step of the class docstring."""
        state.exp_avg.mul_(c.beta1).add_(c.weight1 * g)
        state.exp_avg_sq.mul_(c.beta2).add_(c.weight2 * g * g)
        base = state.exp_avg_sq
        if amsgrad:
            base = state.max_exp_avg_sq.copy_(base.maximum(state.max_exp_avg_sq))
        step = c.size * state.exp_avg / ((c.scale * base).sqrt() + c.eps)
        p.mul_(c.shrink)
        if additive:
            p.sub_(step)
        else:
            s = p.sign()
            p.copy_(s * (p.abs() * (-(s * step).clamp(-c.limit, c.limit)).exp()).clamp_min(c.floor))

    @override
    def fused_kernel(self, group: dict[str, Any]) -> str | None:
        return "exponentiated_adamw"
