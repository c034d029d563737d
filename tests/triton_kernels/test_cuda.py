"""What only a GPU can show; collected where there is one."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lightning_opt import triton_kernels
from lightning_opt.optim import AdaBelief, DiffGrad, ExponentiatedAdamW, ExponentiatedSGD, Lion, LionK
from lightning_opt.triton_kernels import _launch

OPTIMIZERS = {
    "adabelief": lambda p, **options: AdaBelief(p, lr=1e-2, rectify=True, weight_decay=0.1, **options),
    "diffgrad": lambda p, **options: DiffGrad(p, lr=1e-2, **options),
    "lion": lambda p, **options: Lion(p, lr=1e-2, **options),
    "exponentiated_sgd": lambda p, **options: ExponentiatedSGD(p, lr=1e-2, momentum=0.9, **options),
    "exponentiated_adamw": lambda p, **options: ExponentiatedAdamW(p, lr=1e-2, **options),
}


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, device="cuda")) for shape in [(7,), (33, 31), (513,), (64, 64)]]


def set_gradients(params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = torch.randn_like(p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fused_is_the_default_where_it_can_be(dtype):
    p = nn.Parameter(torch.ones(4, device="cuda", dtype=dtype))
    optimizer = AdaBelief([p])
    chosen = optimizer._kernels(optimizer.param_groups[0], p.device, dtype)
    assert chosen is (None if dtype == torch.float64 else triton_kernels)


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_never_waits_for_the_device(name, capturable):
    params = parameters()
    optimizer = OPTIMIZERS[name](params, fused=True, capturable=capturable)
    set_gradients(params)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(3):
        optimizer.step()  # tables as they were
        set_gradients(params)
        optimizer.step()  # and with new addresses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_captured_step_replays(name):
    params = parameters()
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = OPTIMIZERS[name](params, fused=True, capturable=True)
    reference = OPTIMIZERS[name](twins, fused=False)
    gradients = [[torch.randn_like(p) for p in params] for _ in range(8)]

    def step_reference(step: int) -> None:
        for p, g in zip(twins, gradients[step], strict=True):
            p.grad = g.clone()
        reference.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(3):
            for p, g in zip(params, gradients[step], strict=True):
                p.grad = g.clone()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    static = [torch.empty_like(p) for p in params]
    for p, g in zip(params, static, strict=True):
        p.grad = g
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(3, 8):
        for g, value in zip(static, gradients[step], strict=True):
            g.copy_(value)
        graph.replay()
        # what the launcher keeps may change meanwhile: the graph must not depend on it
        _launch._kept.clear()
        torch.empty(1 << 20, device="cuda").fill_(-1)
    for step in range(8):
        step_reference(step)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
    assert all(s["step"].item() == 8 for s in optimizer.state.values() if "step" in s)


def test_streams_may_change_from_step_to_step():
    [p] = [nn.Parameter(torch.zeros(100_000, device="cuda"))]
    optimizer = LionK([p], lr=1.0, betas=(0.0, 0.0), kernel="quadratic", fused=True)
    for _ in range(10):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            p.grad = -torch.ones_like(p)
            optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(p.detach(), torch.full_like(p, 10.0))


def test_a_tensor_of_more_than_2_to_the_31_elements():
    n = 2**31 + 1000
    if torch.cuda.mem_get_info()[0] < 8 * n:
        pytest.skip("needs 16 GB of free GPU memory")
    p = nn.Parameter(torch.zeros(n, device="cuda", dtype=torch.bfloat16))
    p.grad = torch.full_like(p, -1.0)
    LionK([p], lr=1.0, betas=(0.0, 0.0), kernel="quadratic", state_dtype="bfloat16", fused=True).step()
    assert p.min() == p.max() == 1
