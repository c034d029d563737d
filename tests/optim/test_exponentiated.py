import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt.optim import ExponentiatedAdamW, ExponentiatedSGD, eg_param_groups
from tests.reference.exponentiated import adamw_eg, eg, gd_sign, hypentropy
from tests.reference.problems import naive_trajectory, noisy_quadratic, trajectory

settings = {
    "ExponentiatedSGD": [
        {"lr": 0.1},
        {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
        {"lr": 0.03, "momentum": 0.9, "variant": "gd_sign"},
        {"lr": 0.03, "variant": "hyper", "beta": 0.1},
    ],
    "ExponentiatedAdamW": [{"lr": 0.03}, {"lr": 0.03, "amsgrad": True, "weight_decay": 0.1}],
}

EXACT = {"max_log_step": None, "min_abs": 0.0}  # without our guards: the reference code's numbers


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- closed forms ---


def test_constant_gradient_moves_the_logarithm_evenly(backend):
    start, g, lr, steps = double(0.5, -2.0, 3.0, 0.0), double(0.3, -0.7, -1.0, 2.0), 0.1, 40
    path = trajectory(lambda p: ExponentiatedSGD(p, lr=lr, **backend), start, lambda w, t: g, steps)
    expected = start * torch.exp(-lr * start.sign() * g * steps)
    torch.testing.assert_close(path[-1], expected, rtol=1e-13, atol=0)  # 40 roundings; zero stays exactly zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lr", [1e-2, 1e6])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (ExponentiatedSGD, {"momentum": 0.9, "weight_decay": 0.1}),
        (ExponentiatedSGD, {"variant": "gd_sign"}),
        (ExponentiatedAdamW, {"weight_decay": 0.0}),
    ],
)
def test_signs_never_change_and_zero_stays_zero(optimizer, options, lr, dtype):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(200, generator=generator).to(dtype)
    if options.get("variant") != "gd_sign":  # plain gradient descent moves zeros
        start[:20] = 0
    grads = torch.randn(200, 200, generator=generator).to(dtype)
    p = nn.Parameter(start.clone())
    o = optimizer([p], lr=lr, foreach=True, **options)
    for g in grads:
        p.grad = g
        o.step()
    assert torch.equal(p.detach().sign(), start.sign())  # also of infinity, which a walk at 1e6 reaches
    assert (start[p.detach() == 0] == 0).all()
    alive = p.detach().float().abs()[start != 0]
    assert alive.min() >= 0.99e-18  # min_abs, rounded to the dtype


@pytest.mark.parametrize("optimizer", [ExponentiatedSGD, ExponentiatedAdamW])
def test_signs_never_change_in_the_fused_kernels_either(optimizer):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(200, generator=generator)
    start[:20] = 0
    p = nn.Parameter(start.clone())
    o = optimizer([p], lr=1e3, fused=True, weight_decay=0.0)
    for g in torch.randn(100, 200, generator=generator):
        p.grad = g
        o.step()
    assert torch.equal(p.detach().sign(), start.sign())


def test_small_rates_follow_the_logistic_curve_to_first_order():
    """f = (w - a)^2 / 2: w(T) = a / (1 + (a / w0 - 1) exp(-a T))."""
    w0, a, time = 0.2, 1.5, 3.0
    exact = a / (1 + (a / w0 - 1) * math.exp(-a * time))
    errors = []
    for lr in (0.1, 0.01, 0.001):
        path = trajectory(
            lambda p, lr=lr: ExponentiatedSGD(p, lr=lr, fused=False), double(w0), lambda w, t: w - a, round(time / lr)
        )
        errors.append(abs(path[-1].item() - exact))
    assert errors == pytest.approx([1.8e-2, 1.8e-3, 1.8e-4], rel=0.1)
    assert all(8 < coarse / fine < 12 for coarse, fine in zip(errors, errors[1:], strict=False))


def test_weight_decay_alone_shrinks_both_signs_alike(backend):
    start, zero = double(2.0, -0.5), torch.zeros(2).double()
    path = trajectory(lambda p: ExponentiatedSGD(p, lr=0.1, weight_decay=0.3, **backend), start, lambda w, t: zero, 30)
    torch.testing.assert_close(path[-1], start * math.exp(-0.1 * 0.3 * 30), rtol=1e-13, atol=0)


def test_first_step_of_adamw(backend):
    start, g, lr, decay, eps = double(2.0, -0.5, 1.0), double(0.3, 4.0, -1e-3), 0.1, 0.2, 1e-8
    path = trajectory(
        lambda p: ExponentiatedAdamW(p, lr=lr, weight_decay=decay, eps=eps, **backend), start, lambda w, t: g, 1
    )
    expected = start * (1 - lr * decay) * torch.exp(-lr * start.sign() * g / (g.abs() + eps))
    torch.testing.assert_close(path[1], expected, rtol=1e-14, atol=0)


def test_step_is_mirror_descent():
    """The mirror variable sign(w) log|w| moves by exactly -lr * g."""
    start, gradient = noisy_quadratic(50)
    path = trajectory(lambda p: ExponentiatedSGD(p, lr=0.05, fused=False), start, gradient, 50)
    mirror = path.sign() * path.abs().log()
    for t in range(50):
        # a step of the logarithm is one rounding of the weight, and of the logarithm, of up to 5
        torch.testing.assert_close(mirror[t + 1] - mirror[t], -0.05 * gradient(path[t], t), rtol=0, atol=5e-15)


def test_hypentropy_lies_between_exponentiated_gradient_and_sgd():
    start, gradient = noisy_quadratic(30)

    def hyper(lr, beta):
        return trajectory(
            lambda p: ExponentiatedSGD(p, lr=lr, variant="hyper", beta=beta, fused=False), start, gradient, 30
        )

    sgd = trajectory(lambda p: torch.optim.SGD(p, lr=0.02), start, gradient, 30)
    plain = trajectory(lambda p: ExponentiatedSGD(p, lr=0.02, max_log_step=None, fused=False), start, gradient, 30)
    # asinh(x) = x up to x^3 / 6 for x = w / beta of at most 4e-6, but cancels digits: 1e6 roundings of 1e-16 a step
    torch.testing.assert_close(hyper(0.02 / 1e6, 1e6), sgd, rtol=0, atol=1e-8)
    # while |w| >> beta both have the same mirror variable up to beta^2 / w^2
    far = (start.abs() > 0.1) & (plain.abs().amin(dim=0) > 0.1)
    torch.testing.assert_close(hyper(0.02, 1e-7)[:, far], plain[:, far], rtol=0, atol=1e-10)
    assert far.sum() > 5


# --- independent implementations ---

SGD_OPTIONS = [
    {},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.9, "dampening": 0.5},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
]
VARIANTS = {"eg": eg, "gd_sign": gd_sign, "hyper": partial(hypentropy, beta=0.1)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
def test_sgd_follows_the_naive_reference(options, variant, plain_backend):
    start, gradient = noisy_quadratic(50)
    exact = {**EXACT, "min_abs": 1e-18 if variant == "gd_sign" else 0.0}
    ours = trajectory(
        lambda p: ExponentiatedSGD(p, lr=0.02, variant=variant, beta=0.1, **options, **exact, **plain_backend),
        start,
        gradient,
        50,
    )
    naive = naive_trajectory(partial(VARIANTS[variant], lr=0.02, **options), start, gradient, 50)
    # 50 steps of a few roundings each, which the curved maps may amplify tenfold
    torch.testing.assert_close(ours, naive, rtol=0, atol=2e-13)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0}, {"amsgrad": True, "betas": (0.5, 0.9)}], ids=str)
def test_adamw_follows_the_naive_reference(options, backend):
    start, gradient = noisy_quadratic(50)
    ours = trajectory(lambda p: ExponentiatedAdamW(p, lr=0.02, **options, **EXACT, **backend), start, gradient, 50)
    naive = naive_trajectory(partial(adamw_eg, lr=0.02, **options), start, gradient, 50)
    torch.testing.assert_close(ours, naive, rtol=0, atol=2e-13)


def test_float32_agrees_as_well():
    start, gradient = noisy_quadratic(20)
    for optimizer, naive in ((ExponentiatedSGD, eg), (ExponentiatedAdamW, adamw_eg)):
        ours = trajectory(
            lambda p, o=optimizer: o(p, lr=0.02, **EXACT, fused=False),
            start.float(),
            lambda w, t: gradient(w.double(), t).float(),
            20,
        )
        exact = naive_trajectory(partial(naive, lr=0.02), start, gradient, 20)
        torch.testing.assert_close(ours[-1].double(), exact[-1], rtol=2e-6, atol=0)  # 20 steps of a rounding of 6e-8


@pytest.mark.parametrize("nesterov", [False, True])
def test_additive_groups_take_sgd_steps(nesterov, plain_backend):
    start, gradient = noisy_quadratic(50)
    options = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    ours = trajectory(lambda p: ExponentiatedSGD(p, additive=True, **options, **plain_backend), start, gradient, 50)
    sgd = trajectory(lambda p: torch.optim.SGD(p, **options), start, gradient, 50)
    torch.testing.assert_close(ours, sgd, rtol=0, atol=1e-14)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_additive_groups_take_adamw_steps(amsgrad, backend):
    start, gradient = noisy_quadratic(50)
    options = {"lr": 0.02, "weight_decay": 0.1, "amsgrad": amsgrad}
    ours = trajectory(lambda p: ExponentiatedAdamW(p, additive=True, **options, **backend), start, gradient, 50)
    adamw = trajectory(lambda p: torch.optim.AdamW(p, **options), start, gradient, 50)
    torch.testing.assert_close(ours, adamw, rtol=0, atol=1e-14)


# --- guards ---


def test_exponent_is_clamped(backend):
    start, g = double(1.0, -1.0), double(-1e6, -1e6)
    path = trajectory(lambda p: ExponentiatedSGD(p, lr=1.0, max_log_step=0.5, **backend), start, lambda w, t: g, 1)
    torch.testing.assert_close(path[1], double(math.exp(0.5), -math.exp(-0.5)), rtol=1e-14, atol=0)
    path = trajectory(
        lambda p: ExponentiatedAdamW(p, lr=1.0, weight_decay=0.0, max_log_step=0.5, **backend), start, lambda w, t: g, 1
    )
    torch.testing.assert_close(path[1], double(math.exp(0.5), -math.exp(-0.5)), rtol=1e-14, atol=0)


def test_weights_do_not_die_at_the_bottom(backend):
    """1e-18 can grow again; what underflows to zero cannot."""
    p = nn.Parameter(torch.tensor([1e-30, -1e-3]))
    optimizer = ExponentiatedSGD([p], lr=10.0, **backend)
    for sign in (1.0, -1.0):
        for _ in range(60):
            p.grad = sign * p.detach().sign()
            optimizer.step()
    torch.testing.assert_close(p.detach(), 1e-18 * math.exp(60) * p.detach().sign(), rtol=1e-4, atol=0)


def test_dead_parameters_are_named_once():
    net = nn.Linear(3, 2)
    nn.init.zeros_(net.bias)
    optimizer = ExponentiatedSGD(net.named_parameters(), lr=0.1, fused=False)
    net(torch.ones(1, 3)).sum().backward()
    with pytest.warns(UserWarning, match=r"zero throughout: bias\. Put them into an additive group"):
        optimizer.step()
    optimizer.step()  # where a warning would be an error
    assert torch.equal(net.bias.detach(), torch.zeros(2))

    with pytest.warns(UserWarning, match=r"zero throughout: 1 of group 0\."):  # without names
        ExponentiatedAdamW(net.parameters()).step()


def test_groups_for_a_module_need_no_warning():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    nn.init.zeros_(net[2].weight)
    optimizer = ExponentiatedAdamW(ExponentiatedAdamW.param_groups_for(net), lr=0.1, fused=False)
    assert [group["param_names"] for group in optimizer.param_groups] == [
        [name for name, _ in group["params"]] for group in eg_param_groups(net)
    ]
    net(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    assert net[2].weight.abs().min() > 0.09  # an additive step of lr from zero


# --- options ---


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (ExponentiatedSGD, {"lr": -1.0}, "lr must be >= 0.0 and finite, got -1.0"),
        (ExponentiatedSGD, {"momentum": -0.1}, "momentum must be >= 0.0 and finite, got -0.1"),
        (ExponentiatedSGD, {"dampening": -0.1}, "dampening must be >= 0.0 and finite, got -0.1"),
        (ExponentiatedSGD, {"weight_decay": -0.1}, "weight_decay must be >= 0.0 and finite, got -0.1"),
        (ExponentiatedSGD, {"beta": 0.0}, "beta must be > 0.0 and finite, got 0.0"),
        (ExponentiatedSGD, {"variant": "egg"}, "variant must be one of 'eg', 'gd_sign', 'hyper'; got 'egg'"),
        (ExponentiatedSGD, {"nesterov": True}, "nesterov=True needs momentum > 0 and dampening = 0"),
        (ExponentiatedSGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov=True needs"),
        (ExponentiatedSGD, {"max_log_step": 0.0}, "max_log_step must be > 0.0 and finite, got 0.0"),
        (ExponentiatedSGD, {"min_abs": -1.0}, "min_abs must be >= 0.0 and finite, got -1.0"),
        (ExponentiatedSGD, {"min_abs": 1e-40}, "min_abs=1e-40 vanishes in torch.float32"),
        (ExponentiatedAdamW, {"lr": math.nan}, "lr must be >= 0.0 and finite, got nan"),
        (ExponentiatedAdamW, {"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0.0, 1.0\), got 1.0"),
        (ExponentiatedAdamW, {"eps": -1.0}, "eps must be >= 0.0 and finite, got -1.0"),
        (ExponentiatedAdamW, {"lr": 2.0, "weight_decay": 0.5}, "lr \\* weight_decay must be below 1, got 1.0"),
    ],
)
def test_wrong_values_are_named(optimizer, options, message):
    with pytest.raises(ValueError, match=message):
        optimizer([nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize("optimizer", [ExponentiatedSGD, ExponentiatedAdamW])
def test_parameters_without_a_sign_are_refused(optimizer):
    with pytest.raises(ValueError, match=f"{optimizer.__name__} does not support complex parameters"):
        optimizer([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="min_abs=1e-18 vanishes in torch.float16"):
        optimizer([nn.Parameter(torch.ones(2, dtype=torch.float16))])
    p = nn.Parameter(torch.ones(2, dtype=torch.float16))
    p.grad = torch.ones_like(p)
    optimizer([p], min_abs=1e-4, lr=0.1, fused=False).step()
    assert (p < 1).all()


def test_sgd_has_state_only_with_momentum(backend):
    for momentum, names in ((0.0, {"step"}), (0.9, {"step", "momentum_buffer"})):
        p = nn.Parameter(torch.ones(2))
        optimizer = ExponentiatedSGD([p], momentum=momentum, **backend)
        p.grad = torch.ones(2)
        optimizer.step()
        assert set(optimizer.state[p]) == names


def test_gradient_noise_drifts_the_weights_as_jensen_says():
    """E exp(-lr g) = exp(lr^2 sigma^2 / 2) for g = sigma * N(0, 1): weights grow on noise alone."""
    lr, sigma, steps, n = 0.1, 1.0, 50, 20_000
    grads = np.random.default_rng(0).standard_normal((steps, n))
    path = trajectory(
        lambda p: ExponentiatedSGD(p, lr=lr, fused=False),
        torch.ones(n).double(),
        lambda w, t: torch.from_numpy(sigma * grads[t]),
        steps,
    )
    growth = math.exp(lr**2 * sigma**2 / 2 * steps)  # 1.284
    spread = math.sqrt(math.exp(lr**2 * sigma**2 * steps) - 1) / math.sqrt(n)  # of the mean, relative: 0.0057
    assert path[-1].mean().item() == pytest.approx(growth, rel=4 * spread)
