import copy
import math
import pickle
from functools import partial

import lion_pytorch
import lion_pytorch.cautious_lion
import lion_pytorch.foreach
import numpy as np
import pytest
import pytorch_optimizer
import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_opt.optim import Lion, LionK
from lightning_opt.optim._lion_kernels import KERNELS, direction
from lightning_opt.optim.lion import _lyapunov
from tests.reference.lion import lion_k, lyapunov, runge_kutta, velocity
from tests.reference.problems import naive_trajectory, noisy_quadratic, trajectory

settings = {
    "Lion": [{"lr": 1e-3}, {"lr": 1e-3, "weight_decay": 1.0, "cautious": True}],
    "LionK": [
        {"lr": 1e-3, "weight_decay": 0.1, "kernel": "huber", "kernel_args": {"e": 1e-2}},
        {"lr": 1e-3, "weight_decay": 0.1, "kernel": "soft", "kernel_args": {"e": 0.1, "relative": True}},
        {"lr": 1e-2, "weight_decay": 0.1, "kernel": "l2", "auto_scale": True},
        {"lr": 1e-2, "weight_decay": 0.1, "kernel": "quadratic"},
    ],
}

ARGS = {
    "sign": {},
    "lp": {"p": 1.5},
    "l2": {},
    "group": {},
    "soft": {"e": 0.7},
    "huber": {"e": 0.7},
    "topk": {"k": 3},
    "relativistic": {"e": 0.7},
    "quadratic": {},
    "spectral": {},
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the kernels ---


def test_every_kernel_is_tested():
    assert set(ARGS) == set(KERNELS)


@pytest.mark.parametrize(
    ("kernel", "shape"),
    [(k, s) for k in ARGS for s in [(4, 5), (7, 3), (6,), (2, 3, 2, 2)] if k != "spectral" or len(s) > 1],
    ids=str,
)
def test_gradient_value_conjugate_and_domain_belong_together(kernel, shape):
    k, args = KERNELS[kernel], ARGS[kernel]
    z = normal(*shape).requires_grad_()
    (gradient,) = torch.autograd.grad(k.value(z, args), z)
    z = z.detach()
    u = k.gradient(z, args)
    # spectral: 30 steps bring singular values of 0.01 of the norm to 1 up to roundings
    torch.testing.assert_close(u, gradient, rtol=0, atol=1e-12)
    assert k.gauge(u, args) <= 1 + 1e-12  # u = dK(z) is in the domain of K*,
    # where K(z) + K*(u) = z . u (Fenchel-Young)
    torch.testing.assert_close(k.value(z, args) + k.conjugate(u, args), (z * u).sum(), rtol=1e-12, atol=1e-12)
    other = k.gradient(normal(*shape, seed=1), args)  # and K(z) + K*(v) >= z . v for any other v in the domain
    assert k.value(z, args) + k.conjugate(other, args) >= (z * other).sum() - 1e-12


@pytest.mark.parametrize("kernel", ARGS)
def test_kernels_are_zero_at_zero(kernel):
    u = direction(torch.zeros(3, 4), kernel, ARGS[kernel])
    assert torch.equal(u, torch.zeros(3, 4))


def test_lp_joins_sign_and_l2():
    z = normal(4, 5)
    torch.testing.assert_close(direction(z, "lp", {"p": 1.0}), z.sign(), rtol=0, atol=0)
    torch.testing.assert_close(direction(z, "lp", {"p": 2.0}), direction(z, "l2", {}), rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (3, 2, 2, 2)], ids=str)
def test_spectral_kernel_is_the_polar_factor(shape):
    z = normal(*shape)
    u, _, v = torch.linalg.svd(z.reshape(shape[0], -1), full_matrices=False)
    torch.testing.assert_close(direction(z, "spectral", {}).reshape(shape[0], -1), u @ v, rtol=0, atol=1e-12)


def test_relative_threshold_is_in_units_of_the_root_mean_square():
    z = normal(40)
    rms = z.square().mean().sqrt().item()
    for kernel in ("soft", "huber", "relativistic"):
        relative = direction(z, kernel, {"e": 0.5, "relative": True})
        torch.testing.assert_close(relative, direction(z, kernel, {"e": 0.5 * rms}), rtol=1e-14, atol=0)
        torch.testing.assert_close(direction(1e-6 * z, kernel, {"e": 0.5, "relative": True}), relative)


# --- what it minimises: f(x) = sum D (x - c)^2 / 2 under the kernel's constraint, in closed form ---

C, D, ONE = (
    3 * normal(4, 5, seed=2),
    0.5 + 1.5 * torch.rand(4, 5, generator=torch.Generator().manual_seed(3)).double(),
    1.0,
)


def minimiser(kernel, args, d, decay, steps=2000, first=3e-2, last=1e-4):
    """The limit of LionK, with a rate that falls geometrically."""
    p = nn.Parameter(torch.zeros_like(C))
    optimizer = LionK([p], lr=first, weight_decay=decay, kernel=kernel, kernel_args=args, fused=False)
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = first * (last / first) ** (t / steps)
        p.grad = d * (p.detach() - C)
        optimizer.step()
    return p.detach()


def bisect(decreasing, low, high):
    """The zero of each element of a decreasing function."""
    for _ in range(100):
        middle = (low + high) / 2
        positive = decreasing(middle) > 0
        low, high = torch.where(positive, middle, low), torch.where(positive, high, middle)
    return low


def soft_threshold(z, e):
    return z.sign() * (z.abs() - e).clamp_min(0)


def l1_and_box(k):
    def projection(x):  # clip(soft-threshold) with the smallest threshold that meets the 1-norm
        low, high = torch.zeros(()).double(), x.abs().max()
        threshold = bisect(lambda e: soft_threshold(x, e).clamp(-1, 1).abs().sum() - k, low, high)
        return soft_threshold(x, threshold).clamp(-1, 1)

    return projection(C)


def barrier(e):
    """The zero of D (x - c) + e x / sqrt(1 - x^2)."""
    ends = torch.full_like(C, -1 + 1e-15), torch.full_like(C, 1 - 1e-15)
    return bisect(lambda x: D * (C - x) - e * x / (1 - x * x).sqrt(), *ends)


def spectral_ball():
    u, s, v = torch.linalg.svd(C, full_matrices=False)
    return u @ torch.diag(s.clamp_max(1)) @ v


CLOSED_FORMS = {  # with decay 1
    "sign": ({}, D, lambda: C.clamp(-1, 1)),
    "l2": ({}, ONE, lambda: C / C.norm()),
    "group": ({}, ONE, lambda: C / C.norm(dim=1, keepdim=True).clamp_min(1)),
    "soft": ({"e": 1.0}, D, lambda: soft_threshold(C, 1 / D).clamp(-1, 1)),
    "huber": ({"e": 1.0}, D, lambda: (D * C / (D + 1)).clamp(-1, 1)),
    "topk": ({"k": 3}, ONE, lambda: l1_and_box(3)),
    "relativistic": ({"e": 0.5}, D, lambda: barrier(0.5)),
    "quadratic": ({}, D, lambda: D * C / (D + 1)),
    "spectral": ({}, ONE, spectral_ball),
}


@pytest.mark.parametrize("kernel", CLOSED_FORMS)
def test_solves_the_constrained_problem_of_its_kernel(kernel):
    args, d, solution = CLOSED_FORMS[kernel]
    # The sum of the rates is 10, so e^-10 = 5e-5 of the distance from the start is left, and the iterates jump by the
    # last rate, 1e-4. The slow kernel, with no curvature to follow, takes fewer and larger steps.
    steps = 500 if kernel == "spectral" else 2000
    x = minimiser(kernel, args, d, 1.0, steps, first=3e-2 * 2000 / steps)
    torch.testing.assert_close(x, solution(), rtol=0, atol=1e-3)


def test_lp_solves_the_problem_in_the_dual_ball():
    x = minimiser("lp", {"p": 1.5}, ONE, 1.0)
    residual = C - x  # minus the gradient, normal to the ball where Hoelder's inequality is an equality
    assert torch.linalg.vector_norm(x, 3).item() == pytest.approx(1, abs=1e-3)
    bound = torch.linalg.vector_norm(residual, 1.5) * torch.linalg.vector_norm(x, 3)
    assert (residual * x).sum().item() == pytest.approx(bound.item(), rel=1e-3)


def test_weight_decay_is_the_inverse_radius():
    torch.testing.assert_close(minimiser("sign", {}, D, 2.0), C.clamp(-0.5, 0.5), rtol=0, atol=1e-3)


# --- the two phases ---


@pytest.mark.parametrize("kernel", ["sign", "l2", "topk", "soft", "spectral"])
def test_distance_to_the_constraint_shrinks_at_least_geometrically(kernel):
    lr, decay, grads = 1e-2, 2.0, normal(150, 6, 5)
    k, args = KERNELS[kernel], ARGS[kernel]
    path = trajectory(
        lambda p: LionK(p, lr=lr, weight_decay=decay, kernel=kernel, kernel_args=args, fused=False),
        torch.full((6, 5), 10.0).double(),
        lambda w, t: grads[t],
        150,
    )
    gauges = [k.gauge(decay * x, args).item() for x in path]
    bounds = [1 + (gauges[0] - 1) * (1 - lr * decay) ** t for t in range(151)]
    assert all(g <= b + 1e-12 for g, b in zip(gauges, bounds, strict=True))


def test_never_leaves_the_box_once_inside():
    grads = normal(300, 8)
    path = trajectory(
        lambda p: Lion(p, lr=0.1, weight_decay=2.0, fused=False),
        0.5 * torch.ones(8).double(),
        lambda w, t: grads[t],
        300,
    )
    assert path.abs().max() <= 0.5 + 1e-15


def test_lyapunov_function_decreases_along_the_continuous_dynamics():
    alpha, gamma, decay, lead, h = 1.0, 1.0, 0.5, 0.3, 1e-3
    generator = np.random.default_rng(0)
    d, c = generator.uniform(0.5, 2.0, 20), 3 * generator.standard_normal(20)
    constants = {"alpha": alpha, "gamma": gamma, "decay": decay, "lead": lead}

    def h_of(x, m):
        return lyapunov(
            x,
            m,
            lambda x: np.sum(d * (x - c) ** 2) / 2,
            lambda z: np.sum(np.sqrt(z * z + 1)),
            lambda u: -np.sum(np.sqrt(1 - u * u)),
            **constants,
        )

    move = partial(velocity, gradient=lambda x: d * (x - c), subgradient=lambda z: z / np.sqrt(z * z + 1), **constants)
    # the optimizer whose step lasts lr = h has beta2 = 1 - h gamma and beta1 = 1 - lead gamma; its momentum is -m
    group = {"betas": (1 - lead * gamma, 1 - h * gamma), "lr": h, "weight_decay": decay}
    x, m = generator.uniform(-1, 1, 20), generator.standard_normal(20)
    values = [h_of(x, m)]
    for t in range(10_000):
        x, m = runge_kutta(x, m, move, h)
        values.append(h_of(x, m))
        if t % 1000 == 0:
            u, k, args = torch.from_numpy(decay * x), KERNELS["relativistic"], {"e": 1.0}
            ours = _lyapunov(u, torch.from_numpy(-m), k.gauge(u, args), k, args, group).item()
            assert ours + np.sum(d * (x - c) ** 2) / 2 == pytest.approx(values[-1] / alpha, rel=1e-12)
    assert (np.diff(values) < 0).all()


def test_weights_of_a_network_stay_in_the_box():
    images, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    images, lr, steps = images.float() / 16, 2e-3, 345
    losses = []
    for decay in (2.0, 10.0, 20.0):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        outside = max(p.abs().max().item() for p in net.parameters()) - 1 / decay
        optimizer = Lion(net.parameters(), lr=lr, weight_decay=decay, foreach=True)
        for _ in range(steps):
            batch = torch.randint(len(images), (64,))
            loss = nn.functional.cross_entropy(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        largest = max(p.abs().max().item() for p in net.parameters())
        assert largest <= 1 / decay + (1 - lr * decay) ** steps * max(outside, 0.0) + 1e-6
        at_bound = torch.cat([(decay * p.detach()).abs().reshape(-1) > 0.99 for p in net.parameters()])
        statistics = optimizer.statistics(loss)
        assert statistics["at_bound_fraction"].item() == pytest.approx(at_bound.float().mean().item())
        if decay == 10.0:
            assert at_bound.float().mean() > 0.5
        losses.append(nn.functional.cross_entropy(net(images), labels).item())
    assert losses == sorted(losses)  # a smaller box fits worse


# --- independent implementations ---


@pytest.mark.parametrize("kernel", ["sign", "l2", "soft", "huber", "quadratic", "relativistic"])
def test_follows_the_naive_reference(kernel, plain_backend):
    if kernel == "l2":
        plain_backend = {**plain_backend, "fused": False}
    naive_kernels = {
        "sign": np.sign,
        "l2": lambda z: z / np.linalg.norm(z),
        "soft": lambda z: np.sign(z) * (np.abs(z) > 0.7),
        "huber": lambda z: np.clip(z / 0.7, -1, 1),
        "quadratic": lambda z: z,
        "relativistic": lambda z: z / np.sqrt(z**2 + 0.49),
    }
    start, gradient = noisy_quadratic(100)
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
    ours = trajectory(
        lambda p: LionK(p, **options, kernel=kernel, kernel_args=ARGS[kernel], **plain_backend), start, gradient, 100
    )
    naive = naive_trajectory(partial(lion_k, **options, subgradient=naive_kernels[kernel]), start, gradient, 100)
    torch.testing.assert_close(ours, naive, rtol=0, atol=2e-14)


PEERS = {
    "lion_pytorch": lion_pytorch.Lion,
    "lion_pytorch.foreach": lion_pytorch.foreach.Lion,
    "lion_pytorch.cautious_lion": partial(lion_pytorch.cautious_lion.Lion, cautious_factor=1.0),  # 0 is cautious
    "pytorch_optimizer": partial(pytorch_optimizer.Lion, foreach=False),
    "pytorch_optimizer foreach": partial(pytorch_optimizer.Lion, foreach=True),
}


@pytest.mark.parametrize("peer", PEERS)
def test_equals_independent_packages_exactly(peer):
    start, gradient = noisy_quadratic(200)
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    ours = trajectory(lambda p: Lion(p, **options, fused=False), start, gradient, 200)
    theirs = trajectory(lambda p: PEERS[peer](p, **options), start, gradient, 200)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("cautious_decay", [False, True])
def test_cautious_options_agree_with_lion_pytorch(cautious_decay):
    start, gradient = noisy_quadratic(200)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    ours = trajectory(
        lambda p: Lion(p, **options, cautious=True, cautious_weight_decay=cautious_decay, fused=False),
        start,
        gradient,
        200,
    )
    theirs = trajectory(
        lambda p: lion_pytorch.cautious_lion.Lion(p, **options, cautious_wd=cautious_decay), start, gradient, 200
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-14)


def test_continues_a_checkpoint_of_lion_pytorch():
    start, gradient = noisy_quadratic(60)
    whole = trajectory(lambda p: lion_pytorch.Lion(p, lr=1e-2, weight_decay=0.1), start, gradient, 60)
    p = nn.Parameter(start.clone())
    theirs = lion_pytorch.Lion([p], lr=1e-2, weight_decay=0.1)
    for t in range(30):
        p.grad = gradient(p.detach(), t)
        theirs.step()
    ours = Lion([p], fused=False)
    ours.load_state_dict(theirs.state_dict())
    for t in range(30, 60):
        p.grad = gradient(p.detach(), t)
        ours.step()
    assert torch.equal(p.detach(), whole[60])


def test_special_cases_are_sgd_with_averaged_momentum_and_sign_sgd():
    start, gradient = noisy_quadratic(50)
    quadratic = trajectory(
        lambda p: LionK(p, lr=0.1, betas=(0.9, 0.9), kernel="quadratic", fused=False), start, gradient, 50
    )
    sign = trajectory(lambda p: Lion(p, lr=0.1, betas=(0.0, 0.99), fused=False), start, gradient, 50)
    w, v, m = start.clone(), start.clone(), 0.0
    for t in range(50):
        m = 0.9 * m + 0.1 * gradient(w, t)
        w = w - 0.1 * m
        v = v - 0.1 * gradient(v, t).sign()
    torch.testing.assert_close(quadratic[-1], w, rtol=0, atol=1e-14)
    torch.testing.assert_close(sign[-1], v, rtol=0, atol=1e-14)


# --- options ---


def test_lion_is_lionk_with_the_sign_kernel(backend):
    start, gradient = noisy_quadratic(20)
    lion = trajectory(lambda p: Lion(p, lr=0.01, weight_decay=1.0, **backend), start, gradient, 20)
    lionk = trajectory(lambda p: LionK(p, lr=0.01, weight_decay=1.0, kernel="sign", **backend), start, gradient, 20)
    assert torch.equal(lion, lionk)


def test_state_is_one_tensor(backend):
    p = nn.Parameter(torch.zeros(3))
    optimizer = Lion([p], **backend)
    p.grad = torch.ones(3)
    optimizer.step()
    assert set(optimizer.state[p]) == {"exp_avg"}


@pytest.mark.parametrize("kernel", ["l2", "group", "lp", "spectral", "topk", "huber"])
def test_auto_scale_gives_every_kernel_steps_of_the_same_size(kernel):
    p = [nn.Parameter(torch.zeros(6, 8)), nn.Parameter(torch.zeros(30, 5))]
    optimizer = LionK(p, lr=0.01, kernel=kernel, kernel_args=ARGS[kernel], auto_scale=True)
    for x in p:
        x.grad = normal(*x.shape).float()
    optimizer.step()
    for x in p:  # a root mean square of lr
        assert x.detach().square().mean().sqrt().item() == pytest.approx(0.01, rel=1e-5)


def saturating(z):
    return z.tanh()


def test_kernel_may_be_a_function_and_survives_a_copy():
    start, gradient = noisy_quadratic(20)
    ours = trajectory(lambda p: LionK(p, lr=0.1, kernel=saturating), start, gradient, 20)
    naive = naive_trajectory(partial(lion_k, lr=0.1, subgradient=np.tanh), start, gradient, 20)
    torch.testing.assert_close(ours, naive, rtol=0, atol=1e-14)

    p = nn.Parameter(torch.zeros(3))
    optimizer = LionK([p], lr=0.1, kernel=saturating)
    assert optimizer.state_dict()["param_groups"][0]["kernel"] == "saturating"
    for clone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (q,) = clone.param_groups[0]["params"]
        q.grad = torch.ones(3)
        clone.step()
        torch.testing.assert_close(q.detach(), torch.full((3,), -0.1 * math.tanh(0.1)))
    with pytest.raises(ValueError, match="saved with the function 'saturating' as kernel, which it does not hold"):
        Lion([p]).load_state_dict(optimizer.state_dict())
    LionK([p], kernel=saturating).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("options", [{"kernel": "l2"}, {"cautious": True}, {"auto_scale": True}], ids=str)
def test_fused_is_refused_where_there_is_no_kernel(options):
    with pytest.raises(
        RuntimeError, match=r"LionK\(fused=True\) cannot be honoured: these options have no fused kernel"
    ):
        LionK([nn.Parameter(torch.zeros(2))], **options, fused=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-4}, "lr must be >= 0.0 and finite, got -0.0001"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0.0, 1.0\), got 1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0.0 and finite, got -1.0"),
        ({"lr": 0.5, "weight_decay": 3.0}, "lr \\* weight_decay must be at most 1, got 1.5"),
        ({"kernel": "hubert"}, "kernel must be one of .*; got 'hubert'. Did you mean 'huber'"),
        ({"kernel": "huber"}, "kernel 'huber' needs kernel_args={'e': ...}"),
        ({"kernel": "soft", "kernel_args": {"e": 0.0}}, r"kernel_args\['e'\] must be > 0.0 and finite, got 0.0"),
        ({"kernel": "topk", "kernel_args": {"k": 7}}, r"kernel_args\['k'\] must be in \[1, 6\], got 7"),
        ({"kernel": "topk", "kernel_args": {"k": 0}}, r"kernel_args\['k'\] must be in \[1, 6\], got 0"),
        ({"kernel": "topk", "kernel_args": {"k": 2.5}}, r"kernel_args\['k'\] must be an integer, got 2.5"),
        ({"kernel": "lp", "kernel_args": {"p": 3.0}}, r"kernel_args\['p'\] must be in \[1.0, 2.0\], got 3.0"),
        ({"kernel": "sign", "kernel_args": {"e": 1.0}}, "kernel_args of kernel 'sign' must be among: none; got 'e'"),
        ({"kernel": "huber", "kernel_args": {"k": 1}}, "must be among: 'e', 'relative'; got 'k'"),
        ({"kernel": "spectral"}, r"kernel 'spectral' needs parameters of two or more dimensions, got shape \(6,\)"),
    ],
)
def test_wrong_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LionK([nn.Parameter(torch.zeros(6))], **options)


def test_steps_below_the_spacing_of_bfloat16_need_stochastic_rounding(backend):
    for stochastic, moved in ((False, 0.0), (True, 0.02)):
        p = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
        optimizer = Lion([p], lr=1e-3, stochastic_rounding=stochastic, **backend)
        for _ in range(20):
            p.grad = torch.ones_like(p)
            optimizer.step()
        # below 1 the spacing is 2^-8: a step of 1e-3 is lost, or taken whole with probability 1e-3 * 2^8 = 0.256; the
        # standard error of the mean of 20,000 sums of 20 is 2^-8 * sqrt(20 * 0.256 * 0.744 / 20,000) = 5e-5
        assert 1 - p.float().mean().item() == pytest.approx(moved, abs=3e-4 if stochastic else 0)


# --- what it tells ---


def test_statistics_say_where_the_run_stands():
    lr, (b1, b2), decay = 0.01, (0.9, 0.99), 2.0
    p = nn.Parameter(torch.tensor([0.499, -0.2, 0.8]))
    m = torch.tensor([1.0, -2.0, -3.0])
    optimizer = Lion([p], lr=lr, betas=(b1, b2), weight_decay=decay)
    optimizer.state[p]["exp_avg"] = m
    statistics = optimizer.statistics(torch.tensor(5.0))
    assert statistics["phase1_dist"].item() == pytest.approx(0.6)  # 2 * 0.8 - 1
    assert statistics["at_bound_fraction"].item() == pytest.approx(2 / 3)
    residuals = torch.tensor([1 + 0.998, -1 - 0.4, -1 + 1.6])
    assert statistics["stationarity"].item() == pytest.approx(residuals.square().mean().sqrt().item())
    assert statistics["lyapunov"].item() == math.inf  # outside of the box

    p.data[2] = 0.3
    gamma = (1 - b2) / lr
    naive = lyapunov(
        p.detach().double().numpy(),
        -m.double().numpy(),
        lambda x: 5.0,
        lambda z: np.abs(z).sum(),
        lambda u: 0.0,
        alpha=gamma,
        gamma=gamma,
        decay=decay,
        lead=(1 - b1) / gamma,
    )
    assert optimizer.statistics(torch.tensor(5.0))["lyapunov"].item() == pytest.approx(naive / gamma, rel=1e-6)
    assert "lyapunov" not in optimizer.statistics()

    optimizer.param_groups[0]["lr"] = 0.0  # at either end of a schedule: H is then the loss
    assert optimizer.statistics(torch.tensor(5.0))["lyapunov"].item() == 5.0
    assert Lion([p]).statistics(torch.tensor(5.0)) == {}  # no constraint without decay


def test_statistics_know_the_scaled_radius():
    p = nn.Parameter(torch.tensor([3.0, 0.0, 0.0, 0.0]))
    optimizer = LionK([p], lr=0.01, weight_decay=1.0, kernel="l2", auto_scale=True)
    p.grad = torch.tensor([-1.0, 0.0, 0.0, 0.0])
    for _ in range(1500):  # to the ball of radius sqrt(4)
        optimizer.step()
    statistics = optimizer.statistics(torch.tensor(5.0))
    assert p[0].item() == pytest.approx(2.0, abs=1e-4)
    assert statistics["radius"].item() == pytest.approx(2.0)
    assert statistics["phase1_dist"].item() == pytest.approx(0.0, abs=1e-4)
    assert statistics["stationarity"].item() == pytest.approx(0.0, abs=1e-4)
    assert "lyapunov" not in statistics
