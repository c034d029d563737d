import copy
import math

import pytest
import torch
from torch import nn

from lightning_opt.optim import AdaBelief, Lion
from lightning_opt.optim._rounding import round_stochastically, store, stream

N = 100_000


def rounded(value, n=N, step=1, tensor=0, slot=0):
    return round_stochastically(torch.full((n,), value), stream(step, tensor, slot)).double()


@pytest.mark.parametrize("value", [1 + 2**-8, 1 + 2**-10, -(1 + 3 * 2**-9), 1e-30 * (1 + 2**-8), 3.14159, -1e30])
def test_mean_is_the_value_and_results_are_its_neighbors(value):
    x = torch.tensor(value)
    near = x.to(torch.bfloat16).double().item()
    spacing = 2.0 ** (math.floor(math.log2(abs(value))) - 7)
    results = rounded(value)
    assert set(results.unique().tolist()) <= {near - spacing, near, near + spacing}
    assert results.unique().numel() == 2
    low = results.min().item()
    chance = (x.double().item() - low) / spacing
    error = math.sqrt(chance * (1 - chance) / N)  # of the share that is rounded up
    assert ((results > low).double().mean().item() - chance) / error == pytest.approx(0, abs=4)


def test_representable_values_infinities_and_nan_stay():
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-126, 3.3895e38, math.inf, -math.inf, math.nan])
    x[5] = torch.finfo(torch.bfloat16).max
    for step in range(20):
        out = round_stochastically(x, stream(step, 0, 0))
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), x, rtol=0, atol=0, equal_nan=True)
        assert torch.signbit(out[1])


def test_bits_differ_between_steps_tensors_slots_and_elements():
    draws = [
        rounded(1 + 2**-8, step=s, tensor=t, slot=k) > 1 for s, t, k in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]
    ]
    draws.append(draws[0].roll(1))
    for i, a in enumerate(draws):
        for b in draws[:i]:
            # independent fair bits agree half of the time, with a standard error of 0.0016
            assert (a == b).double().mean().item() == pytest.approx(0.5, abs=0.007)


def test_sequence_over_steps_is_fair_for_each_element():
    ups = sum((rounded(1 + 2**-8, n=1000, step=s) > 1).double() for s in range(400))
    # binomial(400, 1/2): standard deviation 10, and its spread over 1000 elements known to 2.2%
    assert ups.std().item() == pytest.approx(10, rel=0.1)
    assert (ups - 200).abs().max() < 50


def test_key_is_the_same_for_numbers_and_tensors():
    assert stream(torch.tensor(7.0), 3, 2).item() == stream(7.0, 3, 2) == stream(7, 3, 2)


def test_store_rounds_only_where_asked_and_possible():
    value = torch.full((1000,), 1 + 2**-10)
    key = stream(1, 0, 0)
    target = torch.empty(1000, dtype=torch.bfloat16)
    store(target, value, None)
    assert torch.equal(target, torch.ones(1000, dtype=torch.bfloat16))  # to nearest
    store(target, value, key)
    assert 0 < (target > 1).sum() < 1000
    for dtype in (torch.float32, torch.float16):  # only bfloat16 is rounded stochastically
        target = torch.empty(1000, dtype=dtype)
        store(target, value, key)
        assert torch.equal(target, value.to(dtype))


def test_layout_in_memory_does_not_lose_values():
    value = torch.randn(6, 50)
    target = torch.empty(50, 6, dtype=torch.bfloat16).t()
    store(target, value.t().contiguous().t(), stream(1, 0, 0))
    assert (target.float() - value).abs().max() <= 2**-7 * value.abs().max()


@pytest.mark.parametrize("optimizer", [AdaBelief, Lion])
def test_no_random_state_is_used_and_a_resumed_run_draws_the_same_bits(optimizer, backend):
    grads = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).bfloat16()

    def run(optimizer, p, steps):
        for t in steps:
            p.grad = grads[t]
            optimizer.step()

    def make(p):
        return optimizer([p], lr=1e-3, stochastic_rounding=True, state_dtype="bfloat16", **backend)

    p = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    random_state = torch.get_rng_state()
    whole = make(p)
    run(whole, p, range(20))
    assert torch.equal(torch.get_rng_state(), random_state)

    q = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    first = make(q)
    run(first, q, range(10))
    second = make(q)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, q, range(10, 20))
    assert torch.equal(p, q)
    for name, value in whole.state[p].items():
        assert torch.equal(value, second.state[q][name])


def test_stochastic_rounding_follows_float32_on_average(backend):
    """300 steps of 1e-3 on bfloat16 weights of 1: to nearest they stay, stochastically they move as float32 does."""
    ends = {}
    for name, dtype, stochastic in (
        ("float32", torch.float32, False),
        ("nearest", torch.bfloat16, False),
        ("stochastic", torch.bfloat16, True),
    ):
        p = nn.Parameter(torch.ones(4000, dtype=dtype))
        optimizer = Lion([p], lr=1e-3, stochastic_rounding=stochastic, **backend)
        for _ in range(300):
            p.grad = torch.ones_like(p)
            optimizer.step()
        ends[name] = p.detach().float().mean().item()
    assert ends["float32"] == pytest.approx(0.7, rel=1e-5)
    assert ends["nearest"] == 1.0
    # sums of 300 steps of 2^-8 with chance 0.256: deviation 2^-8 * 7.6 = 0.03, of the mean of 4000 weights 0.0005
    assert ends["stochastic"] == pytest.approx(0.7, abs=0.002)
