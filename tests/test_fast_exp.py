"""The polynomials of exp2 and exp in plain torch, and the same arithmetic as numba compiles it."""

import math

import pytest
import torch
from torch import Tensor

from lightning_opt.cpu_kernels.exp_errors import ExpErrors, exp_errors
from lightning_opt.fast_exp import EXP2_COEFFICIENTS, EXP_COEFFICIENTS, LN2_HIGH, LN2_LOW, fast_exp, fast_exp2

STRIDE = 9973  # a prime, so that all exponents and all low bits are met: 430,666 inputs
TOTAL = -(-(2**32) // STRIDE)
FUNCTIONS = {"exp2": fast_exp2, "exp": fast_exp}
LARGEST = {"exp2": 0.87, "exp": 0.99}  # over all inputs: benchmarks/results/exp_ulp.json


def floats(first: int = 0, count: int = TOTAL, stride: int = STRIDE) -> Tensor:
    """The float32 numbers of some bit patterns."""
    patterns = torch.arange(first, first + count * stride, stride)
    return (patterns - (patterns >> 31 << 32)).int().view(torch.float32)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_reference_and_cpu_kernel_are_within_a_unit_over_all_exponents(function):
    values = FUNCTIONS[function](floats())
    for errors in (
        exp_errors(function, 0, TOTAL, stride=STRIDE),
        exp_errors(function, 0, TOTAL, stride=STRIDE, values=values),
    ):
        assert errors.inputs == TOTAL
        assert 0.5 < errors.largest < LARGEST[function]  # a half is the least for rounded numbers
        assert errors.at_least_one == 0


def test_the_judge_finds_what_is_wrong():
    x = floats(0x3F000000, 1000, 1)
    true = x.double().exp()
    unit = 2.0**-23
    assert exp_errors("exp", 0x3F000000, 1000, values=true.float()).largest <= 0.5
    wrong = true.float()
    wrong[10] += unit
    wrong[20] -= 3 * unit
    errors = exp_errors("exp", 0x3F000000, 1000, values=wrong)
    assert errors.at_least_one >= 1
    assert 2.5 <= errors.largest <= 3.5
    assert errors.where == x[20].item()
    for value in (math.nan, math.inf):
        assert exp_errors("exp", 0x3F000000, 1, values=torch.tensor([value])).largest == math.inf
    assert exp_errors("exp2", 0x43000000, 1, values=torch.tensor([3e38])).largest == math.inf  # 2^128
    assert exp_errors("exp2", 0x7FC00000, 1, values=torch.tensor([1.0])).largest == math.inf  # NaN
    with pytest.raises(ValueError, match="values must be 2 numbers of float32"):
        exp_errors("exp2", 0, 2, values=torch.zeros(3))


def test_errors_of_parts_are_joined():
    first, second = ExpErrors(10, 0.5, 1.0, 0), ExpErrors(20, 1.5, -2.0, 3)
    assert first.joined(second) == second.joined(first) == ExpErrors(30, 1.5, -2.0, 3)


def test_exp2_is_exact_at_integers():
    n = torch.arange(-149, 128)
    assert torch.equal(fast_exp2(n.float()).double(), 2.0 ** n.double())


def test_exp2_is_monotone():
    """As it is over all float32 from 1e-6 to 4 in size; here on runs of neighbors."""
    for first in range(0x3580_0000, 0x4080_0000, 0x0010_1010):
        steps = fast_exp2(floats(first, 1000, 1)).diff()
        assert (steps >= 0).all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_special_values(function):
    inf, nan = math.inf, math.nan
    x = torch.tensor([nan, inf, -inf, 0.0, -0.0, 1e-40, -1e-40, 1e30, -1e30])
    expected = torch.tensor([nan, inf, 0.0, 1.0, 1.0, 1.0, 1.0, inf, 0.0])
    torch.testing.assert_close(FUNCTIONS[function](x), expected, rtol=0, atol=0, equal_nan=True)


def test_overflow_and_subnormal_results():
    below = 128 - 2.0**-17  # the float32 before 128
    assert fast_exp2(torch.tensor([below, 128.0])).tolist() == [pytest.approx(2.0**below, rel=2**-23), math.inf]
    below, above = torch.tensor([88.72283, 88.72284]).double().tolist()  # around log(max)
    assert fast_exp(torch.tensor([below, above])).tolist() == [pytest.approx(math.exp(below), rel=2**-23), math.inf]
    x = torch.linspace(-150.0, -126.0, 4001)
    assert ((fast_exp2(x).double() - 2 ** x.double()).abs() <= 0.87 * 2.0**-149).all()


def test_coefficients_are_float32_numbers():
    for c in (*EXP2_COEFFICIENTS, *EXP_COEFFICIENTS, LN2_HIGH, LN2_LOW):
        assert torch.tensor(c).item() == c
    assert abs(LN2_HIGH + LN2_LOW - math.log(2)) < 2**-36
    assert EXP2_COEFFICIENTS[-1] == pytest.approx(math.log(2), rel=1e-7)  # the derivative at 0


@pytest.mark.parametrize(("function", "factor"), [("exp2", math.log(2)), ("exp", 1.0)])
def test_derivatives(function, factor):
    x = torch.tensor([-2.0, 0.3, 5.0], requires_grad=True)
    y = FUNCTIONS[function](x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(first, factor * y)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, factor**2 * y.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="x must be float32, got"):
        fast_exp(torch.zeros(2, dtype=dtype))
