"""Lion and Lion-K (Chen et al., 2023, arXiv:2302.06675 and arXiv:2310.05898)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack, override

from lightning_opt._checks import check_interval
from lightning_opt.registry import register

from ._base import Optimizer, Options
from ._checks import check_betas
from ._lion_kernels import KERNELS, direction, validate
from ._statistics import precise, sample
from ._tensor_list import each


@register(
    "optimizer",
    summary="Constrained optimization by the subgradient of a convex function: box, ball, l1, spectral, ...",
    paper="2310.05898",
    card="lion",
    capabilities=("fused",),
)
class LionK(Optimizer):
    r"""Lion-K: follow the subgradient of a convex function K at an interpolated momentum, with decoupled weight decay.

    .. math::
        c_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        \theta_t &= (1 - \gamma \lambda) \theta_{t-1} - \gamma\, \partial K(c_t), \qquad
        m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t

    (arXiv:2310.05898, equation 5 with explicit decay.) It minimises :math:`f(\theta) + K^*(\lambda \theta) /
    \lambda`, so the weight decay :math:`\lambda` and the kernel choose a constraint:

    ================ ============================ ==================================================================
    kernel           gradient of K at z           problem solved
    ================ ============================ ==================================================================
    ``sign``         sign z                       f subject to max abs x <= 1/decay (Lion)
    ``lp`` (p)       of the p-norm, p in [1, 2]   f subject to q-norm of x <= 1/decay, q = p/(p - 1)
    ``l2``           z / norm z                   f subject to norm of x <= 1/decay, each tensor
    ``group``        z_g / norm z_g               f subject to norm of each row <= 1/decay
    ``soft`` (e)     sign z where abs z > e       f + e * 1-norm of x, in the box
    ``huber`` (e)    clip(z/e, -1, 1)             f + e * decay / 2 * squared norm of x, in the box
    ``topk`` (k)     sign of the k largest        f in the box with 1-norm of x <= k/decay
    ``relativistic`` z / sqrt(z^2 + e^2)          f with a smooth barrier of the box
    ``quadratic``    z                            f + decay / 2 * squared norm of x (momentum SGD)
    ``spectral``     U V^T                        f subject to spectral norm of x <= 1/decay (Muon)
    ================ ============================ ==================================================================

    Until ``x`` is in the constraint set its distance shrinks by ``1 - lr * weight_decay`` a step, whatever the
    gradients. ``OptimizerMonitor`` logs that distance and the Lyapunov function of the second phase. Take 3 to 10
    times less ``lr`` and as much more ``weight_decay`` than with AdamW, and batches of 64 or more. A bfloat16
    parameter loses steps below half its spacing (0.4% of its size): use ``stochastic_rounding=True``.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate.
        betas: Interpolation of the momentum in the step, and its decay, each in [0, 1).
        weight_decay: Decoupled decay; 0 makes the problem unconstrained.
        kernel: Name of K, or a function from a tensor to a subgradient of K, which no checkpoint holds: give it again.
        kernel_args: The kernel's argument: ``{"p": 1.5}``, ``{"k": 100}`` or ``{"e": 1e-3}``; ``e`` is in units of the
            momentum, or with ``{"e": 0.1, "relative": True}`` of its root mean square in each tensor.
        cautious: Drop coordinates whose step and gradient disagree in sign, and scale the rest up to the same mean.
        cautious_weight_decay: Decay only the coordinates that the step also shrinks.
        auto_scale: Scale the step of each tensor to a root mean square of 1, so that one ``lr`` serves all kernels; the
            constraint's radius is scaled with it.
        **options: ``maximize``, ``foreach``, ``fused``, ``capturable``, ``differentiable``, ``state_dtype``,
            ``stochastic_rounding``, as :class:`lightning_opt.optim.Options` says.

    Raises:
        ValueError: If a value is out of range, the kernel is unknown or does not fit a parameter, or
            ``lr * weight_decay > 1``.
        RuntimeError: In ``step``, for sparse gradients, or where ``fused=True`` cannot be honoured: the fused kernels
            cover sign, soft, huber, relativistic and quadratic without the cautious options and ``auto_scale``.

    Cost:
        One state tensor (4 bytes a parameter in float32); one pass over memory when fused, 20 bytes a parameter.
        ``spectral`` adds 60 matrix products a step.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = LionK(model.parameters(), lr=1e-4, weight_decay=1.0, kernel="huber", kernel_args={"e": 1e-3})
        >>> model(torch.ones(2, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    state_names = ("exp_avg",)
    counts_steps = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        kernel: str | Callable[[Tensor], Tensor] = "sign",
        kernel_args: dict[str, Any] | None = None,
        cautious: bool = False,
        cautious_weight_decay: bool = False,
        auto_scale: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "kernel": kernel,
            "kernel_args": kernel_args,
            "cautious": cautious,
            "cautious_weight_decay": cautious_weight_decay,
            "auto_scale": auto_scale,
        }
        self._functions: dict[str, Callable[[Tensor], Tensor]] = {}
        super().__init__(params, defaults, **options)

    @override
    def validate(self, group: dict[str, Any]) -> None:
        check_betas(group["betas"])
        check_interval("weight_decay", group["weight_decay"], 0.0)
        shrink = torch.as_tensor(group["lr"]).item() * group["weight_decay"]
        if shrink > 1:
            raise ValueError(
                f"lr * weight_decay must be at most 1, got {shrink}: a step would overshoot the constraint set"
            )
        if callable(group["kernel"]):
            name = getattr(group["kernel"], "__qualname__", type(group["kernel"]).__qualname__)
            self._functions[name] = group["kernel"]
            group["kernel"] = name
        if group["kernel"] not in self._functions:
            validate(group["kernel"], group["kernel_args"] or {}, group["params"])

    @override
    def coefficients(self, step: Any, lr: Any, group: dict[str, Any]) -> dict[str, Any]:
        (beta1, beta2), args = group["betas"], group["kernel_args"] or {}
        return {
            "beta1": beta1,
            "weight1": 1 - beta1,
            "beta2": beta2,
            "weight2": 1 - beta2,
            "size": lr,
            "decay": lr * group["weight_decay"],
            "shrink": 1 - lr * group["weight_decay"],
            "e": args.get("e", 0.0),
        }

    @override
    def flags(self, group: dict[str, Any]) -> dict[str, Any]:
        if self.fused_kernel(group) is not None:
            return {"kernel": group["kernel"]}
        return {
            "kernel": group["kernel"],
            "args": group["kernel_args"] or {},
            "function": self._functions.get(group["kernel"]),
            **{name: group[name] for name in ("cautious", "cautious_weight_decay", "auto_scale")},
        }

    @staticmethod
    def update(
        p: Any,
        g: Any,
        state: Any,
        c: Any,
        *,
        kernel: str,
        args: dict[str, Any] | None = None,
        function: Callable[[Tensor], Tensor] | None = None,
        cautious: bool = False,
        cautious_weight_decay: bool = False,
        auto_scale: bool = False,
    ) -> None:
        """Equation 5 of arXiv:2310.05898."""
        z = c.beta1 * state.exp_avg + c.weight1 * g
        u = direction(z, kernel, args or {"e": c.e}) if function is None else each(function, z)
        if auto_scale:
            u = each(lambda t: t / t.square().mean().sqrt().clamp_min(torch.finfo(t.dtype).tiny), u)
        if cautious:
            u = each(_cautious, u, g)
        u = u + 0.0 * z  # the sign of NaN is 0, and that of inf is finite: what is wrong must show
        if cautious_weight_decay:
            p.mul_(1 - c.decay * (u * p > 0)).sub_(c.size * u)
        else:
            p.mul_(c.shrink).sub_(c.size * u)
        state.exp_avg.mul_(c.beta2).add_(c.weight2 * g)  # with the raw gradient, after z has been formed

    @override
    def fused_kernel(self, group: dict[str, Any]) -> str | None:
        kernel = KERNELS.get(group["kernel"])
        plain = not (group["cautious"] or group["cautious_weight_decay"] or group["auto_scale"])
        relative = (group["kernel_args"] or {}).get("relative")
        return "lion" if kernel is not None and kernel.elementwise and plain and not relative else None

    @override
    def statistics(self, loss: Tensor | None = None) -> dict[str, Tensor]:
        r"""Where the run stands relative to the constraint.

        ``phase1_dist``: largest distance of :math:`\lambda x` to the domain of :math:`K^*` over tensors, in its gauge.
        ``at_bound_fraction``: share of coordinates with :math:`|\lambda x| > 0.99`. ``stationarity``: root mean
        square of :math:`\partial K(m) + \lambda x`, zero at a fixed point. ``radius``, with ``auto_scale``: the largest
        factor by which it scales a tensor's domain. ``lyapunov``, given the (stochastic) loss: the function of
        arXiv:2310.05898, equation 11, in units of the loss; infinite outside the domain, and left out where K changes
        with the step (``auto_scale``, relative ``e``).
        """
        distances, bounds, residuals, radii = [], [], [], []
        potential: Tensor | None = precise(loss) if loss is not None else None
        for group in self.param_groups:
            decay = group["weight_decay"]
            k, args = KERNELS.get(group["kernel"]), group["kernel_args"] or {}
            if k is None or decay == 0:
                potential = None
                continue
            for p in group["params"]:
                x = decay * precise(p)
                state = self.state.get(p)
                m = precise(state["exp_avg"]) if state else torch.zeros_like(x)
                gauge, u = k.gauge(x, args), direction(m, group["kernel"], args)
                if group["auto_scale"]:
                    size = u.square().mean().sqrt()
                    radii.append(torch.where(size > 0, 1 / size, 1.0))
                    gauge, u = gauge / radii[-1], u * radii[-1]
                distances.append((gauge - 1).clamp_min(0))
                bounds.append(sample(x).abs() > 0.99)
                residuals.append(sample(u + x))
                if group["auto_scale"] or args.get("relative"):
                    potential = None
                if potential is not None:
                    potential = potential + _lyapunov(x, m, gauge, k, args, group)
        if not distances:
            return {}
        out = {
            "phase1_dist": torch.stack(distances).amax(),
            "at_bound_fraction": torch.cat(bounds).float().mean(),
            "stationarity": torch.cat(residuals).square().mean().sqrt(),
        }
        if radii:
            out["radius"] = torch.stack(radii).amax()
        return out if potential is None else {**out, "lyapunov": potential}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict.

        Raises:
            ValueError: If it was saved with a function as kernel that this optimizer was not constructed with.
        """
        for group in state_dict["param_groups"]:
            kernel = group.get("kernel", "sign")
            if kernel not in KERNELS and kernel not in self._functions:
                raise ValueError(
                    f"the state dict was saved with the function {kernel!r} as kernel, which it does not hold: "
                    "construct the optimizer with that function, then load"
                )
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_functions": self._functions}


@register(
    "optimizer",
    summary="Sign of an interpolated momentum: half of Adam's memory, weights bounded by 1/weight_decay",
    paper="2302.06675",
    card="lion",
    capabilities=("fused",),
)
class Lion(LionK):
    r"""Lion: the sign of an interpolated momentum, with decoupled weight decay.

    :class:`LionK` with ``kernel="sign"`` (arXiv:2302.06675, algorithm 2; arXiv:2310.05898): it minimises the loss
    subject to :math:`\max |\theta| \le 1/\lambda`.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate, 3 to 10 times below AdamW's.
        betas: Interpolation of the momentum in the step, and its decay, each in [0, 1).
        weight_decay: Decoupled decay, 3 to 10 times above AdamW's.
        cautious: Drop coordinates whose step and gradient disagree in sign, and scale the rest up to the same mean.
        cautious_weight_decay: Decay only the coordinates that the step also shrinks.
        **options: As for :class:`LionK`.

    Raises:
        ValueError: If a value is out of range, or ``lr * weight_decay > 1``.
        RuntimeError: In ``step``, for sparse gradients, or where ``fused=True`` cannot be honoured.

    Cost:
        One state tensor (4 bytes a parameter in float32); one pass over memory when fused, 20 bytes a parameter.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = Lion(model.parameters(), lr=1e-4, weight_decay=1.0)
        >>> model(torch.ones(2, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        cautious: bool = False,
        cautious_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            weight_decay,
            cautious=cautious,
            cautious_weight_decay=cautious_weight_decay,
            **options,
        )


def _cautious(u: Tensor, g: Tensor) -> Tensor:
    """Algorithm 2 of arXiv:2411.16085."""
    agrees = (u * g > 0).to(u.dtype)
    return u * agrees / agrees.mean().clamp_min(1e-5)


def _lyapunov(x: Tensor, m: Tensor, gauge: Tensor, k: Any, args: dict[str, Any], group: dict[str, Any]) -> Tensor:
    r"""The terms of :math:`H / \alpha` beside the loss; x is scaled by the decay.

    With alpha = gamma = (1 - beta2) / lr: in the paper's continuous time a step lasts lr, so eps * gamma = 1 - beta1
    and eps, here ``lead``, is lr (1 - beta1) / (1 - beta2).
    """
    (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
    lead = lr * (1 - beta1) / (1 - beta2)
    weight = beta1 / (1 + lead * decay) * lr / (1 - beta2)
    conjugate = k.conjugate(x, args)
    # Our momentum is minus the paper's, so - lambda m.x becomes + m.x here; K is even.
    value = conjugate / decay + weight * (conjugate + k.value(m, args) + (m * x).sum())
    return torch.where(gauge <= 1 + 1e-6, value, torch.inf)
