"""The kernels of compression beside torch, interpreted where there is no GPU, and compiled for one without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_opt.compression import CompressionState, ScaledSign, TopK
from lightning_opt.compression.compressor import to_words
from lightning_opt.compression.scaled_sign import pack_signs
from lightning_opt.triton_kernels.sign_pack import sign_pack
from lightning_opt.triton_kernels.topk_pack import topk_pack


@pytest.mark.parametrize(("n", "k"), [(1, 1), (100, 7), (2048, 2048), (5000, 50)])
@pytest.mark.parametrize("kind", ["normal", "equal", "few", "wide"])
def test_topk_pack_takes_the_largest_in_a_fixed_order(n, k, kind, device):
    v = torch.randn(n)
    if kind == "equal":
        v = v.sign()
    elif kind == "few":
        v[n // 50 :] = 0
    elif kind == "wide":
        v = v * 10.0 ** torch.randint(-38, 30, (n,))
    words = topk_pack(v.to(device), k).cpu()
    values, places = words[:k].view(torch.float32), words[k:].long()
    assert torch.equal(values, v[places])
    assert len(places.unique()) == k
    expected = v.abs().topk(k).values
    assert torch.equal(values.abs().sort(descending=True).values, expected)
    above = places[v[places].abs() > expected[-1]]
    ties = (v.abs() == expected[-1]).nonzero().squeeze(1)
    assert torch.equal(above, above.sort().values)
    assert torch.equal(places[len(above) :], ties[: k - len(above)])


@pytest.mark.parametrize("n", [1, 31, 32, 33, 5000])
def test_sign_pack_is_that_of_torch(n, device):
    v = torch.randn(n)
    v[0] = 0.0
    assert torch.equal(sign_pack(v.to(device)).cpu(), to_words(pack_signs(v)))


def test_error_feedback_is_that_of_torch(device):
    """Messages of the kernels hold the same entries, so the averaged gradients agree to rounding."""
    for make in (lambda b: TopK(ratio=0.05, backend=b), lambda b: ScaledSign(backend=b)):
        means = {}
        for backend in ("torch", "triton"):
            states = [
                CompressionState("econtrol", make(backend), eta=0.1, min_numel=1, rank=i, world_size=2, backend=backend)
                for i in range(2)
            ]
            generator = torch.Generator().manual_seed(0)
            for _ in range(4):
                gradients = [torch.randn(3000, generator=generator).to(device) for _ in range(2)]
                words = torch.stack([s.encode("w", g) for s, g in zip(states, gradients, strict=True)])
                finite = torch.tensor(True, device=device)
                mean = [s.decode("w", g, words, finite) for s, g in zip(states, gradients, strict=True)][0]
            broken = torch.full((3000,), torch.nan, device=device)
            states[0].decode("w", broken, words * 0, torch.tensor(False, device=device))
            means[backend] = mean.cpu(), states[0].memory["w"].error.cpu()
        torch.testing.assert_close(means["triton"], means["torch"], rtol=1e-5, atol=1e-5)


def test_a_backend_is_named():
    for make in (TopK, ScaledSign, lambda backend: CompressionState("ef14", TopK(), backend=backend)):
        with pytest.raises(ValueError, match="backend must be one of 'torch', 'triton'; got 'cuda'"):
            make(backend="cuda")


def test_the_kernels_compile_for_a_gpu():
    """Without one; in a process of its own, where the interpreter is off."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == dict.fromkeys(("digit_counts", "block_counts", "pack", "pack_bits"), 0)


def compile_all() -> dict[str, int]:
    """How often each kernel, compiled for sm_90, stores what does not fit into registers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_opt.triton_kernels import sign_pack, topk_pack

    i32, f32 = "*i32", "*fp32"
    kernels = {
        topk_pack.digit_counts: ({"vector": f32, "prefix": i32, "counts": i32, "n": "i32"}, {"SHIFT": 8}),
        topk_pack.block_counts: ({"vector": f32, "threshold": i32, "above": i32, "equal": i32, "n": "i32"}, {}),
        topk_pack.pack: (
            {"vector": f32, **dict.fromkeys(("threshold", "missing", "above", "equal", "words"), i32)}
            | {"n": "i32", "k": "i32"},
            {},
        ),
        sign_pack.pack_bits: ({"vector": f32, "words": i32, "n": "i32", "count": "i32"}, {"WORDS": 64}),
    }
    spilled = {}
    for kernel, (signature, constants) in kernels.items():
        constants = constants if "WORDS" in constants else {**constants, "BLOCK": 2048}
        source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        spilled[kernel.__name__] = compiled.asm["ptx"].count("st.local")
    return spilled


if __name__ == "__main__":
    print(json.dumps(compile_all()))
