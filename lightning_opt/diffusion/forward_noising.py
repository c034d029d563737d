"""The noised sample and what a network is to predict for it, in one pass over memory."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_opt._checks import check_choice

from ._fused import Noise, Number, as_noise, broadcast, kernels_for, launch, noise_source
from .parametrization import wide

State = Literal["scaled", "log", "positive"]
Target = Literal["edm", "epsilon", "hyvarinen"]


class Noised(NamedTuple):
    """What :func:`noise_with_target` returns: the noised state, and the regression target."""

    state: Tensor
    target: Tensor


def noise_with_target(
    clean: Tensor,
    noise: Noise,
    *,
    mean_shift: Number = 0.0,
    rho: Number,
    state: State = "scaled",
    target: Target = "edm",
    log_mean: Number = 0.0,
    log_std: Number = 1.0,
    log_input: bool = True,
    fused: bool | None = None,
) -> Noised:
    r"""Noise clean samples by geometric Brownian motion, and give the regression target of the noise that was used.

    With :math:`y_0 = \log x_0`, noise :math:`\varepsilon`, and :math:`s` the standard deviation of :math:`y_0`:

    ============== ===========================================================================================
    state
    ============== ===========================================================================================
    ``log``        :math:`y_t = y_0 + m + \rho \varepsilon`
    ``positive``   :math:`x_t = e^{y_t}`
    ``scaled``     :math:`(y_t - m - \text{log\_mean}) / \sqrt{\rho^2 + s^2}`: what a preconditioned network reads
    ============== ===========================================================================================

    ============== ===========================================================================================
    target
    ============== ===========================================================================================
    ``epsilon``    :math:`\varepsilon`
    ``hyvarinen``  :math:`-1 - \varepsilon / \rho`, of :math:`x \nabla \log p_t`
    ``edm``        :math:`(\rho z_0 / s - s \varepsilon) / \sqrt{\rho^2 + s^2}` with
                   :math:`z_0 = y_0 - \text{log\_mean}`: of unit scale at every noise level
    ============== ===========================================================================================

    Args:
        clean: log x0, or with ``log_input=False`` x0 > 0; of shape (N, ...), float32, bfloat16, float16 or float64.
        noise: As for :func:`multiplicative_update`: numbers, a generator or a key.
        mean_shift: m, a number, a vector with one for each sample, or a tensor that broadcasts.
        rho: Noise level, positive, likewise.
        state: Which state to return.
        target: Which target to return.
        log_mean: Mean of log x0, likewise; with channels of shape (C, 1, 1).
        log_std: Its standard deviation, positive.
        log_input: Whether ``clean`` is the logarithm.
        fused: None uses the fused kernel where it supports the tensors (the CPU kernel, or Triton on CUDA), True always
            (or raise), False never.

    Returns:
        Both of the dtype of ``clean``, computed in float32 (float64 for float64) and rounded once.

    Raises:
        ValueError: If shapes do not fit, or an option is unknown.
        RuntimeError: If ``fused=True`` cannot be honoured.

    Cost:
        Fused: reads one tensor and writes two; the noise costs no pass.

    Source: arXiv:2510.02730 (kernel and score); arXiv:2206.00364, table 1, applied to the logarithm (``edm``).

    Example:
        >>> noise = torch.tensor([[1.0, -1.0]])
        >>> noise_with_target(torch.zeros(1, 2), noise, rho=0.5, state="log", target="hyvarinen")
        Noised(state=tensor([[ 0.5000, -0.5000]]), target=tensor([[-3.,  1.]]))
    """
    check_choice("state", state, ["scaled", "log", "positive"])
    check_choice("target", target, ["edm", "epsilon", "hyvarinen"])
    given = {"mean_shift": mean_shift, "rho": rho, "log_mean": log_mean, "log_std": log_std}
    numbers = {name: broadcast(name, value, clean) for name, value in given.items()}
    source = noise_source(noise, clean)
    if source is None:
        raise ValueError("noise must be a tensor, a generator or a key, got None")
    involved = [clean, source, *numbers.values()]
    kernels = kernels_for("noise_with_target", fused, [t for t in involved if isinstance(t, Tensor)])
    if kernels is not None:
        results = [torch.empty_like(clean, memory_format=torch.contiguous_format) for _ in range(2)]
        flags = {"state": state, "target": target, "log_input": log_input}
        launch(kernels, "forward_noising", {"clean": clean, "noise": source}, results, numbers, flags)
        return Noised(*results)
    x, (m, rho, mean, std) = clean.to(wide(clean.dtype)), numbers.values()
    epsilon = as_noise(source, x)
    y0 = x if log_input else x.log()
    z0 = y0 - mean
    total = (rho * rho + std * std) ** 0.5
    states = {
        "log": lambda: y0 + m + rho * epsilon,
        "positive": lambda: (y0 + m + rho * epsilon).exp(),
        "scaled": lambda: (z0 + rho * epsilon) / total,
    }
    targets = {
        "epsilon": lambda: epsilon,
        "hyvarinen": lambda: -1 - epsilon / rho,
        "edm": lambda: (rho / std * z0 - std * epsilon) / total,
    }
    return Noised(states[state]().to(clean.dtype), targets[target]().to(clean.dtype))
