import math

import numpy as np
import pytest
import torch

from lightning_opt.schedules import LastIterateLR

settings = {
    "LastIterateLR": [
        {"kind": "linear", "total_steps": 12},
        {"kind": "constant", "total_steps": 12, "normalize": False},
        {"kind": "sqrt", "lipschitz": 10.0},
        {"kind": "heavy_tail", "p": 1.5},
        {"kind": "heavy_tail_linear", "p": 1.5, "total_steps": 12, "normalize": False},
        {"kind": "strongly_convex", "lipschitz": 10.0},
        {"kind": "strongly_convex_squared", "kappa": 0.0, "mu": 2.0},
        {"kind": "two_phase", "lipschitz": 10.0, "total_steps": 12},
    ]
}
L, MU, P, ETA = 3.0, 0.25, 1.4, 0.7
K = L / MU
# The sheet's formulas at t = 1 ... T, without any normalization.
FORMULAS = {
    "sqrt": lambda t, T: ETA / math.sqrt(t),
    "constant": lambda t, T: ETA / math.sqrt(T),
    "linear": lambda t, T: ETA * (T - t + 1) / T**1.5,
    "heavy_tail": lambda t, T: ETA * t ** (-1 / P),
    "heavy_tail_linear": lambda t, T: ETA * (T - t + 1) / T ** (1 + 1 / P),
    "strongly_convex": lambda t, T: 1 / (MU * (t + 2 * K)),
    "strongly_convex_squared": lambda t, T: 2 / (MU * (t + 1 + 4 * K)),
    "two_phase": lambda t, T: (
        1 / (MU * (1.5 + 2 * K)) if t <= math.ceil(T / 2) else 2 / (MU * (t - math.ceil(T / 2) + 2 + 4 * K))
    ),
}
STRONGLY_CONVEX = ("strongly_convex", "strongly_convex_squared", "two_phase")


def build(kind, total=None, lr=ETA, weight_decay=0.0, **kwargs):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr, weight_decay=weight_decay)
    return LastIterateLR(optimizer, kind, total, **kwargs)


def rates(scheduler, steps):
    seen = []
    for _ in range(steps):
        seen.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return np.array(seen)


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("total", range(1, 11))
def test_step_sizes_are_the_formulas(kind, total):
    constants = {"lipschitz": L, "mu": MU} if kind in STRONGLY_CONVEX else {"p": P}
    expected = np.array([FORMULAS[kind](t, total) for t in range(1, total + 1)])
    raw = rates(build(kind, total, normalize=False, **constants), total)
    # a few roundings of one quotient
    np.testing.assert_allclose(raw, expected, rtol=1e-15 * 4, atol=0)
    peak = rates(build(kind, total, **constants), total)
    scale = 1.0 if kind in STRONGLY_CONVEX else ETA / expected[0]
    np.testing.assert_allclose(peak, expected * scale, rtol=1e-15 * 4, atol=0)


def test_smoothness_limits_the_step_size():
    limit = 1 / (2 * L)
    unlimited = rates(build("sqrt"), 40)
    np.testing.assert_array_equal(rates(build("sqrt", lipschitz=L), 40), np.minimum(unlimited, limit))
    lr = torch.tensor(ETA, dtype=torch.float64)
    scheduler = build("sqrt", lr=lr, lipschitz=L)
    assert scheduler.optimizer.param_groups[0]["lr"].item() == limit


def test_the_two_phases_meet():
    """The constant of the first is the second's first step, whatever the constants: 1/(1.5 + 2k) = 2/(3 + 4k)."""
    seen = rates(build("two_phase", 9, mu=MU, lipschitz=L), 9)
    np.testing.assert_allclose(seen[:6], seen[0], rtol=1e-15)
    assert np.all(np.diff(seen[5:]) < 0)
    assert seen[0] < 1 / (2 * L)


def test_no_strongly_convex_step_exceeds_what_smoothness_allows():
    for kind in STRONGLY_CONVEX:
        assert rates(build(kind, 10, mu=MU, lipschitz=L), 10).max() <= 1 / (2 * L)


@pytest.mark.parametrize("mu", [0.5, 0.01])
def test_how_fast_the_start_is_forgotten(mu):
    r"""On the quadratic of curvature mu the product of (1 - mu lr_t) telescopes.

    To 2k / (T + 2k) for the first form and to 4k (4k + 1) / ((T + 4k)(T + 4k + 1)) for the second, whose decay in T is
    thus the square of the first's; the second half of the two phases is as the second form.
    """
    total, kappa = 500, L / mu
    first, second, two = (
        np.prod(1 - mu * rates(build(kind, total, mu=mu, lipschitz=L), total)) for kind in STRONGLY_CONVEX
    )
    assert first == pytest.approx((2 * kappa) / (total + 2 * kappa), rel=1e-12)
    a = 4 * kappa
    assert second == pytest.approx(a * (a + 1) / ((total + a) * (total + a + 1)), rel=1e-11)
    assert second < first
    half = total // 2
    phase = (1 - 1 / (1.5 + 2 * kappa)) ** half
    assert two == pytest.approx(phase * (a + 1) * (a + 2) / ((half + a + 1) * (half + a + 2)), rel=1e-9)


def test_mu_is_read_from_the_weight_decay_of_each_group():
    groups = [
        {"params": [torch.zeros(1, requires_grad=True)], "weight_decay": 0.1},
        {"params": [torch.zeros(1, requires_grad=True)], "weight_decay": 0.2},
    ]
    scheduler = LastIterateLR(torch.optim.SGD(groups, lr=9.0), "strongly_convex", kappa=5.0)
    assert scheduler.get_last_lr() == pytest.approx([1 / (0.1 * 11), 1 / (0.2 * 11)], rel=1e-15)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "linear"}, "total_steps is needed"),
        ({"kind": "two_phase", "mu": 1.0, "kappa": 1.0}, "total_steps is needed"),
        ({"kind": "line"}, "Did you mean 'linear'"),
        ({"kind": "sqrt", "lipschitz": 0.0}, "lipschitz must be > 0.0"),
        ({"kind": "sqrt", "total": 0}, "total_steps must be an integer >= 1, got 0"),
        ({"kind": "heavy_tail", "p": 1.0}, r"p must be in \(1.0, 2.0\], got 1.0"),
        ({"kind": "strongly_convex", "mu": 0.0, "kappa": 1.0}, "mu must be > 0.0"),
        ({"kind": "strongly_convex", "mu": 1.0, "kappa": -1.0}, "kappa must be >= 0.0"),
        ({"kind": "strongly_convex", "mu": 1.0}, "needs one of lipschitz and kappa.* of size 1/mu"),
        ({"kind": "strongly_convex", "mu": 1.0, "kappa": 1.0, "lipschitz": 1.0}, "needs one of lipschitz and kappa"),
        ({"kind": "strongly_convex", "kappa": 1.0}, "mu must be given, since group 0 has weight_decay=0"),
    ],
)
def test_wrong_values(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


def test_only_kinds_that_depend_on_the_end_have_one():
    for kind in ("sqrt", "heavy_tail"):
        assert len(rates(build(kind, 3), 9)) == 9
    scheduler = build("linear", 3)
    rates(scheduler, 3)
    with pytest.raises(RuntimeError, match="made for total_steps=3"):
        scheduler.step()


# --- bounds and effects ---


def l1_problem(generator, n, d):
    """f(x) = sum |A x - b| with its minimum 0 at x_star."""
    a = generator.standard_normal((n, d))
    x_star = generator.standard_normal(d)
    return a, a @ x_star, x_star


def test_the_bound_of_zamani_and_glineur_holds():
    """Rates R (T + 1 - t) / (B (T + 1)^1.5): f(x_{T+1}) - f* <= B R / sqrt(T + 1), on 200 random problems."""
    total, worst = 50, 0.0
    generator = np.random.default_rng(0)
    for _ in range(200):
        a, b, x_star = l1_problem(generator, 20, 5)
        radius = np.linalg.norm(x_star)
        lipschitz = np.linalg.norm(a, 2) * math.sqrt(20)  # subgradients are A' s with a vector s of signs
        # the constants are those of S3 at horizon T + 1, with eta = R / B, of which T steps are made
        shape = rates(build("linear", total + 1, lr=radius / lipschitz, normalize=False), total + 1)[1:]
        x = np.zeros(5)
        for rate in shape:
            x = x - rate * a.T @ np.sign(a @ x - b)
        gap = np.abs(a @ x - b).sum()
        worst = max(worst, gap / (lipschitz * radius / math.sqrt(total + 1)))
    assert worst <= 1
    assert worst > 0.01  # the problems are not trivial


def last_gap(shape, eta, problem, seed):
    """Suboptimality of the last iterate of SGD with one row a step."""
    a, b, x_star, best = problem
    order = np.random.default_rng(seed).integers(len(b), size=len(shape))
    x = np.zeros(a.shape[1])
    for rate, i in zip(eta * shape, order, strict=True):
        x = x - rate * np.sign(a[i] @ x - b[i]) * a[i]
    return np.abs(a @ x - b).mean() - best


def test_linear_decay_beats_a_constant_rate_on_l1_regression():
    """Both at their best rate of a grid; the published effect, at a size of seconds."""
    total = 2000
    shapes = {"linear": rates(build("linear", total, lr=1.0), total), "constant": np.ones(total)}
    gaps = {name: [] for name in shapes}
    for seed in range(3):
        generator = np.random.default_rng(seed)
        a = generator.standard_normal((200, 20))
        x_star = generator.standard_normal(20)
        b = a @ x_star + generator.standard_t(2, 200)
        best = _least_absolute(a, b)
        problem = (a, b, x_star, best)
        for name, shape in shapes.items():
            grid = [last_gap(shape, eta, problem, seed) for eta in (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)]
            gaps[name].append(min(grid))
    assert np.mean(gaps["linear"]) <= 0.5 * np.mean(gaps["constant"]), gaps


def _least_absolute(a, b):
    """The minimum of mean |A x - b|, by linear programming."""
    from scipy.optimize import linprog

    n, d = a.shape
    cost = np.concatenate([np.zeros(d), np.ones(n)]) / n
    rows = np.block([[a, -np.eye(n)], [-a, -np.eye(n)]])
    found = linprog(cost, rows, np.concatenate([b, -b]), bounds=[(None, None)] * d + [(0, None)] * n)
    return found.fun


@pytest.mark.parametrize(("mu", "share"), [(0.1, 0.2), (0.01, 1.0)])
def test_strong_convexity_alone_sets_a_good_rate(mu, share):
    """Ridge logistic regression, nothing tuned: the gap of the first form, beside the constant rate 1/(2L)."""
    from scipy.optimize import minimize
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    x, y = (x - x.mean(0)) / x.std(0), 2.0 * y - 1
    smooth = 0.25 * np.linalg.eigvalsh(x.T @ x / len(x)).max() + mu

    def loss(w):
        return np.logaddexp(0, -y * (x @ w)).mean() + mu / 2 * w @ w

    def gradient(w, rows=slice(None)):
        margin = y[rows] * (x[rows] @ w)
        return -x[rows].T @ (y[rows] / (1 + np.exp(margin))) / len(margin) + mu * w

    best = minimize(loss, np.zeros(30), jac=gradient, options={"gtol": 1e-10}).fun
    total = 4000
    order = np.random.default_rng(0).integers(len(x), size=(total, 16))
    gaps = []
    for shape in (rates(build("strongly_convex", total, mu=mu, lipschitz=smooth), total), [0.5 / smooth] * total):
        w = np.zeros(30)
        for rate, rows in zip(shape, order, strict=True):
            w = w - rate * gradient(w, rows)
        gaps.append(loss(w) - best)
    assert gaps[0] <= 5e-4
    assert gaps[0] <= share * gaps[1]
