import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from lightning_opt.optim import EGPlusMinus, ExponentiatedSGD
from tests.reference.exponentiated import eg_plus_minus
from tests.reference.problems import naive_trajectory, noisy_quadratic, trajectory

settings = {"EGPlusMinus": [{"lr": 0.05}, {"lr": 1e-3, "budget": 1000.0, "momentum": 0.5}]}

FOREACH = pytest.mark.parametrize("foreach", [False, True])


def stepped(optimizer, gradient, steps):
    (p,) = optimizer.param_groups[0]["params"]
    for t in range(steps):
        p.grad = gradient(p.detach(), t)
        optimizer.step()
    return optimizer.state[p]


# --- closed forms ---


@FOREACH
def test_unnormalised_form_is_hypentropy(foreach):
    """p q = beta^2 / 4 never changes, so w = beta sinh(asinh(w / beta) - lr g) (Ghai et al., 2020)."""
    start, gradient = noisy_quadratic(100)
    ours = trajectory(lambda p: EGPlusMinus(p, lr=0.02, beta=0.3, foreach=foreach), start, gradient, 100)
    twin = trajectory(
        lambda p: ExponentiatedSGD(p, lr=0.02, variant="hyper", beta=0.3, max_log_step=None, fused=False),
        start,
        gradient,
        100,
    )
    # asinh cancels up to |w| / beta = 10 roundings a step for negative weights
    torch.testing.assert_close(ours, twin, rtol=0, atol=1e-12)


def test_product_of_the_parts_is_constant_and_their_difference_the_weight():
    start, gradient = noisy_quadratic(200)
    weight = nn.Parameter(start.clone())
    state = stepped(EGPlusMinus([weight], lr=0.05, beta=0.02), gradient, 200)
    torch.testing.assert_close(state["p"] * state["q"], torch.full_like(start, 0.02**2 / 4), rtol=1e-12, atol=0)
    assert torch.equal(state["p"] - state["q"], weight.detach())


def test_parts_of_a_small_or_negative_start_are_exact():
    weight = nn.Parameter(torch.tensor([0.0, 1e6, -1e6, 1e-12, -1.0], dtype=torch.float64))
    start = weight.detach().clone()
    state = stepped(EGPlusMinus([weight], lr=0.0, beta=1e-3), lambda w, t: torch.ones_like(w), 1)
    torch.testing.assert_close(state["p"] * state["q"], torch.full_like(start, 1e-6 / 4), rtol=1e-13, atol=0)
    torch.testing.assert_close(weight.detach(), start, rtol=1e-15, atol=1e-18)


@FOREACH
def test_budget_bounds_the_one_norm(foreach):
    start, gradient = noisy_quadratic(100)
    budget = 0.5
    start = 0.4 * start / start.abs().sum()
    weight = nn.Parameter(start.clone())
    optimizer = EGPlusMinus([weight], lr=0.05, budget=budget, foreach=foreach)
    for t in range(100):
        state = stepped(optimizer, lambda w, _, t=t: gradient(w, t), 1)
        assert (state["p"] + state["q"]).sum().item() == pytest.approx(budget, rel=1e-14)
        assert weight.abs().sum() <= budget * (1 + 1e-14)
    assert weight.abs().sum() > 0.9 * budget  # the minimum is far outside


def test_budget_holds_for_each_tensor_alone():
    p = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2, 3))]
    optimizer = EGPlusMinus(p, lr=0.5, budget=2.0, foreach=True)
    for x in p:
        x.grad = torch.randn(x.shape)
    optimizer.step()
    for x in p:
        assert (optimizer.state[x]["p"] + optimizer.state[x]["q"]).sum().item() == pytest.approx(2.0, rel=1e-6)


def test_first_normalised_step():
    """From p = q = U / 2d: w_i = U / Z sinh(-lr g_i), Z = sum cosh."""
    g = torch.tensor([1.0, -0.5, 0.0], dtype=torch.float64)
    path = trajectory(lambda p: EGPlusMinus(p, lr=0.7, budget=3.0), torch.zeros(3).double(), lambda w, t: g, 1)
    torch.testing.assert_close(path[1], 3.0 * (-0.7 * g).sinh() / (0.7 * g).cosh().sum(), rtol=1e-14, atol=1e-17)


@FOREACH
@pytest.mark.parametrize("budget", [None, 40.0])
def test_follows_the_naive_reference(budget, foreach):
    start, gradient = noisy_quadratic(50)
    weight = nn.Parameter(start.clone())
    begin = stepped(EGPlusMinus([weight], lr=0.0, budget=budget, beta=0.1), gradient, 1)
    parts = {name: begin[name].numpy().copy() for name in ("p", "q")}
    ours = trajectory(lambda p: EGPlusMinus(p, lr=0.02, budget=budget, beta=0.1, foreach=foreach), start, gradient, 50)
    naive = naive_trajectory(partial(eg_plus_minus, lr=0.02, budget=budget, **parts), start, gradient, 50)
    torch.testing.assert_close(ours, naive, rtol=0, atol=1e-13)


def test_momentum_accumulates_the_gradient():
    start, g = torch.zeros(2).double(), torch.tensor([0.3, -0.2], dtype=torch.float64)
    path = trajectory(lambda p: EGPlusMinus(p, lr=0.1, momentum=0.5, beta=2.0), start, lambda w, t: g, 3)
    torch.testing.assert_close(path[3], 2 * (-0.1 * g * (1 + 1.5 + 1.75)).sinh(), rtol=1e-14, atol=0)


@FOREACH
@pytest.mark.parametrize("budget", [None, 5.0])
def test_a_huge_gradient_moves_the_parts_by_the_guarded_factor(budget, foreach):
    """Unguarded, e^300 overflows float32: the weight would be NaN."""
    weight = nn.Parameter(torch.tensor([1.0, -1.0]))
    optimizer = EGPlusMinus([weight], lr=1.0, budget=budget, beta=0.1, max_log_step=0.5, foreach=foreach)
    weight.grad = torch.zeros(2)
    optimizer.step()
    p, q = (optimizer.state[weight][name].clone() for name in ("p", "q"))
    weight.grad = torch.tensor([300.0, -300.0])
    optimizer.step()
    up, down = torch.tensor([-0.5, 0.5]).exp(), torch.tensor([0.5, -0.5]).exp()
    scale = 1.0 if budget is None else budget / (p * up + q * down).sum()
    torch.testing.assert_close(weight.detach(), scale * (p * up - q * down), rtol=1e-6, atol=1e-6)


@FOREACH
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_infinite_gradient_is_seen(momentum, foreach):
    """Clamped, it would be a step like any other."""
    weight = nn.Parameter(torch.tensor([1.0, -1.0]))
    optimizer = EGPlusMinus([weight], lr=0.1, momentum=momentum, max_log_step=0.5, foreach=foreach)
    weight.grad = torch.tensor([math.inf, 0.1])
    optimizer.step()
    assert weight[0].isnan()
    assert weight[1].isfinite()


# --- published effect ---


def test_few_relevant_inputs_are_found_among_many():
    """5 relevant of 1000 inputs, 200 samples: at most 1/20 of the excess risk of gradient descent at its best rate."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, generator=generator):
            return torch.randn(*shape, generator=generator)

        x, truth = draw(200, 1000), torch.zeros(1000)
        truth[:5] = draw(5).sign() * (1 + torch.rand(5, generator=generator))
        y = x @ truth + 0.05 * draw(200)

        def excess_risk(optimizer, x=x, y=y, truth=truth):
            (w,) = optimizer.param_groups[0]["params"]
            best = math.inf
            for t in range(600):
                w.grad = x.T @ (x @ w.detach() - y) / 200
                optimizer.step()
                if t % 10 == 9:
                    best = min(best, (w.detach() - truth).square().sum().item())
            return best

        def parameter():
            return [nn.Parameter(torch.zeros(1000))]

        gd = min(excess_risk(torch.optim.SGD(parameter(), lr=lr)) for lr in (0.01, 0.03, 0.1))
        ours = excess_risk(EGPlusMinus(parameter(), lr=0.1))
        assert ours < gd / 20


# --- state ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"budget": 50.0}, {"state_dtype": "bfloat16"}, {"stochastic_rounding": True}], ids=str
)
def test_checkpoint_continues_bit_for_bit(options, dtype):
    start, gradient = noisy_quadratic(20)
    start = start.to(dtype)

    def noise(w, t):
        return gradient(w.double(), t).to(dtype)

    whole = trajectory(lambda p: EGPlusMinus(p, lr=0.05, **options), start, noise, 20)
    weight = nn.Parameter(start.clone())
    first = EGPlusMinus([weight], lr=0.05, **options)
    stepped(first, noise, 10)
    second = EGPlusMinus([weight], lr=0.05, **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for t in range(10, 20):
        weight.grad = noise(weight.detach(), t)
        second.step()
    assert torch.equal(weight.detach(), whole[20])


def test_parts_of_other_weights_are_refused():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    first = EGPlusMinus([weight], lr=0.1)
    stepped(first, lambda w, t: torch.ones_like(w), 1)
    other = nn.Parameter(torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="parameter 0 is not the difference of the loaded parts p and q"):
        EGPlusMinus([other]).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="parameter encoder is not the difference"):
        EGPlusMinus([("encoder", other)]).load_state_dict(first.state_dict())


# --- options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr must be >= 0.0 and finite, got -0.1"),
        ({"budget": 0.0}, "budget must be > 0.0 and finite, got 0.0"),
        ({"budget": -1.0}, "budget must be > 0.0 and finite, got -1.0"),
        ({"momentum": -0.1}, "momentum must be >= 0.0 and finite, got -0.1"),
        ({"max_log_step": 0.0}, "max_log_step must be > 0.0 and finite, got 0.0"),
        ({"beta": 0.0}, "beta must be > 0.0 and finite, got 0.0"),
    ],
)
def test_wrong_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EGPlusMinus([nn.Parameter(torch.zeros(2))], **options)


def test_weights_above_the_budget_are_refused():
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"shape \(2,\) has 1-norm 3, above budget=2.5"):
        EGPlusMinus([weight], budget=2.5).step()


def test_complex_parameters_and_fused_are_refused():
    with pytest.raises(ValueError, match="does not support complex parameters"):
        EGPlusMinus([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(RuntimeError, match="these options have no fused kernel"):
        EGPlusMinus([nn.Parameter(torch.ones(2))], fused=True)
