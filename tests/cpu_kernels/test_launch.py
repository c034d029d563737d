"""The launcher: which tensors it takes, that it reaches each of their elements once, on any number of threads."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_opt.cpu_kernels import _compile, _launch, _threads, launch, unsupported
from lightning_opt.optim import AdaBelief, Lion, LionK

# p - size * g, and the state becomes 2 g
PLAIN = {"step": 1.0, "beta1": 0.0, "weight1": 1.0, "beta2": 0.0, "weight2": 2.0, "size": 0.5, "shrink": 1.0, "e": 0.0}


def descend(params: list[Tensor], grads: list[Tensor], states: list[Tensor] | None = None, **changes: Any) -> None:
    if states is None:
        states = [torch.zeros_like(p) for p in params]
    launch("lion", params, grads, {"exp_avg": states}, {**PLAIN, **changes}, flags={"kernel": "quadratic"})


def test_nothing_to_do():
    descend([], [])
    empty = [torch.empty(0), torch.empty(3, 0)]
    descend(empty, empty, empty)


def test_empty_tensors_among_others():
    sizes = [0, 3, 0, 600, 0]
    p, g = [torch.randn(n) for n in sizes], [torch.randn(n) for n in sizes]
    expected = [x - 0.5 * y for x, y in zip(p, g, strict=True)]
    descend(p, g)
    assert all(map(torch.equal, p, expected))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [1, 7, 16, 1025, 3 * _launch._ELEMENTS_A_THREAD + 5])
def test_only_its_own_elements_are_touched(size, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    p, g, m = (torch.randn(size + 64) for _ in range(3))
    before = p.clone(), m.clone()
    descend([p[32:-32]], [g[32:-32]], [m[32:-32]])
    assert torch.equal(p[32:-32], before[0][32:-32] - 0.5 * g[32:-32])
    assert torch.equal(m[32:-32], 2 * g[32:-32])
    for after, unchanged in zip((p, m), before, strict=True):
        assert torch.equal(after[:32], unchanged[:32])
        assert torch.equal(after[-32:], unchanged[-32:])


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("which", ["p", "g", "m"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unaligned_views(offset, which, dtype):
    tensors = {name: torch.randn(1031).to(dtype) for name in "pgm"}
    p, g, m = (t[offset : offset + 1025] if name == which else t[:1025] for name, t in tensors.items())
    assert tensors[which][offset:].data_ptr() % 16
    expected = (p.float() - 0.5 * g.float()).to(dtype)
    descend([p], [g], [m])
    assert torch.equal(p, expected)
    assert torch.equal(m, 2 * g)


LAYOUTS = {
    "transposed": lambda: torch.randn(33, 31).t(),
    "channels last": lambda: torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last),
    "sliced": lambda: torch.randn(40, 50)[3:20, ::2],
    "sliced transposed": lambda: torch.randn(40, 50)[3:20].t()[::2],
    "permuted": lambda: torch.randn(4, 5, 6).permute(2, 0, 1),
    "scalar": lambda: torch.randn(()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_parameters(layout):
    p = LAYOUTS[layout]()
    g, m = torch.randn(p.shape), torch.randn(p.shape)
    expected, strides = p - 0.5 * g, p.stride()
    descend([p], [g], [m])
    assert p.stride() == strides
    assert torch.equal(p, expected)
    assert torch.equal(m, 2 * g)


def test_gradients_and_states_may_be_laid_out_differently():
    p, g = torch.randn(31, 33), torch.randn(33, 31).t()
    m, h = torch.randn(33, 31).t(), torch.randn(1, 33).expand(31, 33)
    expected, before = p - 0.5 * g, g.clone()
    descend([p], [g], [m])
    assert torch.equal(p, expected)
    assert torch.equal(m, 2 * g)
    assert torch.equal(g, before)
    descend([p], [h], [m])
    assert torch.equal(p, expected - 0.5 * h)


def test_gradients_that_are_negated_lazily():
    p, g = torch.randn(40), torch.randn(40)
    expected = p + 0.5 * g
    descend([p], [torch._neg_view(g)], [torch.zeros(40)])
    assert torch.equal(p, expected)


def test_refuses_to_write_into_a_tensor_that_overlaps_itself():
    p, g = torch.randn(1, 33).expand(31, 33), torch.randn(31, 33)
    before = p.clone()
    with pytest.raises(RuntimeError, match="overlaps itself"):
        descend([p], [g], [torch.zeros(31, 33)])
    assert torch.equal(p, before)


def test_2000_small_tensors():
    p, g, m = [list(torch.randn(2000, 64)) for _ in range(3)]
    expected = torch.stack(p) - 0.5 * torch.stack(g)
    descend(p, g, m)
    assert torch.equal(torch.stack(p), expected)
    assert torch.equal(torch.stack(m), 2 * torch.stack(g))


def test_coefficients_of_each_tensor():
    p, g = [torch.randn(n) for n in (3, 600, 5)], [torch.randn(n) for n in (3, 600, 5)]
    sizes = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    expected = [x - 0.5 * s * y for x, y, s in zip(p, g, sizes.tolist(), strict=True)]
    descend(p, g, size=sizes, shrink=torch.tensor(1.0), weight1=torch.tensor([0.5] * 3, dtype=torch.float64))
    for actual, wanted in zip(p, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("capturable", [False, True])
def test_tensors_whose_step_counts_differ(capturable):
    def run(fused: bool) -> list[nn.Parameter]:
        params = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.full((600,), 2.0))]
        optimizer = AdaBelief(params, lr=0.1, rectify=True, betas=(0.9, 0.99), capturable=capturable, fused=fused)
        for present in [(True, False), (True, True), (False, True), (True, True)]:
            for p, has_gradient in zip(params, present, strict=True):
                p.grad = torch.ones_like(p) if has_gradient else None
            optimizer.step()
        assert [optimizer.state[p]["step"].item() for p in params] == [3, 3]
        return params

    for p, q in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=0)


def test_a_tensor_as_learning_rate():
    p = nn.Parameter(torch.ones(9))
    p.grad = torch.randn(9)
    Lion([p], lr=torch.tensor(0.5), fused=True).step()
    assert torch.equal(p.detach(), 1 - 0.5 * p.grad.sign())


@pytest.mark.parametrize("lazily_conjugated", [False, True])
def test_complex_parameters_are_updated_as_pairs(lazily_conjugated):
    start, g = (torch.randn(40, dtype=torch.complex64) for _ in range(2))
    g = g.conj() if lazily_conjugated else g
    ends = []
    for fused in (True, False):
        p = nn.Parameter(start.clone())
        optimizer = AdaBelief([p], lr=0.1, fused=fused)
        for _ in range(2):
            p.grad = g
            optimizer.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends)


def test_mixed_dtypes_of_an_optimizer_are_grouped():
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    params = [nn.Parameter(torch.randn(9).to(dtype)) for dtype in dtypes]
    expected = []
    for p in params:
        p.grad = torch.randn(9).to(p.dtype)
        work = torch.float64 if p.dtype == torch.float64 else torch.float32
        expected.append((p.detach().to(work) - 0.125 * (0.5 * p.grad.to(work))).to(p.dtype))
    LionK(params, lr=0.125, betas=(0.5, 0.99), kernel="quadratic").step()  # float16 by the reference
    assert all(map(torch.equal, params, expected))


def test_autograd_notices_the_change():
    w = nn.Parameter(torch.randn(4))
    loss = (w * w).sum()
    with torch.no_grad():
        descend([w], [torch.randn(4)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- threads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("openmp", [True, False])
def test_any_number_of_threads_gives_the_same_bits(openmp, monkeypatch):
    if not openmp:
        monkeypatch.setattr(_threads, "_parallel", lambda: None)
    sizes = [5, 3 * _launch._ELEMENTS_A_THREAD, 1, 0, _launch._ELEMENTS_A_THREAD + 3, 64]
    ends = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(n, generator=generator).bfloat16()) for n in sizes]
        optimizer = AdaBelief(params, lr=1e-2, stochastic_rounding=True, fused=True)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        optimizer.step()
        ends.append(torch.cat([p.detach() for p in params]))
    assert all(torch.equal(end, ends[0]) for end in ends)


def test_optimizers_may_step_in_several_threads(monkeypatch):
    """The first calls compile at the same time."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    _launch._kernel.cache_clear()

    def train(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        p = nn.Parameter(torch.randn(3 * _launch._ELEMENTS_A_THREAD, generator=generator))
        optimizer = AdaBelief([p], lr=1e-2, fused=True)
        for _ in range(5):
            p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        return p.detach()

    alone = [train(seed) for seed in range(4)]
    _launch._kernel.cache_clear()
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(train, range(4)))
    assert all(map(torch.equal, alone, together))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    p, g, m = (torch.randn(3 * _launch._ELEMENTS_A_THREAD) for _ in range(3))
    expected = (p - 0.5 * g - 0.5 * g).numpy()
    descend([p], [g], [m])  # the threads of this process are in use
    child = os.fork()
    if child == 0:  # torch's own threads would hang here: only the launcher and numpy
        signal.alarm(30)
        descend([p], [g], [m])
        os._exit(0 if (p.numpy() == expected).all() else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


# --- what is refused ---------------------------------------------------------------------------------------------


def test_wrong_tensors_are_refused():
    x = torch.randn(4)
    with pytest.raises(ValueError, match="must share their dtype"):
        descend([x, x.double()], [x, x])
    with pytest.raises(ValueError, match="must share their dtype"):
        descend([x, x], [x, x.double()])
    with pytest.raises(ValueError, match="on the CPU"):
        descend([x], [x.to("meta")])
    with pytest.raises(ValueError, match="must have the shapes of their parameters"):
        descend([x], [torch.randn(5)])
    with pytest.raises(ValueError, match="shapes"):
        descend([x], [x], [torch.randn(2, 4).t()])
    with pytest.raises(TypeError, match="not float16"):
        descend([x], [x], [x.half()])


def test_unsupported_says_why():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert unsupported(dtype) is None
    p = nn.Parameter(torch.randn(4).half())
    with pytest.raises(RuntimeError, match="fused=True.*float32, float64 and bfloat16, not float16"):
        AdaBelief([p], fused=True)


def test_an_update_that_leaves_the_compute_dtype_is_refused(monkeypatch):
    """A Python float in a kernel would compute in float64: slow, and not what the reference does."""
    from lightning_opt.cpu_kernels import lion

    monkeypatch.setattr(lion, "lion", lambda kernel: lambda p, g, state, c: (p - 0.5 * g, g))
    _launch._kernel.cache_clear()
    with pytest.raises(TypeError, match="must return all 2 results as float32"):
        descend([torch.randn(4)], [torch.randn(4)])
    _launch._kernel.cache_clear()


# --- cost --------------------------------------------------------------------------------------------------------


def test_numba_is_imported_by_the_first_launch_only():
    code = """
import sys, torch
from lightning_opt.optim import AdaBelief
p = torch.nn.Parameter(torch.ones(3))
optimizer = AdaBelief([p])
assert "numba" not in sys.modules
p.grad = torch.ones(3)
optimizer.step()
assert "numba" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("cls", "options"), [(AdaBelief, {"amsgrad": True}), (AdaBelief, {"state_dtype": "bfloat16"}), (Lion, {})]
)
def test_the_loop_is_vectorized(cls, options):
    """The kernel uses registers of several numbers: without the annotations of aliasing LLVM would give up."""
    p = nn.Parameter(torch.randn(64))
    p.grad = torch.randn(64)
    kernels = []
    original = _compile.compiled

    def spy(*key: Any) -> Any:
        kernels.append(original(*key))
        return kernels[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compile, "compiled", spy)
        _launch._kernel.cache_clear()
        cls([p], **options, fused=True).step()
    assert " x float>" in kernels[0].inspect_llvm()
