"""diffGrad (Dubey et al., 2019, arXiv:1909.11015)."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack, override

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

from ._base import Optimizer, Options
from ._checks import check_betas
from ._peers import from_peer
from ._statistics import precise, sample


@register(
    "optimizer",
    summary="Adam with a friction where successive gradients agree",
    paper="1909.11015",
    card="diffgrad",
    capabilities=("fused",),
)
class DiffGrad(Optimizer):
    r"""diffGrad: Adam whose step is multiplied by a friction :math:`\xi = \sigma(|g_{t-1} - g_t|)` in [0.5, 1).

    .. math::
        \theta_t = \theta_{t-1} - \gamma\, \xi_t \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    (arXiv:1909.11015, section 3; the fixed release of the authors' code, which copies the previous gradient). With
    the small gradients of real networks :math:`\xi` is about 0.5 everywhere, and the method equals Adam at half the
    learning rate: **start at twice your Adam rate**, or take ``friction="relative"``, which compares the change of
    the gradient with its root mean square and so does not depend on the scale of the loss (an extension of ours).
    ``OptimizerMonitor`` logs :math:`\xi`.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate.
        betas: Decay of the averages of the gradient and of its square, each in [0, 1).
        eps: Added to the root.
        weight_decay: Decay of the weights.
        decoupled: Shrink the weights by ``lr * weight_decay``; False, as in the paper, adds ``weight_decay * p`` to the
            gradient.
        friction: ``"absolute"`` as in the paper, or ``"relative"``:
            :math:`\sigma(\kappa |g_{t-1} - g_t| / (\sqrt{\hat v_t} + \epsilon))`.
        kappa: Sharpness of the relative friction, positive.
        eps_mode: ``"paper"``, or ``"authors"`` for the authors' code, which adds ``eps`` before correcting the bias.
        amsgrad: Divide by the largest :math:`v` so far.
        **options: ``maximize``, ``foreach``, ``fused``, ``capturable``, ``differentiable``, ``state_dtype``,
            ``stochastic_rounding``, as :class:`lightning_opt.optim.Options` says. ``state_dtype={"previous_grad":
            "bfloat16"}`` saves two bytes a parameter.

    Raises:
        ValueError: If a value is out of range or unknown.
        RuntimeError: In ``step``, for sparse gradients, or where ``fused=True`` cannot be honoured.

    Cost:
        Three state tensors (12 bytes a parameter in float32); one pass over memory when fused, 36 bytes a parameter.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = DiffGrad(model.parameters(), lr=2e-3)
        >>> model(torch.ones(2, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    state_names = ("exp_avg", "exp_avg_sq", "previous_grad")
    _saturated = 0  # logged steps in a row; a copy of the optimizer starts anew

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = False,
        friction: Literal["absolute", "relative"] = "absolute",
        kappa: float = 1.0,
        eps_mode: Literal["paper", "authors"] = "paper",
        amsgrad: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "friction": friction,
            "kappa": kappa,
            "eps_mode": eps_mode,
            "amsgrad": amsgrad,
        }
        super().__init__(params, defaults, **options)

    @override
    def validate(self, group: dict[str, Any]) -> None:
        check_betas(group["betas"])
        check_interval("eps", group["eps"], 0.0)
        check_interval("weight_decay", group["weight_decay"], 0.0)
        check_interval("kappa", group["kappa"], 0.0, closed="(]")
        check_choice("friction", group["friction"], ["absolute", "relative"])
        check_choice("eps_mode", group["eps_mode"], ["paper", "authors"])

    @override
    def states_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return (*self.state_names, "max_exp_avg_sq") if group["amsgrad"] else self.state_names

    @override
    def coefficients(self, step: Any, lr: Any, group: dict[str, Any]) -> dict[str, Any]:
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        size, scale = lr / correction1, 1 / correction2
        if group["eps_mode"] == "authors":
            size, scale = size * correction2**0.5, 1.0
        return {
            "beta1": beta1,
            "weight1": 1 - beta1,
            "beta2": beta2,
            "weight2": 1 - beta2,
            "unbias": 1 / correction2,
            "kappa": group["kappa"],
            "eps": group["eps"],
            "scale": scale,
            "size": size,
            "coupled": 0.0 if group["decoupled"] else decay,
            "shrink": 1 - decay * lr if group["decoupled"] else 1.0,
        }

    @override
    def flags(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"relative": group["friction"] == "relative", "amsgrad": group["amsgrad"]}

    @staticmethod
    def update(p: Any, g: Any, state: Any, c: Any, *, relative: bool, amsgrad: bool) -> None:
        """Section 3 of arXiv:1909.11015."""
        g = g + c.coupled * p
        state.exp_avg.mul_(c.beta1).add_(c.weight1 * g)
        state.exp_avg_sq.mul_(c.beta2).add_(c.weight2 * g * g)
        change = (state.previous_grad - g).abs()
        if relative:
            change = c.kappa * change / ((c.unbias * state.exp_avg_sq).sqrt() + c.eps)
        friction = change.sigmoid()
        state.previous_grad.copy_(g)
        base = state.exp_avg_sq
        if amsgrad:
            base = state.max_exp_avg_sq.copy_(base.maximum(state.max_exp_avg_sq))
        root = (c.scale * base).sqrt() + c.eps
        p.mul_(c.shrink).sub_(c.size * friction * state.exp_avg / root)

    @override
    def fused_kernel(self, group: dict[str, Any]) -> str | None:
        return "diffgrad"

    @override
    def statistics(self, loss: Tensor | None = None) -> dict[str, Tensor]:
        """``xi_mean`` and ``xi_p95`` of the friction that the coming step applies."""
        frictions = []
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p)
                if not state or p.grad is None:
                    continue
                g, previous = precise(sample(p.grad)), precise(sample(state["previous_grad"]))
                g = -g if group["maximize"] else g
                if not group["decoupled"]:
                    g = g + group["weight_decay"] * precise(sample(p))
                change = (previous - g).abs()
                if group["friction"] == "relative":
                    c = self.coefficients(state["step"].double() + 1, group["lr"], group)
                    v = c["beta2"] * precise(sample(state["exp_avg_sq"])) + c["weight2"] * g * g
                    change = c["kappa"] * change / ((c["unbias"] * v).sqrt() + c["eps"])
                frictions.append(change.sigmoid())
        if not frictions:
            return {}
        xi = torch.cat(frictions)
        return {"xi_mean": xi.mean(), "xi_p95": xi.kthvalue(max(1, int(0.95 * xi.numel()))).values}

    @override
    def diagnose(self, statistics: dict[str, float], step: int) -> str | None:
        self._saturated = self._saturated + 1 if statistics.get("xi_mean", 1.0) < 0.51 else 0
        if self._saturated >= 100:
            return (
                "the friction of DiffGrad is saturated at 0.5: this run equals Adam with lr/2; "
                'consider friction="relative"'
            )
        return None

    @staticmethod
    def from_peer_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
        """Turn a checkpoint of another library's diffGrad into one that ``load_state_dict`` takes.

        The run continues with ``eps_mode="authors"``, as the other libraries have it.

        Args:
            state_dict: ``state_dict()`` of ``pytorch_optimizer.DiffGrad`` or ``torch_optimizer.DiffGrad``.

        Returns:
            A state dict of ours.

        Raises:
            ValueError: If it was made with an option that we do not have.
        """
        for group in state_dict["param_groups"]:
            for option in ("rectify", "fixed_decay", "adanorm"):
                if group.get(option):
                    raise ValueError(f"the checkpoint was made with {option}=True, which DiffGrad does not have")
        renamed = {"weight_decouple": "decoupled", "ams_bound": "amsgrad"}
        out = from_peer(DiffGrad, state_dict, renamed, _own_tensors)
        return {**out, "param_groups": [{**group, "eps_mode": "authors"} for group in out["param_groups"]]}


def _own_tensors(state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    return {name: state[name] for name in (*DiffGrad.state_names, "max_exp_avg_sq") if name in state}
