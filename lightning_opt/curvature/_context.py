"""The conditions under which a curvature product is computed, and which it leaves as they were."""

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


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
        stack.enter_context(torch.enable_grad())
        for kind in {device.type, "cpu"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if twice:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


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
