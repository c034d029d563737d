"""The elementwise CPU kernels against formulas in doubles."""

import re

import pytest
import torch

from lightning_opt.cpu_kernels import launch_map
from lightning_opt.cpu_kernels._noise_map import _BLOCK, _ELEMENTS_A_THREAD, _compiled
from lightning_opt.cpu_kernels._philox import normals
from lightning_opt.diffusion import multiplicative_update, philox_normal
from tests.reference.multiplicative import cases

CASES = cases()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_formulas(case, fused):
    # Exponents and logarithms up to 4, each of about five roundings of 6e-8, one more for the exponential; targets
    # of Hyvarinen's score divide by 0.02, which rtol covers.
    for actual, expected in zip(CASES[case].run(fused=fused), CASES[case].expected(), strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["update rows", "step", "noising scaled edm"])
def test_low_precision_is_rounded_once(case, dtype, fused):
    # an error of 3e-7 before rounding shows in an element of about 2,000 of float16
    for actual, expected in zip(CASES[case].run("cpu", dtype, fused=fused), CASES[case].expected(dtype), strict=True):
        assert actual.dtype == dtype
        assert (actual != expected.to(dtype)).sum() <= 4


def noise(size: int, key: tuple[int, int]) -> torch.Tensor:
    return multiplicative_update(torch.zeros(size), noise=key, c=1.0, log_state=True, fused=True)


@pytest.mark.parametrize("size", [1, 2, 3, 5, _BLOCK - 1, _BLOCK, 3 * _BLOCK + 7])
@pytest.mark.parametrize("key", [(0, 0), (2**64 - 1, 2**64 - 3), (2**31, 2**40)])
def test_noise_is_that_of_the_reference(size, key):
    torch.testing.assert_close(noise(size, key), philox_normal((size,), key), rtol=1e-6, atol=1e-6)


def test_radius_and_angle_of_every_kind():
    """A million numbers: logarithms of all magnitudes from 2^-20 to 1, and all directions."""
    torch.testing.assert_close(noise(1 << 20, (1, 0)), philox_normal((1 << 20,), (1, 0)), rtol=1e-6, atol=1e-6)


def test_threads_make_no_difference():
    size, threads = 3 * _ELEMENTS_A_THREAD + 5, torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = noise(size, (3, 4))
        torch.set_num_threads(3)
        three = noise(size, (3, 4))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three)


def test_nan_stays_in_its_element():
    x, p = torch.ones(2, 300), torch.zeros(2, 300)
    x[0, 3], p[1, 7] = torch.nan, torch.nan
    for exp_impl in ("native", "poly"):
        y = multiplicative_update(x, p, b=1.0, noise=(1, 0), c=1.0, exp_impl=exp_impl, fused=True)
        assert y.isnan().nonzero().tolist() == [[0, 3], [1, 7]]


def test_overflow_and_underflow():
    p = torch.tensor([[200.0, 89.0, -200.0, torch.inf, -torch.inf]])
    for exp_impl in ("native", "poly"):
        y = multiplicative_update(torch.ones_like(p), p, b=1.0, exp_impl=exp_impl, fused=True)
        assert y.tolist() == [[torch.inf, torch.inf, 0.0, torch.inf, 0.0]]


def test_float16_takes_every_value_and_overflows_to_infinity():
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    assert torch.equal(multiplicative_update(x, log_state=True, fused=True).isnan(), x.isnan())
    kept = multiplicative_update(x[~x.isnan()], log_state=True, fused=True)
    assert torch.equal(kept, x[~x.isnan()])
    assert multiplicative_update(torch.tensor([6e4]).half(), a=0.5, fused=True).item() == torch.inf


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_loops_are_vectorized(dtype):
    """That of the update, and the two of the noise, of words and of numbers."""
    flags = {"prediction": True, "noise": True, "log_state": False, "poly": True}
    inputs = (("x", dtype), ("prediction", dtype))
    kernel = _compiled("multiplicative_update", tuple(flags.items()), inputs, (dtype,), ("a", "b", "c"), True)
    code = kernel.inspect_llvm()
    stored = {"float32": "float", "bfloat16": "i16", "float16": "half"}[dtype]
    assert re.search(rf"<(4|8|16) x {stored}>", code)
    [noise] = normals().inspect_llvm().values()
    assert re.search(r"mul nuw <\d+ x i64>", noise)
    assert re.search(r"call <\d+ x float> @llvm\.sqrt", noise)


def test_empty_tensors():
    assert multiplicative_update(torch.empty(0, 3), noise=(1, 2), c=1.0, fused=True).shape == (0, 3)


def test_float64_is_refused():
    with pytest.raises(TypeError, match="float32, bfloat16 and float16, not float64"):
        launch_map("log_step", {}, [torch.zeros(3, dtype=torch.float64)], {}, flags={})
