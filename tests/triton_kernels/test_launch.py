"""The launcher: which tensors it takes, and that it reaches each of their elements once."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_opt import triton_kernels
from lightning_opt.optim import AdaBelief, Lion, LionK
from lightning_opt.triton_kernels import _launch, launch
from lightning_opt.triton_kernels._multi_tensor import multi_tensor
from lightning_opt.triton_kernels.lion import lion

# p - size * g, and the state becomes 2 g
PLAIN = {"step": 1.0, "beta1": 0.0, "weight1": 1.0, "beta2": 0.0, "weight2": 2.0, "size": 0.5, "shrink": 1.0, "e": 0.0}


def descend(params: list[Tensor], grads: list[Tensor], states: list[Tensor] | None = None, **changes: Any) -> None:
    if states is None:
        states = [torch.zeros_like(p) for p in params]
    launch("lion", params, grads, {"exp_avg": states}, {**PLAIN, **changes}, flags={"kernel": "quadratic"})


def noise(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, device=device)


def test_nothing_to_do(device):
    descend([], [])
    empty = [torch.empty(0, device=device), torch.empty(3, 0, device=device)]
    descend(empty, empty, empty)


def test_empty_tensors_among_others(device):
    p, g = [noise(n, device=device) for n in (0, 3, 0, 600, 0)], [noise(n, device=device) for n in (0, 3, 0, 600, 0)]
    expected = [x - 0.5 * y for x, y in zip(p, g, strict=True)]
    descend(p, g)
    for actual, wanted in zip(p, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("size", [1, 7, 511, 512, 513, 1023, 1025])
def test_only_its_own_elements_are_touched(size, device):
    p, g, m = (noise(size + 64, device=device) for _ in range(3))
    before = p.clone(), m.clone()
    descend([p[32:-32]], [g[32:-32]], [m[32:-32]])
    torch.testing.assert_close(p[32:-32], before[0][32:-32] - 0.5 * g[32:-32])
    torch.testing.assert_close(m[32:-32], 2 * g[32:-32])
    for after, unchanged in zip((p, m), before, strict=True):
        assert torch.equal(after[:32], unchanged[:32])
        assert torch.equal(after[-32:], unchanged[-32:])


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("which", ["p", "g", "m"])
def test_unaligned_views(offset, which, device):
    tensors = {name: noise(1031, device=device) for name in "pgm"}
    p, g, m = (t[offset : offset + 1025] if name == which else t[:1025] for name, t in tensors.items())
    assert tensors[which][offset:].data_ptr() % 16
    expected = p - 0.5 * g
    descend([p], [g], [m])
    torch.testing.assert_close(p, expected)
    torch.testing.assert_close(m, 2 * g)


def layouts(device: str) -> dict[str, Tensor]:
    return {
        "transposed": noise(33, 31, device=device).t(),
        "channels last": noise(2, 3, 5, 7, device=device).to(memory_format=torch.channels_last),
        "sliced": noise(40, 50, device=device)[3:20, ::2],
        "sliced transposed": noise(40, 50, device=device)[3:20].t()[::2],
        "permuted": noise(4, 5, 6, device=device).permute(2, 0, 1),
        "scalar": noise(device=device),
    }


@pytest.mark.parametrize("layout", layouts("cpu"))
def test_layouts_of_parameters(layout, device):
    p = layouts(device)[layout]
    g, m = noise(*p.shape, device=device), noise(*p.shape, device=device)
    expected, strides = p - 0.5 * g, p.stride()
    descend([p], [g], [m])
    assert p.stride() == strides
    torch.testing.assert_close(p, expected)
    torch.testing.assert_close(m, 2 * g)


def test_gradients_and_states_may_be_laid_out_differently(device):
    p, g = noise(31, 33, device=device), noise(33, 31, device=device).t()
    m, h = noise(33, 31, device=device).t(), noise(1, 33, device=device).expand(31, 33)
    expected, before = p - 0.5 * g, g.clone()
    descend([p], [g], [m])
    torch.testing.assert_close(p, expected)
    torch.testing.assert_close(m, 2 * g)
    assert torch.equal(g, before)
    descend([p], [h], [m])
    torch.testing.assert_close(p, expected - 0.5 * h)


def test_refuses_to_write_into_a_tensor_that_overlaps_itself(device):
    p = noise(1, 33, device=device).expand(31, 33)
    with pytest.raises(RuntimeError, match="overlaps itself"):
        descend([p], [noise(31, 33, device=device)], [noise(31, 33, device=device)])


def test_2000_small_tensors(device):
    p, g = [list(noise(2000, 64, device=device)) for _ in range(2)]
    states = list(noise(2000, 64, device=device))
    expected = torch.stack(p) - 0.5 * torch.stack(g)
    descend(p, g, states)
    torch.testing.assert_close(torch.stack(p), expected)
    torch.testing.assert_close(torch.stack(states), 2 * torch.stack(g))


def test_chunks_cover_every_element_once():
    sizes = [0, 1, 511, 512, 513, 0, 200_000_000, 2**31 + 5, 64] + [64] * 10_000
    chunks = _launch._Tables(sizes, torch.device("cpu")).chunks.long()
    start = chunks[:, 1] * _launch._BLOCK
    covered = (torch.tensor(sizes)[chunks[:, 0]] - start).clamp(max=_launch._BLOCK)
    assert covered.min() > 0
    assert torch.zeros(len(sizes), dtype=torch.int64).index_add_(0, chunks[:, 0], covered).tolist() == sizes
    assert ((chunks[:, 0] << 32) + chunks[:, 1]).diff().min() > 0  # no chunk twice


@pytest.mark.parametrize("size", [100, 512])
def test_addresses_beyond_2_to_the_32_elements(size, device):
    """The kernel itself, with a table that places the only block of memory there is at the end of a huge tensor."""
    block = (2**32 + 2**20) // _launch._BLOCK
    p, g, m = (noise(_launch._BLOCK, device=device) for _ in range(3))
    start = block * _launch._BLOCK
    rows = [[start + size], [0], *([t.data_ptr() - 4 * start] for t in (p, g, m))]
    table, chunks = torch.tensor(rows, device=device), torch.tensor([[0, block]], dtype=torch.int32, device=device)
    names = ("step", "beta1", "weight1", "beta2", "weight2", "size", "shrink", "e")
    expected = p.clone()
    expected[:size] -= 0.5 * g[:size]
    multi_tensor[(1,)](
        table,
        chunks,
        tuple(PLAIN[name] for name in names),
        None,
        1,
        UPDATE=lion,
        FLAGS=("quadratic",),
        ROWS=(-1,) * len(names),
        DTYPES=(_launch._DTYPES[torch.float32],) * 3,
        MAXIMIZE=False,
        STOCHASTIC=False,
        BLOCK=_launch._BLOCK,
        num_warps=_launch._WARPS,
    )
    torch.testing.assert_close(p, expected)


def test_coefficients_of_each_tensor(device):
    p, g = [noise(n, device=device) for n in (3, 600, 5)], [noise(n, device=device) for n in (3, 600, 5)]
    sizes = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    expected = [x - 0.5 * s * y for x, y, s in zip(p, g, sizes.tolist(), strict=True)]
    descend(p, g, size=sizes, shrink=torch.tensor(1.0), weight1=torch.tensor([0.5] * 3, dtype=torch.float64))
    for actual, wanted in zip(p, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("capturable", [False, True])
def test_tensors_whose_step_counts_differ(capturable, run):
    params = [torch.ones(5), torch.full((600,), 2.0)]
    gradients = [[torch.ones(5), None], [torch.ones(5), torch.ones(600)], [None, torch.ones(600)], [torch.ones(5)] * 2]
    gradients[-1][1] = torch.ones(600)
    options = {"lr": 0.1, "rectify": True, "betas": (0.9, 0.99), "capturable": capturable}
    expected, _ = run(AdaBelief, options, params, gradients, triton=False)
    actual, optimizer = run(AdaBelief, options, params, gradients, triton=True)
    for p, q in zip(actual, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert [optimizer.state[p]["step"].item() for p in actual] == [3, 3]


def test_a_tensor_as_learning_rate(run):
    p, g = torch.ones(9), torch.randn(9)
    for capturable in (False, True):
        [actual], _ = run(Lion, {"lr": torch.tensor(0.5), "capturable": capturable}, [p], [[g]], triton=True)
        assert torch.equal(actual.detach().cpu(), 1 - 0.5 * g.sign())


def test_complex_parameters_are_updated_as_pairs(run):
    p, g = (torch.randn(40, dtype=torch.complex64) for _ in range(2))
    [expected], _ = run(AdaBelief, {"lr": 0.1}, [p], [[g], [g]], triton=False)
    [actual], _ = run(AdaBelief, {"lr": 0.1}, [p], [[g], [g]], triton=True)
    torch.testing.assert_close(actual, expected)


def test_new_tensors_at_every_step_and_the_same_at_every_step(device):
    """The tables on the device follow the addresses."""
    p = noise(20, device=device)
    expected = p.clone()
    kept = []
    for _ in range(3):
        g = noise(20, device=device)
        kept.append(g)  # so that the next one lies elsewhere
        for _ in range(2):
            descend([p], [g], [noise(20, device=device)])
            expected -= 0.5 * g
    torch.testing.assert_close(p, expected)


def test_tables_are_forgotten_in_the_end(device, monkeypatch):
    monkeypatch.setattr(_launch, "_kept", type(_launch._kept)())
    for number in range(258):
        _launch._tables(torch.device(device), 4, [number], [3])
    assert len(_launch._kept) <= 256


def test_autograd_notices_the_change(device):
    w = torch.nn.Parameter(noise(4, device=device))
    loss = (w * w).sum()
    with torch.no_grad():
        descend([w], [noise(4, device=device)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_mixed_dtypes_of_an_optimizer_are_grouped(run):
    params = [torch.randn(9), torch.randn(9).bfloat16(), torch.randn(9).half(), torch.randn(9)]
    gradients = [[torch.randn(9).to(p.dtype) for p in params]]
    options = {"kernel": "quadratic", "lr": 0.1}
    expected, _ = run(LionK, options, params, gradients, triton=False)
    actual, optimizer = run(LionK, options, params, gradients, triton=True)
    for p, q in zip(actual, expected, strict=True):
        torch.testing.assert_close(p, q)
        assert optimizer.state[p]["exp_avg"].dtype == torch.float32


def test_wrong_tensors_are_refused(device):
    x = noise(4, device=device)
    with pytest.raises(ValueError, match="must share their dtype"):
        descend([x, x.half()], [x, x])
    with pytest.raises(ValueError, match="must share their dtype"):
        descend([x, x], [x, x.half()])
    with pytest.raises(ValueError, match="must have the shapes of their parameters"):
        descend([x], [noise(5, device=device)])
    with pytest.raises(ValueError, match="shapes"):
        descend([x], [x], [noise(2, 4, device=device).t()])
    with pytest.raises(TypeError, match=r"float64"):
        descend([x.double()], [x.double()])


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    import triton

    monkeypatch.setattr(_launch, "multi_tensor", triton.JITFunction(multi_tensor.fn))
    with pytest.raises(RuntimeError, match="with TRITON_INTERPRET=1"):
        descend([torch.ones(3)], [torch.ones(3)])


def test_unsupported_says_why(monkeypatch):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert triton_kernels.unsupported(dtype) is None
    assert "float64" in triton_kernels.unsupported(torch.float64)
    import triton

    from lightning_opt.triton_kernels import _support

    monkeypatch.setattr(triton, "__version__", "3.3.1")
    _support._missing.cache_clear()
    assert "triton 3.3.1 is too old" in triton_kernels.unsupported(torch.float32)
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    _support._missing.cache_clear()
    assert "lightning-opt[triton]" in triton_kernels.unsupported(torch.float32)
    monkeypatch.undo()
    _support._missing.cache_clear()
