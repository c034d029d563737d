"""One step of a sampler on log states, with the denoised state, in one pass over memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._fused import Noise, Number, as_noise, broadcast, check_like, kernels_for, launch, noise_source
from .parametrization import wide


class LogStep(NamedTuple):
    """What :func:`log_step` returns: the next log state, and the denoised one."""

    state: Tensor
    denoised: Tensor


def log_step(
    log_x: Tensor,
    output: Tensor,
    noise: Noise | None = None,
    *,
    skip: Number = 1.0,
    gain: Number = 0.0,
    constant: Number = 0.0,
    pull: Number = 1.0,
    shift: Number = 0.0,
    scale: Number = 0.0,
    fused: bool | None = None,
) -> LogStep:
    """The step of every first-order sampler on logarithms, from the network's output.

    With ``denoised = skip * log_x + gain * output + constant``, which is what a network's output stands for in every
    parametrisation that is affine, the next state is ``(1 - pull) * log_x + pull * denoised + shift + scale * noise``.

    Args:
        log_x: The log state, of shape (N, ...), float32, bfloat16, float16 or float64.
        output: The network's output, of the same shape, any floating dtype.
        noise: As for :func:`multiplicative_update`; None for a deterministic step.
        skip: A number, a vector with one for each sample, or a tensor that broadcasts with ``log_x``.
        gain: Likewise, as all that follow.
        constant: Of the denoised state.
        pull: The share of the way to the denoised state.
        shift: The drift beside it.
        scale: Standard deviation of the noise.
        fused: None uses the fused kernel where it supports the tensors (the CPU kernel, or Triton on CUDA), True always
            (or raise), False never.

    Returns:
        Both of the dtype of ``log_x``, computed in float32 (float64 for float64) and rounded once.

    Raises:
        ValueError: If shapes do not fit.
        RuntimeError: If ``fused=True`` cannot be honoured.

    Cost:
        Fused: reads two tensors and writes two; the noise costs no pass.

    Example:
        >>> y = torch.tensor([[0.0, 2.0]])
        >>> log_step(y, torch.ones(1, 2), gain=0.5, pull=0.5, shift=0.1)
        LogStep(state=tensor([[0.3500, 2.3500]]), denoised=tensor([[0.5000, 2.5000]]))
    """
    check_like("output", output, log_x)
    given = {"skip": skip, "gain": gain, "constant": constant, "pull": pull, "shift": shift, "scale": scale}
    numbers = {name: broadcast(name, value, log_x) for name, value in given.items()}
    source = noise_source(noise, log_x)
    involved = [log_x, output, source, *numbers.values()]
    kernels = kernels_for("log_step", fused, [t for t in involved if isinstance(t, Tensor)])
    if kernels is not None:
        results = [torch.empty_like(log_x, memory_format=torch.contiguous_format) for _ in range(2)]
        inputs = {"y": log_x, "output": output, "noise": source}
        launch(kernels, "log_step", inputs, results, numbers, {"noise": source is not None})
        return LogStep(*results)
    y, n = log_x.to(wide(log_x.dtype)), numbers
    denoised = n["skip"] * y + n["gain"] * output.to(y.dtype) + n["constant"]
    state = (1 - n["pull"]) * y + n["pull"] * denoised + n["shift"]
    if source is not None:
        state = state + n["scale"] * as_noise(source, y)
    return LogStep(state.to(log_x.dtype), denoised.to(log_x.dtype))
