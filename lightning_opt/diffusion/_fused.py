"""Which backend computes an elementwise function, by the optimizers' rules, and what they have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_opt import cpu_kernels, triton_kernels
from lightning_opt._checks import check_choice

from .parametrization import wide
from .philox import NoiseKey, check_noise_key, draw_noise_key, philox_normal

Noise = Tensor | torch.Generator | NoiseKey | tuple[int, int]
"""Standard normal numbers, or what they are drawn by: a generator, which moves on, or a key."""
Number = float | Tensor
"""A number; a vector with one for each sample; or a tensor that broadcasts, with trailing dimensions of size 1."""


def kernels_for(name: str, fused: bool | None, tensors: Sequence[Tensor]) -> Any:
    """The package of fused kernels to use, or None for the reference.

    Args:
        name: The function, for the message.
        fused: None where they support the tensors, True always (or raise), False never.
        tensors: What the function computes with.

    Raises:
        ValueError: If ``fused`` is none of these.
        RuntimeError: If ``fused=True`` cannot be honoured, saying why.
    """
    check_choice("fused", fused, [None, True, False])
    if fused is False:
        return None
    device = tensors[0].device
    package = {"cpu": cpu_kernels, "cuda": triton_kernels}.get(device.type)
    reason: str | None
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        reason = "autograd cannot look into the fused kernels"
    elif torch.compiler.is_compiling():
        reason = "torch.compile cannot look into the fused kernels"
    elif any(type(t) not in (Tensor, nn.Parameter) for t in tensors):
        reason = "there are fused kernels for plain tensors only"
    elif package is None:
        reason = f"there is no fused kernel for device {device}"
    else:
        dtypes = dict.fromkeys(t.dtype for t in tensors if t.ndim)
        reason = next(filter(None, map(package.unsupported_map, dtypes)), None)
        if reason is None:
            return package
    if fused:
        raise RuntimeError(f"{name}(fused=True) cannot be honoured: {reason}; use fused=None or False")
    return None


def launch(
    kernels: Any,
    name: str,
    inputs: Mapping[str, Tensor | NoiseKey | None],
    outputs: Sequence[Tensor],
    numbers: Mapping[str, Number],
    flags: Mapping[str, Any],
) -> None:
    """Run a fused kernel.

    Args:
        kernels: What :func:`kernels_for` returned.
        name: Of the kernel.
        inputs: By name; a key stands for the noise, which must be last; None is left out.
        outputs: Contiguous tensors.
        numbers: The coefficients.
        flags: Options that are compiled in.
    """
    key = next((value for value in inputs.values() if isinstance(value, NoiseKey)), None)
    tensors = {n: value.contiguous() for n, value in inputs.items() if isinstance(value, Tensor)}
    kernels.launch_map(name, tensors, outputs, _rows(numbers, outputs[0].shape), flags=flags, key=key)


def noise_source(noise: Noise | None, like: Tensor) -> Tensor | NoiseKey | None:
    """The noise itself, or the key that it will be drawn by; a generator moves on by as many numbers.

    Raises:
        ValueError: If the noise has another shape or device, or a key is out of range.
    """
    if noise is None:
        return None
    if isinstance(noise, torch.Generator):
        return draw_noise_key(noise, like.numel())
    if isinstance(noise, Tensor):
        check_like("noise", noise, like)
        return noise
    return check_noise_key(noise)


def as_noise(source: Tensor | NoiseKey, like: Tensor) -> Tensor:
    """The noise as a tensor of the dtype of another."""
    if isinstance(source, Tensor):
        return source.to(like.dtype)
    return philox_normal(like.shape, source, dtype=like.dtype, device=like.device)


def check_like(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise ``ValueError`` unless a tensor has the shape and the device of another."""
    if tensor.shape != like.shape:
        raise ValueError(f"{name} must have shape {tuple(like.shape)}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got a tensor on {tensor.device}")


def broadcast(name: str, value: Number, like: Tensor) -> Number:
    """A number as it is; a tensor of numbers in the dtype to compute in, and in a shape that broadcasts with ``like``.

    Raises:
        ValueError: If it does not.
    """
    if not isinstance(value, Tensor):
        return value
    value = value.to(like.device, wide(like.dtype))
    if value.ndim == 1:
        value = value.reshape(-1, *[1] * (like.ndim - 1))
    try:
        fits = torch.broadcast_shapes(value.shape, like.shape) == like.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} must be a number, a vector with one for each of {len(like)} samples, or a tensor that broadcasts;"
            f" got shape {tuple(value.shape)} beside {tuple(like.shape)}"
        )
    return value


def _rows(numbers: Mapping[str, Number], shape: torch.Size) -> dict[str, Number]:
    """Coefficients as floats, or vectors with one for each of equal parts of a tensor of this shape."""
    tensors = {n: v[(None,) * (len(shape) - v.ndim)] for n, v in numbers.items() if isinstance(v, Tensor)}
    if not tensors:
        return dict(numbers)
    depth = max([0, *(i + 1 for v in tensors.values() for i, size in enumerate(v.shape) if size > 1)])
    lead = (*shape[:depth], *[1] * (len(shape) - depth))
    return {**numbers, **{n: v.expand(lead).reshape(-1) if v.numel() > 1 else v for n, v in tensors.items()}}
