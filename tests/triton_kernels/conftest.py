"""The kernels run compiled on a GPU where there is one, else on the CPU in Triton's interpreter."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor, nn
from triton.runtime import interpreter

from lightning_opt import triton_kernels
from lightning_opt.optim._base import Optimizer
from lightning_opt.triton_kernels import _launch

collect_ignore = [] if torch.cuda.is_available() else ["test_cuda.py"]

Run = Callable[..., tuple[list[nn.Parameter], Optimizer]]


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _faithful_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the interpreter as strict as a GPU: rounding to bfloat16, which it truncates to, and promises of alignment.

    It also computes masked elements, whatever lies in memory there, and numpy would warn.
    """
    convert = interpreter._convert_float

    def rounded(values: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        exact = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
        return exact.to(torch.bfloat16).view(torch.uint16).numpy().reshape(values.shape)

    def set_attribute(handle: interpreter.TensorHandle, name: str, values: list[int]) -> None:
        if name == "tt.divisibility":
            assert (handle.data % values[0] == 0).all(), "misaligned address"

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", set_attribute)
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def few_programs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large blocks, since the interpreter needs 10 ms for a program and little more for its elements."""
    if device == "cpu":
        monkeypatch.setattr(_launch, "_BLOCK", 1 << 12)
        monkeypatch.setattr(_launch, "_kept", OrderedDict())  # tables for blocks of that size


@pytest.fixture
def run(device: str) -> Run:
    """Runs an optimizer over given gradients, on the reference or on Triton."""

    def run(
        cls: type[Optimizer],
        options: dict[str, Any],
        params: list[Tensor],
        gradients: list[list[Tensor]],
        *,
        triton: bool,
    ) -> tuple[list[nn.Parameter], Optimizer]:
        """Take a step for each list of gradients (None where a parameter has none)."""
        own = [nn.Parameter(p.to(device).clone()) for p in params]
        backend = {} if triton else {"fused": False, "foreach": False}
        optimizer = cls(own, **options, **backend)
        if triton:
            on_triton(optimizer)
        for step in gradients:
            for p, g in zip(own, step, strict=True):
                p.grad = None if g is None else g.to(device)
            optimizer.step()
        return own, optimizer

    return run


def on_triton(optimizer: Optimizer) -> None:
    """Use the Triton kernels, on CPU tensors too, where only tests do."""
    optimizer._kernels = lambda group, p: triton_kernels


@pytest.fixture(name="on_triton")
def _on_triton() -> Callable[[Optimizer], None]:
    return on_triton
