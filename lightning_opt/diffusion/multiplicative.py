"""One step of a multiplicative sampler, in one pass over memory."""

from typing import Literal

import torch
from torch import Tensor

from lightning_opt._checks import check_choice
from lightning_opt.fast_exp import fast_exp

from ._fused import Noise, Number, as_noise, broadcast, check_like, kernels_for, launch, noise_source
from .parametrization import wide
from .philox import NoiseKey

ExpImpl = Literal["native", "poly"]


def multiplicative_update(
    sample: Tensor,
    prediction: Tensor | None = None,
    noise: Noise | None = None,
    *,
    a: Number = 0.0,
    b: Number = 0.0,
    c: Number = 0.0,
    log_state: bool = False,
    out: Tensor | None = None,
    fused: bool | None = None,
    exp_impl: ExpImpl | None = None,
) -> Tensor:
    """``sample * exp(a + b * prediction + c * noise)``, or of logarithms ``sample + a + b * prediction + c * noise``.

    Every sign-preserving step of geometric Brownian motion is this update, with ``prediction`` the network's noise or
    score and a, b, c the numbers of the step. The fused kernels compute it in one pass in float32, the noise included;
    without them it is a chain of torch operations, which autograd sees.

    Args:
        sample: The state, of shape (N, ...), float32, bfloat16, float16 or float64.
        prediction: Of the same shape, any floating dtype; None leaves its term out.
        noise: Standard normal numbers of that shape; or a generator, by whose next key they are drawn; or a key. None
            leaves the term out. A key gives the same numbers on every device and backend, to rounding, in the order of
            the elements whatever their layout in memory.
        a: A number, a vector with one for each sample, or a tensor that broadcasts with the sample.
        b: Likewise.
        c: Likewise.
        log_state: Whether the sample is the logarithm of the state: nothing is exponentiated then.
        out: Where to write; may be ``sample``. By default a new tensor.
        fused: None uses the fused kernel where it supports the tensors (the CPU kernel, or Triton on CUDA), True always
            (or raise), False never.
        exp_impl: ``"native"`` for the exponential of the backend, ``"poly"`` for the polynomial of
            :func:`lightning_opt.fast_exp.fast_exp`, below one unit in the last place. None is native, except in the CPU
            kernel: the C library's exponential is a call for each element there, and the whole update takes more than
            twice as long with it (benchmarks/multiplicative_update.py).

    Returns:
        ``out``, or a tensor like ``sample``. NaN in an element shows in that element alone.

    Raises:
        ValueError: If shapes do not fit, an option is unknown, or ``exp_impl="poly"`` meets float64.
        RuntimeError: If ``fused=True`` cannot be honoured.

    Cost:
        Fused: reads and writes each tensor once. Tensors that are not contiguous are copied first.

    Source: arXiv:2510.02730, the sampling rule.

    Example:
        >>> x = torch.ones(2, 3)
        >>> multiplicative_update(x, a=torch.tensor([0.0, 1.0]))
        tensor([[1.0000, 1.0000, 1.0000],
                [2.7183, 2.7183, 2.7183]])
        >>> step = dict(a=-0.1, c=0.5, noise=NoiseKey(seed=7))
        >>> y = multiplicative_update(x, **step)
        >>> torch.allclose(y, multiplicative_update(x, **step, fused=False))
        True
    """
    check_choice("exp_impl", exp_impl, [None, "native", "poly"])
    if exp_impl == "poly" and sample.dtype == torch.float64:
        raise ValueError("exp_impl='poly' computes in float32, got a sample of float64: use 'native'")
    for name, tensor in {"prediction": prediction, "out": out}.items():
        if tensor is not None:
            check_like(name, tensor, sample)
    if out is not None and out.dtype != sample.dtype:
        raise ValueError(f"out must be {sample.dtype}, as the sample is, got {out.dtype}")
    numbers = {name: broadcast(name, value, sample) for name, value in {"a": a, "b": b, "c": c}.items()}
    source = noise_source(noise, sample)
    involved = [sample, prediction, source, *numbers.values()]
    kernels = kernels_for("multiplicative_update", fused, [t for t in involved if isinstance(t, Tensor)])
    if kernels is None:
        result = _reference(sample, prediction, source, **numbers, log_state=log_state, poly=exp_impl == "poly")
        return result if out is None else out.copy_(result)
    target = out
    if target is None or not target.is_contiguous():
        target = torch.empty_like(sample, memory_format=torch.contiguous_format)
    launch(
        kernels,
        "multiplicative_update",
        {"x": sample, "prediction": prediction, "noise": source},
        [target],
        numbers,
        {
            "prediction": prediction is not None,
            "noise": source is not None,
            "log_state": log_state,
            "poly": exp_impl == "poly" or (exp_impl is None and sample.device.type == "cpu"),
        },
    )
    if out is None or target is out:
        torch.autograd.graph.increment_version(target)  # a graph that still needs the old values must notice
        return target
    return out.copy_(target)


def _reference(
    sample: Tensor,
    prediction: Tensor | None,
    source: Tensor | NoiseKey | None,
    *,
    a: Number,
    b: Number,
    c: Number,
    log_state: bool,
    poly: bool,
) -> Tensor:
    """The update in plain torch: the specification."""
    x = sample.to(wide(sample.dtype))
    exponent = torch.zeros_like(x) + a
    if prediction is not None:
        exponent = exponent + b * prediction.to(x.dtype)
    if source is not None:
        exponent = exponent + c * as_noise(source, x)
    if log_state:
        return (x + exponent).to(sample.dtype)
    return (x * (fast_exp(exponent) if poly else exponent.exp())).to(sample.dtype)
