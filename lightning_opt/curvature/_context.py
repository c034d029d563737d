"""The conditions under which a curvature product is computed, and which it leaves as they were."""

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def product_context(device: torch.device, *, twice: bool) -> Iterator[None]:
    """Gradients on, autocast off, random state put back afterwards.

    Args:
        device: Of the parameters.
        twice: Whether gradients will be differentiated: fused attention, which cannot be, is then switched off.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        # the caller's region would cast the backward passes too
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type != "cpu":
            stack.enter_context(torch.autocast("cpu", enabled=False))
        if twice:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_random_state_kept(device))
        yield


def seed_all(device: torch.device, seed: int) -> None:
    """Seed the generators that a forward pass on the device draws from; inside :func:`product_context`."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
