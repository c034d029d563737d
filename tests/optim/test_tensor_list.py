import copy

import pytest
import torch

from lightning_opt.optim._tensor_list import TensorList, select

SHAPES = [(3,), (2, 2), ()]


def lists(*seeds):
    out = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        out.append(TensorList(torch.rand(s, generator=generator, dtype=torch.float64) + 0.5 for s in SHAPES))
    return out


OPERATIONS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "pow": lambda a, b: a**b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "neg": lambda a, b: -a + b,
    "sqrt": lambda a, b: a.sqrt() + b,
    "sigmoid, no foreach": lambda a, b: (a * b).asinh().sinh(),
    "maximum": lambda a, b: a.maximum(b * 1.0) if not isinstance(b, float) else a.clamp_min(b),
    "clamp": lambda a, b: a.clamp(0.6, 1.0) + b,
    "chain": lambda a, b: (2.0 * a + b * b) / (a.abs() + 1.0) - a.sign(),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("other", ["list", "number", "tensor"])
def test_computes_as_each_tensor_alone(name, other):
    a, b = lists(0, 1)
    operation = OPERATIONS[name]
    if other == "list":
        expected = [operation(x, y) for x, y in zip(a.tensors, b.tensors, strict=True)]
        got = operation(a, b)
    else:
        operand = 0.75 if other == "number" else torch.tensor(0.75, dtype=torch.float64)
        expected, got = [operation(x, operand) for x in a.tensors], operation(a, operand)
    assert isinstance(got, TensorList)
    for x, y in zip(got.tensors, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("number", [0.75, torch.tensor(0.75, dtype=torch.float64)], ids=["number", "tensor"])
def test_numbers_may_stand_on_the_left(number):
    (a,) = lists(0)
    for operation in (
        lambda x: number + x,
        lambda x: number - x,
        lambda x: number * x,
        lambda x: number / x,
        lambda x: number**x,
    ):
        for x, y in zip(operation(a).tensors, map(operation, a.tensors), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-15, atol=0)


def test_methods_in_place_change_the_tensors_and_return_the_list():
    a, b = lists(0, 1)
    originals, values = list(a.tensors), [t.clone() for t in a.tensors]
    out = a.mul_(0.5).add_(0.25 * b).sub_(b * b).sqrt_().copy_(a.maximum(b))
    assert out is a
    for original, value, now, y in zip(originals, values, a.tensors, b.tensors, strict=True):
        assert now is original
        expected = (value * 0.5 + 0.25 * y - y * y).sqrt()
        torch.testing.assert_close(now, expected.maximum(y), rtol=1e-15, atol=0, equal_nan=True)


def test_reductions_give_a_scalar_for_each_tensor():
    (a,) = lists(0)
    assert [t.item() for t in a.sum().tensors] == [t.sum().item() for t in a.tensors]
    scaled = a * (1.0 / a.sum())
    for t in scaled.tensors:
        assert t.sum().item() == pytest.approx(1.0)


def test_select_chooses_by_bool_tensor_and_list():
    assert (select(True, 1, 2), select(False, 1, 2)) == (1, 2)
    assert torch.equal(select(torch.tensor([True, False]), 1.0, torch.tensor([5.0, 6.0])), torch.tensor([1.0, 6.0]))
    a, b = lists(0, 1)
    chosen = select(a > b, a, 0.0)
    for c, x, y in zip(chosen.tensors, a.tensors, b.tensors, strict=True):
        assert torch.equal(c, torch.where(x > y, x, 0.0))


def test_lists_of_different_lengths_are_refused():
    a, b = lists(0, 1)
    with pytest.raises(ValueError, match="zip"):
        _ = a > TensorList(b.tensors[:2])


def test_can_be_copied():
    (a,) = lists(0)
    b = copy.deepcopy(a)
    assert torch.equal(a.tensors[0], b.tensors[0])
    assert a.tensors[0] is not b.tensors[0]
