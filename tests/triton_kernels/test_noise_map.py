"""The elementwise Triton kernels against formulas in doubles: compiled where there is a GPU, else interpreted."""

import pytest
import torch

from lightning_opt import diffusion, triton_kernels
from lightning_opt.diffusion import _fused, multiplicative_update, philox_normal
from lightning_opt.triton_kernels import launch_map
from lightning_opt.triton_kernels.exp_values import exp_values
from tests.reference.multiplicative import cases

CASES = cases()


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the Triton kernels on CPU tensors too, where only tests do."""
    monkeypatch.setattr(_fused, "cpu_kernels", triton_kernels)


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_formulas(case, device):
    # Exponents and logarithms up to 4, each of about five roundings of 6e-8, one more for the exponential; targets
    # of Hyvarinen's score divide by 0.02, which rtol covers.
    for actual, expected in zip(CASES[case].run(device, fused=True), CASES[case].expected(), strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["update rows", "step", "noising scaled edm"])
def test_low_precision_is_rounded_once(case, dtype, device):
    # an error of 3e-7 before rounding shows in an element of about 2,000 of float16
    for actual, expected in zip(CASES[case].run(device, dtype, fused=True), CASES[case].expected(dtype), strict=True):
        assert actual.dtype == dtype
        assert (actual.cpu() != expected.to(dtype)).sum() <= 4


@pytest.mark.parametrize("size", [1, 5, 512, 1027])
@pytest.mark.parametrize("key", [(0, 0), (2**64 - 1, 2**64 - 3), (2**31, 2**40)])
def test_noise_is_that_of_the_reference(size, key, device):
    zeros = torch.zeros(size, device=device)
    noise = multiplicative_update(zeros, noise=key, c=1.0, log_state=True, fused=True)
    torch.testing.assert_close(noise.cpu(), philox_normal((size,), key), rtol=1e-6, atol=1e-6)


def test_nan_stays_in_its_element(device):
    x, p = torch.ones(2, 300, device=device), torch.zeros(2, 300, device=device)
    x[0, 3], p[1, 7] = torch.nan, torch.nan
    for exp_impl in ("native", "poly"):
        y = multiplicative_update(x, p, b=1.0, noise=(1, 0), c=1.0, exp_impl=exp_impl, fused=True)
        assert y.isnan().nonzero().tolist() == [[0, 3], [1, 7]]


def test_overflow_and_underflow(device):
    p = torch.tensor([[200.0, 89.0, -200.0, torch.inf, -torch.inf]], device=device)
    for exp_impl in ("native", "poly"):
        y = multiplicative_update(torch.ones_like(p), p, b=1.0, exp_impl=exp_impl, fused=True)
        assert y.tolist() == [[torch.inf, torch.inf, 0.0, torch.inf, 0.0]]


def test_empty_tensors(device):
    empty = torch.empty(0, 3, device=device)
    assert multiplicative_update(empty, noise=(1, 2), c=1.0, fused=True).shape == (0, 3)


def test_numbers_on_the_device(device):
    x = torch.ones(4, 8, device=device)
    one, rows = torch.tensor(1.0, device=device), torch.arange(4.0, device=device)
    y = multiplicative_update(x, x, a=rows, b=one, log_state=True, fused=True)
    assert torch.equal(y, (rows + 2).reshape(4, 1).expand(4, 8))


@pytest.mark.parametrize("function", ["exp2", "exp"])
def test_exponentials_are_within_a_unit(function, device):
    from lightning_opt.cpu_kernels.exp_errors import exp_errors

    stride = 2**32 // 50_000
    values = exp_values(function, 0, 50_000, stride=stride, device=device).cpu()
    errors = exp_errors(function, 0, 50_000, stride=stride, values=values)
    # the interpreter rounds an fma twice; errors then reach 1.09
    assert 0.5 < errors.largest < (0.99 if device == "cuda" else 1.1)


def test_what_is_not_supported_is_refused(device):
    x = torch.zeros(3, device=device)
    with pytest.raises(TypeError, match="not float64"):
        launch_map("log_step", {"y": x}, [x.double()], {}, flags={})
    assert diffusion.log_step(x.double(), x, gain=1.0).state.dtype == torch.float64  # the reference does it
