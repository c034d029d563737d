import copy
import math
from functools import partial
from types import SimpleNamespace

import adabelief_pytorch
import pytest
import pytorch_optimizer
import torch
from torch import nn

from lightning_opt.optim import AdaBelief
from tests.reference.adabelief import adabelief
from tests.reference.problems import naive_trajectory, noisy_quadratic, trajectory

settings = {
    "AdaBelief": [
        {"lr": 1e-2},
        {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True},
        {"lr": 1e-2, "weight_decay": 0.1, "decoupled": False, "rectify": True},
    ]
}

authors = partial(adabelief_pytorch.AdaBelief, print_change_log=False)


# --- closed forms ---


def test_first_step_is_lr_over_beta1(backend):
    g = torch.tensor([2.0, -0.5, 1.0, -1.7], dtype=torch.float64)
    path = trajectory(lambda p: AdaBelief(p, lr=0.01, **backend), torch.zeros(4).double(), lambda w, t: g, 1)
    # sqrt(s_hat) = beta1 |g| sqrt(1 + eps / (1 - beta2) / (beta1 g)^2): at most 2.5e-13 relative for |g| >= 0.5
    torch.testing.assert_close(path[1], -0.01 / 0.9 * g.sign(), rtol=1e-12, atol=0)


def bare_step(optimizer, g, state, t):
    """The move of a parameter at zero in step t, by the update alone: thousands of steps in a second."""
    group = optimizer.param_groups[0]
    c = SimpleNamespace(**optimizer.coefficients(float(t), group["lr"], group))
    p = torch.zeros_like(g)
    optimizer.update(p, g, state, c, **optimizer.flags(group))
    return p


def zero_state(dim):
    return SimpleNamespace(exp_avg=torch.zeros(dim).double(), exp_avg_var=torch.zeros(dim).double())


@pytest.mark.parametrize(
    ("eps", "table"),
    [
        (1e-16, {1: "1.111111", 2: "1.168005", 10: "1.63544", 100: "4.955077", 1000: "20.031222", 5000: "185.696"}),
        (1e-8, {5000: "120.386"}),  # on the way to the floor's 0.5 / sqrt(1e-5) = 158.11
    ],
)
def test_constant_gradient_has_growing_steps(eps, table):
    (b1, b2), g = (0.9, 0.999), 0.5
    optimizer = AdaBelief([nn.Parameter(torch.zeros(1))], lr=1.0, eps=eps)
    state, v = zero_state(1), 0.0
    for t in range(1, 5001):
        step = -bare_step(optimizer, torch.full((1,), g, dtype=torch.float64), state, t).item()
        v = b2 * v + (1 - b2) * g**2 * b1 ** (2 * t)  # g - m_t = beta1^t g
        if t in table:
            assert step == pytest.approx(float(table[t]), abs=10.0 ** -len(table[t].partition(".")[2]))
        if t % 100 == 1:  # the last 1000 roundings of v are remembered: 1e-13
            assert step == pytest.approx(g / (math.sqrt(v / (1 - b2**t) + eps / (1 - b2)) + eps), rel=1e-12)


def test_closed_form_of_eps_equals_the_recursion():
    (b1, b2), eps, steps = (0.9, 0.999), 1e-8, 3000
    grads = 1e-3 * torch.randn(steps, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    optimizer = AdaBelief([nn.Parameter(torch.zeros(5))], eps=eps)
    state, m, s = zero_state(5), torch.zeros(5).double(), torch.zeros(5).double()
    for t, g in enumerate(grads, 1):
        bare_step(optimizer, g, state, t)
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * (g - m) ** 2 + eps
        if t % 50 == 0:  # the last 1000 roundings of 1e-16 are remembered: 1e-13
            ours = state.exp_avg_var / (1 - b2**t) + eps / (1 - b2)
            torch.testing.assert_close(ours, s / (1 - b2**t), rtol=1e-12, atol=0)


def test_floor_turns_it_into_momentum_sgd_at_316_times_the_rate():
    b1, eps = 0.9, 1e-8
    g = 1e-6 * torch.randn(30, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = trajectory(
        lambda p: AdaBelief(p, lr=1e-3, eps=eps, fused=False), torch.zeros(8).double(), lambda w, t: g[t], 30
    )
    m = torch.zeros(8).double()
    for t in range(30):
        m = b1 * m + (1 - b1) * g[t]
        # relative error v / (2 floor^2) = 1e-11 / 2e-5, and eps / floor = 3e-6 outside the root
        torch.testing.assert_close(
            path[t] - path[t + 1], 1e-3 / 1e-5**0.5 * m / (1 - b1 ** (t + 1)), rtol=1e-5, atol=1e-20
        )


@pytest.mark.parametrize(
    ("beta2", "first"),
    [(0.999, 6), (0.99, 6), (0.6, None), (1 / 3, None)],  # 2 / (1 - 0.6) - 1 = 4 is a pole of the formula
)
def test_rectification_starts_when_the_variance_is_finite(beta2, first):
    g = torch.ones(1, dtype=torch.float64)
    path = trajectory(
        lambda p: AdaBelief(p, lr=1.0, betas=(0.9, beta2), rectify=True, degenerated_to_sgd=False, fused=False),
        torch.zeros(1).double(),
        lambda w, t: g,
        20,
    )
    moved = (path[1:] != path[:-1]).squeeze(1).tolist()
    assert moved == [first is not None and t >= first for t in range(1, 21)]


def test_decay_is_applied_where_the_rectified_step_is_skipped():
    path = trajectory(
        lambda p: AdaBelief(p, lr=0.1, weight_decay=0.5, rectify=True, degenerated_to_sgd=False, fused=False),
        torch.ones(1).double(),
        lambda w, t: torch.ones(1).double(),
        5,
    )
    torch.testing.assert_close(path[5], torch.full((1,), 0.95**5, dtype=torch.float64), rtol=1e-15, atol=0)


# --- independent implementations ---

OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled": False},
    {"weight_decay": 0.001, "fixed_decay": True},
    {"weight_decay": 0.1, "amsgrad": True},
    {"weight_decay": 0.1, "rectify": True},
    {"weight_decay": 0.1, "rectify": True, "degenerated_to_sgd": False},
    {"rectify": True, "amsgrad": True},
    {"betas": (0.5, 0.99), "eps": 1e-8},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_follows_the_naive_reference(options, backend):
    start, gradient = noisy_quadratic(100)
    ours = trajectory(lambda p: AdaBelief(p, lr=1e-2, **options, **backend), start, gradient, 100)
    naive = naive_trajectory(partial(adabelief, lr=1e-2, **options), start, gradient, 100)
    # iterates of order 1, of steps of order 0.01: 100 roundings of 2e-16
    torch.testing.assert_close(ours, naive, rtol=0, atol=2e-14)


PEERS = {
    "authors": lambda p, **o: authors(
        p,
        weight_decouple=o.get("decoupled", True),
        rectify=o.get("rectify", False),
        **{
            name: o[name]
            for name in ("lr", "weight_decay", "fixed_decay", "amsgrad", "degenerated_to_sgd")
            if name in o
        },
    ),
    **{
        f"pytorch_optimizer foreach={foreach}": lambda p, foreach=foreach, **o: pytorch_optimizer.AdaBelief(
            p,
            foreach=foreach,
            weight_decouple=o.get("decoupled", True),
            ams_bound=o.get("amsgrad", False),
            **{
                name: o[name]
                for name in ("lr", "weight_decay", "fixed_decay", "rectify", "degenerated_to_sgd")
                if name in o
            },
        )
        for foreach in (False, True)
    },
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("options", OPTIONS[:7], ids=str)
def test_agrees_with_independent_packages(peer, options):
    start, gradient = noisy_quadratic(200)
    ours = trajectory(lambda p: AdaBelief(p, lr=1e-2, **options, fused=False), start, gradient, 200)
    theirs = trajectory(lambda p: PEERS[peer](p, lr=1e-2, **options), start, gradient, 200)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-14)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "amsgrad": True}, {"rectify": True}], ids=str)
def test_continues_a_checkpoint_of_another_package(peer, options):
    start, gradient = noisy_quadratic(60)
    whole = trajectory(lambda p: PEERS[peer](p, lr=1e-2, **options), start, gradient, 60)

    p = nn.Parameter(start.clone())
    theirs = PEERS[peer]([p], lr=1e-2, **options)
    for t in range(30):
        p.grad = gradient(p.detach(), t)
        theirs.step()
    checkpoint = copy.deepcopy(theirs.state_dict())
    untouched = copy.deepcopy(checkpoint)

    ours = AdaBelief([p], lr=1.0, **options, fused=False)
    ours.load_state_dict(AdaBelief.from_peer_state_dict(checkpoint))
    assert ours.param_groups[0]["lr"] == 1e-2
    assert "buffer" not in ours.param_groups[0]
    assert torch.equal(checkpoint["state"][0]["exp_avg_var"], untouched["state"][0]["exp_avg_var"])
    for t in range(30, 60):
        p.grad = gradient(p.detach(), t)
        ours.step()
    # v = s - eps... cancels at most the eps part, 1e-13 of s
    torch.testing.assert_close(p.detach(), whole[60], rtol=0, atol=1e-13)


# --- options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, r"lr must be >= 0.0 and finite, got -0.001"),
        ({"lr": math.nan}, r"lr must be >= 0.0 and finite, got nan"),
        ({"betas": (1.0, 0.999)}, r"betas\[0\] must be in \[0.0, 1.0\), got 1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] must be in \[0.0, 1.0\), got -0.1"),
        ({"betas": 0.9}, r"betas must be a pair of numbers in \[0, 1\), got 0.9"),
        ({"eps": -1e-8}, r"eps must be >= 0.0 and finite, got -1e-08"),
        ({"eps": 1e-40}, r"eps must be 0 or at least 1.2e-38, got 1e-40: it would vanish in float32"),
        ({"weight_decay": -0.1}, r"weight_decay must be >= 0.0 and finite, got -0.1"),
        ({"fixed_decay": True, "decoupled": False}, r"fixed_decay=True needs decoupled=True"),
    ],
)
def test_wrong_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AdaBelief([nn.Parameter(torch.zeros(2))], **options)


def test_zero_eps_warns():
    with pytest.warns(UserWarning, match="eps=0 divides 0 by 0 where a gradient stays zero"):
        AdaBelief([nn.Parameter(torch.zeros(2))], eps=0.0)


def test_options_may_differ_between_groups(backend):
    start, gradient = noisy_quadratic(20)
    options = [{"decoupled": False, "weight_decay": 0.1}, {"rectify": True, "eps": 1e-8}]
    p = [nn.Parameter(start.clone()) for _ in options]
    optimizer = AdaBelief([{"params": [x], **o} for x, o in zip(p, options, strict=True)], lr=1e-2, **backend)
    for t in range(20):
        for x in p:
            x.grad = gradient(x.detach(), t)
        optimizer.step()
    for x, o in zip(p, options, strict=True):
        naive = naive_trajectory(partial(adabelief, lr=1e-2, **o), start, gradient, 20)
        torch.testing.assert_close(x.detach(), naive[-1], rtol=0, atol=1e-14)


PRESETS = {  # the table of the authors' README
    "cifar_cnn": {"lr": 1e-3, "eps": 1e-8, "weight_decay": 5e-4, "decoupled": False, "rectify": False},
    "imagenet": {"lr": 1e-3, "eps": 1e-8, "weight_decay": 1e-2, "decoupled": True, "rectify": False},
    "detection": {"lr": 1e-4, "eps": 1e-8, "weight_decay": 1e-4, "decoupled": False, "rectify": False},
    "lstm": {"lr": 1e-3, "eps": 1e-16, "weight_decay": 1.2e-6, "decoupled": False, "rectify": False},
    "wgan": {"lr": 2e-4, "betas": (0.5, 0.999), "eps": 1e-12, "weight_decay": 0.0, "rectify": False},
    "sn_gan": {"lr": 2e-4, "betas": (0.5, 0.999), "eps": 1e-16, "weight_decay": 0.0, "rectify": True},
    "transformer": {"lr": 5e-4, "eps": 1e-16, "weight_decay": 1e-4, "decoupled": True, "rectify": True},
    "rainbow": {"lr": 1e-4, "eps": 1e-10, "weight_decay": 0.0, "rectify": True},
    "half_cheetah": {"lr": 1e-3, "eps": 1e-12, "weight_decay": 0.0, "rectify": True},
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_authors_settings(name):
    group = getattr(AdaBelief, name)([nn.Parameter(torch.zeros(2))]).param_groups[0]
    expected = {"betas": (0.9, 0.999), **PRESETS[name]}
    assert {key: group[key] for key in expected} == expected


def test_presets_take_changes():
    p = [nn.Parameter(torch.zeros(2))]
    group = AdaBelief.lstm(p, layers=2, weight_decay=0.0).param_groups[0]
    assert (group["lr"], group["eps"], group["weight_decay"]) == (1e-2, 1e-12, 0.0)


# --- what it tells ---


def test_statistics_are_the_floor_fraction_and_the_size_of_the_last_step():
    scale = torch.tensor([1.0, 1.0, 1.0, 1e-9, 1e-9, 1e-9, 1e-9, 1e-9, 1.0])
    g = torch.randn(10, 9, generator=torch.Generator().manual_seed(0)) * scale
    path = []
    p = nn.Parameter(torch.zeros(9))
    optimizer = AdaBelief([p], lr=1e-3, eps=1e-12, fused=False)
    assert optimizer.statistics() == {}
    for t in range(10):
        p.grad = g[t]
        optimizer.step()
        path.append(p.detach().clone())
    statistics = optimizer.statistics()
    # the floor is sqrt(1e-12 / 1e-3) = 3.2e-5; surprises of 1e-9 are below it, of 1 above
    assert statistics["floor_fraction"].item() == pytest.approx(5 / 9)
    steps = (path[-1] - path[-2]).abs()  # of parameters of 1e-2: roundings of 1e-9
    assert statistics["median_step"].item() == pytest.approx(steps.median().item(), abs=2e-9)


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"rectify": True}, {"rectify": True, "amsgrad": True}], ids=str)
def test_median_step_holds_for_every_option(options):
    start, gradient = noisy_quadratic(12, dim=21)
    p = nn.Parameter(start.clone())
    optimizer = AdaBelief([p], lr=1e-2, **options, fused=False)
    for t in range(12):
        before, p.grad = p.detach().clone(), gradient(p.detach(), t)
        optimizer.step()
        size = (p.detach() - before).abs().median().item()
        assert optimizer.statistics()["median_step"].item() == pytest.approx(size, rel=1e-5)  # computed in float32


def test_diagnosis_says_that_it_has_become_sgd():
    optimizer = AdaBelief([nn.Parameter(torch.zeros(2))])
    assert optimizer.diagnose({"floor_fraction": 0.98}, 1) is None
    assert "it is SGD with momentum now" in optimizer.diagnose({"floor_fraction": 0.995}, 1)


def test_clipping_by_value_is_advised_against():
    optimizer = AdaBelief([nn.Parameter(torch.zeros(2))])
    assert "clip by norm" in optimizer.check_clipping("value")
    assert optimizer.check_clipping("norm") is None
