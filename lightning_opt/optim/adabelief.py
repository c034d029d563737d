"""AdaBelief (Zhuang et al., 2020, arXiv:2010.07468)."""

import warnings
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack, override

from lightning_opt._checks import check_interval
from lightning_opt.registry import register

from ._base import Optimizer, Options
from ._checks import check_betas
from ._peers import from_peer
from ._statistics import precise, sample
from ._tensor_list import select


@register(
    "optimizer",
    summary="Adam that divides by the surprise of a gradient instead of its size",
    paper="2010.07468",
    card="adabelief",
    capabilities=("fused",),
)
class AdaBelief(Optimizer):
    r"""AdaBelief: long steps where the gradient agrees with its moving average, short ones where it surprises.

    At step :math:`t` with gradient :math:`g_t` (arXiv:2010.07468, algorithm 2, as in the authors' package 0.2.1):

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        s_t = \beta_2 s_{t-1} + (1 - \beta_2) (g_t - m_t)^2 + \epsilon \\
        \theta_t &= \theta_{t-1} - \gamma \frac{m_t / (1 - \beta_1^t)}{\sqrt{s_t / (1 - \beta_2^t)} + \epsilon}

    The ``eps`` inside the recursion is kept in closed form: with :math:`v` the average of :math:`(g - m)^2` alone,
    :math:`s_t / (1 - \beta_2^t) = v_t / (1 - \beta_2^t) + \epsilon / (1 - \beta_2)` exactly. So the root never falls
    below :math:`\sqrt{\epsilon / (1 - \beta_2)}`: 3.2e-7 for ``eps=1e-16``, but 3.2e-3 for ``eps=1e-8``, where
    gradients below it are followed as SGD with momentum would, at 316 times ``lr``. ``OptimizerMonitor`` logs the
    share of coordinates on that floor. As a rule of thumb take Adam's ``eps`` squared. Do not clip gradients by
    value: constant gradients make the surprise vanish and the steps explode up to the floor.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate.
        betas: Decay of the averages of the gradient and of its squared surprise, each in [0, 1).
        eps: Added in the recursion and to the root.
        weight_decay: Decay of the weights.
        decoupled: Shrink the weights by ``lr * weight_decay`` (AdamW); False adds ``weight_decay * p`` to the gradient.
        fixed_decay: With ``decoupled``, shrink by ``weight_decay`` alone, whatever the learning rate.
        rectify: Rectify the variance of early steps as RAdam does.
        degenerated_to_sgd: With ``rectify``, take SGD steps while rectification is impossible, else none.
        amsgrad: Divide by the largest :math:`s` so far.
        **options: ``maximize``, ``foreach``, ``fused``, ``capturable``, ``differentiable``, ``state_dtype``,
            ``stochastic_rounding``, as :class:`lightning_opt.optim.Options` says.

    Raises:
        ValueError: If a value is out of range, or ``fixed_decay`` is asked for without ``decoupled``.
        RuntimeError: In ``step``, for sparse gradients, or where ``fused=True`` cannot be honoured.

    Cost:
        Two state tensors (8 bytes a parameter in float32; three with ``amsgrad``); one pass over memory when fused, 28
        bytes a parameter.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = AdaBelief(model.parameters(), lr=1e-3, weight_decay=1e-2)
        >>> model(torch.ones(2, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    state_names = ("exp_avg", "exp_avg_var")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = True,
        fixed_decay: bool = False,
        rectify: bool = False,
        degenerated_to_sgd: bool = True,
        amsgrad: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "fixed_decay": fixed_decay,
            "rectify": rectify,
            "degenerated_to_sgd": degenerated_to_sgd,
            "amsgrad": amsgrad,
        }
        super().__init__(params, defaults, **options)

    @override
    def validate(self, group: dict[str, Any]) -> None:
        check_betas(group["betas"])
        check_interval("eps", group["eps"], 0.0)
        check_interval("weight_decay", group["weight_decay"], 0.0)
        if group["fixed_decay"] and not group["decoupled"]:
            raise ValueError("fixed_decay=True needs decoupled=True: coupled decay has no rate of its own")
        if 0 < group["eps"] < torch.finfo(torch.float32).smallest_normal:
            raise ValueError(f"eps must be 0 or at least 1.2e-38, got {group['eps']}: it would vanish in float32")
        if group["eps"] == 0:
            warnings.warn("AdaBelief with eps=0 divides 0 by 0 where a gradient stays zero", stacklevel=4)

    @override
    def states_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return (*self.state_names, "max_exp_avg_var") if group["amsgrad"] else self.state_names

    @override
    def coefficients(self, step: Any, lr: Any, group: dict[str, Any]) -> dict[str, Any]:
        (beta1, beta2), eps, decay = group["betas"], group["eps"], group["weight_decay"]
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        floor = eps / (1 - beta2)
        # p -= size * m / (sqrt(base * scale + offset) + outer), base = v, or the largest s with amsgrad
        accumulated = floor * correction2  # what eps has added to s so far
        size, outer = lr / correction1, eps
        scale, offset = 1 / correction2, 0.0 if group["amsgrad"] else floor
        if group["rectify"]:
            r_inf = 2 / (1 - beta2) - 1
            r = r_inf - 2 * step * beta2**step / correction2
            limit = (r_inf - 4) * (r_inf - 2) or 1.0  # 0 only where r never reaches 5
            ratio = (r - 4) * (r - 2) * r_inf / (limit * r)
            rectified = r >= 5
            ratio = select(rectified, ratio, 1.0)
            plain = size if group["degenerated_to_sgd"] else 0.0 * size
            size = select(rectified, size * (correction2 * ratio) ** 0.5, plain)
            scale = select(rectified, 1.0 + 0.0 * correction2, 0.0 * correction2)
            offset = select(rectified, 0.0 if group["amsgrad"] else accumulated, 1.0 + 0.0 * correction2)
            outer = select(rectified, eps + 0.0 * correction2, 0.0 * correction2)
        return {
            "beta1": beta1,
            "weight1": 1 - beta1,
            "beta2": beta2,
            "weight2": 1 - beta2,
            "accumulated": accumulated,
            "scale": scale,
            "offset": offset,
            "outer": outer,
            "size": size,
            "coupled": 0.0 if group["decoupled"] else decay,
            "shrink": 1 - decay * (1.0 if group["fixed_decay"] else lr) if group["decoupled"] else 1.0,
        }

    @override
    def flags(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"amsgrad": group["amsgrad"]}

    @staticmethod
    def update(p: Any, g: Any, state: Any, c: Any, *, amsgrad: bool) -> None:
        """Algorithm 2 of arXiv:2010.07468."""
        g = g + c.coupled * p
        state.exp_avg.mul_(c.beta1).add_(c.weight1 * g)
        surprise = g - state.exp_avg  # of the gradient to the average that it has just entered
        state.exp_avg_var.mul_(c.beta2).add_(c.weight2 * surprise * surprise)
        base = state.exp_avg_var
        if amsgrad:
            base = state.max_exp_avg_var.copy_((base + c.accumulated).maximum(state.max_exp_avg_var))
        root = (base * c.scale + c.offset).sqrt() + c.outer
        p.mul_(c.shrink).sub_(c.size * state.exp_avg / root)

    @override
    def fused_kernel(self, group: dict[str, Any]) -> str | None:
        return "adabelief"

    @override
    def statistics(self, loss: Tensor | None = None) -> dict[str, Tensor]:
        """``floor_fraction``: share of coordinates on the floor of the root; ``median_step``: size of the last step."""
        below, steps = [], []
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p)
                if not state:
                    continue
                m, v = precise(sample(state["exp_avg"])), precise(sample(state["exp_avg_var"]))
                c = SimpleNamespace(**self.coefficients(state["step"].double(), group["lr"], group))
                base = precise(sample(state["max_exp_avg_var"])) if group["amsgrad"] else v
                below.append(v < c.accumulated)
                steps.append((c.size * m / ((base * c.scale + c.offset).sqrt() + c.outer)).abs())
        if not below:
            return {}
        return {"floor_fraction": torch.cat(below).float().mean(), "median_step": torch.cat(steps).median().float()}

    @override
    def diagnose(self, statistics: dict[str, float], step: int) -> str | None:
        if statistics.get("floor_fraction", 0.0) > 0.99:
            return (
                "AdaBelief divides by its floor sqrt(eps / (1 - beta2)) in over 99% of the coordinates: it is SGD with "
                "momentum now; a smaller eps (Adam's squared) makes it adaptive"
            )
        return None

    def check_clipping(self, algorithm: str) -> str | None:
        """A warning if clipping gradients by ``"norm"`` or ``"value"`` harms the method, else None."""
        if algorithm == "value":
            return (
                "AdaBelief with gradients clipped by value: clamped gradients are constant, their surprise vanishes, "
                "and the steps explode up to the floor; clip by norm"
            )
        return None

    @staticmethod
    def from_peer_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
        r"""Turn a checkpoint of another library's AdaBelief into one that ``load_state_dict`` takes.

        The authors' package, timm and pytorch_optimizer keep :math:`s` with the accumulated ``eps`` in it; ours
        without: :math:`v_t = s_t - \epsilon (1 - \beta_2^t) / (1 - \beta_2)`.

        Args:
            state_dict: ``state_dict()`` of ``adabelief_pytorch.AdaBelief``, ``timm.optim.AdaBelief`` or
                ``pytorch_optimizer.AdaBelief``.

        Returns:
            A state dict of ours. Options that the other library keeps on its object (decoupled decay, rectification)
            are not in its checkpoint: give them to the constructor.
        """
        renamed = {"weight_decouple": "decoupled", "ams_bound": "amsgrad"}
        return from_peer(AdaBelief, state_dict, renamed, _without_accumulated_eps)

    @classmethod
    def cifar_cnn(cls, params: ParamsT, **changes: Any) -> Self:
        """The authors' settings for CNNs on CIFAR: ``eps=1e-8``, coupled decay 5e-4."""
        return cls(params, **{"lr": 1e-3, "eps": 1e-8, "weight_decay": 5e-4, "decoupled": False, **changes})

    @classmethod
    def imagenet(cls, params: ParamsT, **changes: Any) -> Self:
        """The authors' settings for CNNs on ImageNet: ``eps=1e-8``, decoupled decay 1e-2."""
        return cls(params, **{"lr": 1e-3, "eps": 1e-8, "weight_decay": 1e-2, **changes})

    @classmethod
    def detection(cls, params: ParamsT, **changes: Any) -> Self:
        """The authors' settings for detection on PASCAL VOC: ``lr=1e-4``, ``eps=1e-8``, coupled decay 1e-4."""
        return cls(params, **{"lr": 1e-4, "eps": 1e-8, "weight_decay": 1e-4, "decoupled": False, **changes})

    @classmethod
    def lstm(cls, params: ParamsT, *, layers: int = 1, **changes: Any) -> Self:
        """The authors' settings for LSTMs of one layer (``lr=1e-3``, ``eps=1e-16``) or more (1e-2, 1e-12)."""
        lr, eps = (1e-3, 1e-16) if layers == 1 else (1e-2, 1e-12)
        return cls(params, **{"lr": lr, "eps": eps, "weight_decay": 1.2e-6, "decoupled": False, **changes})

    @classmethod
    def wgan(cls, params: ParamsT, **changes: Any) -> Self:
        """The authors' settings for a small Wasserstein GAN: ``betas=(0.5, 0.999)``, ``eps=1e-12``."""
        return cls(params, **{"lr": 2e-4, "betas": (0.5, 0.999), "eps": 1e-12, **changes})

    @classmethod
    def sn_gan(cls, params: ParamsT, **changes: Any) -> Self:
        """The authors' settings for a spectrally normalised GAN: ``betas=(0.5, 0.999)``, ``eps=1e-16``, rectified."""
        return cls(params, **{"lr": 2e-4, "betas": (0.5, 0.999), "eps": 1e-16, "rectify": True, **changes})

    @classmethod
    def transformer(cls, params: ParamsT, **changes: Any) -> Self:
        """The authors' settings for transformers: ``lr=5e-4``, ``eps=1e-16``, decoupled decay 1e-4, rectified."""
        return cls(params, **{"lr": 5e-4, "eps": 1e-16, "weight_decay": 1e-4, "rectify": True, **changes})

    @classmethod
    def rainbow(cls, params: ParamsT, **changes: Any) -> Self:
        """The authors' settings for Rainbow on Atari: ``lr=1e-4``, ``eps=1e-10``, rectified."""
        return cls(params, **{"lr": 1e-4, "eps": 1e-10, "rectify": True, **changes})

    @classmethod
    def half_cheetah(cls, params: ParamsT, **changes: Any) -> Self:
        """The authors' settings for HalfCheetah: ``lr=1e-3``, ``eps=1e-12``, rectified."""
        return cls(params, **{"lr": 1e-3, "eps": 1e-12, "rectify": True, **changes})


def _without_accumulated_eps(state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    beta2, eps = group["betas"][1], group["eps"]
    accumulated = eps * (1 - beta2 ** state["step"]) / (1 - beta2)
    s = state["exp_avg_var"]
    own = {"exp_avg": state["exp_avg"], "exp_avg_var": (s.double() - accumulated).clamp_min(0.0).to(s.dtype)}
    return {**own, **{name: state[name] for name in ("max_exp_avg_var",) if name in state}}
