"""The conditions under which a curvature product is computed, and which it leaves as they were."""

import contextlib
from collections.abc import Iterator

import torch
from torch.backends import cuda as sdp


@contextlib.contextmanager
def product_context(device: torch.device, *, twice: bool) -> Iterator[None]:
    """Gradients on and autocast off: the caller's region would cast the backward passes too.

    Args:
        device: Of the parameters.
        twice: Whether gradients will be differentiated: fused attention, which cannot be, is then switched off, also
            for backward passes, where activation checkpointing runs forward again.
    """
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for kind in {device.type, "cpu"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if twice:
            _switch_fused_attention_off(stack)
        with torch.enable_grad():
            yield


def _switch_fused_attention_off(stack: contextlib.ExitStack) -> None:
    # as torch.nn.attention.sdpa_kernel(MATH) does, in a tenth of its time, which counts beside a small network
    for enabled, enable in _FUSED:
        if enabled():
            enable(False)
            stack.callback(enable, True)
    if not sdp.math_sdp_enabled():
        sdp.enable_math_sdp(True)
        stack.callback(sdp.enable_math_sdp, False)


_FUSED = [
    (sdp.flash_sdp_enabled, sdp.enable_flash_sdp),
    (sdp.mem_efficient_sdp_enabled, sdp.enable_mem_efficient_sdp),
    (sdp.cudnn_sdp_enabled, sdp.enable_cudnn_sdp),
]


@contextlib.contextmanager
def forward_context(device: torch.device, seed: int) -> Iterator[None]:
    """Random layers draw from a seed, and the random state is put back afterwards."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every device
        if cuda is not None:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
