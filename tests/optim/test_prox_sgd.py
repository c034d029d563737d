import copy
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch import nn

from lightning_opt.optim import ProxSGD, project_simplex
from lightning_opt.schedules import LinearDecayLR
from tests.reference import prox as reference
from tests.reference.problems import naive_trajectory, noisy_quadratic, trajectory

settings = {
    "ProxSGD": [
        {"lr": 1e-2, "strength": 1e-3},
        {"lr": 1e-2, "prox": "box", "strength": 3.0, "weight_decay": 0.01},
        {"lr": 1e-2, "prox": "l2ball", "strength": 50.0},
    ]
}


@pytest.mark.parametrize(
    ("prox", "strength", "operator"),
    [
        ("l1", 0.4, lambda x: reference.prox_l1(x, 0.05 * 0.4)),
        ("box", 0.3, lambda x: np.clip(x, -0.3, 0.3)),
        ("l2ball", 1.2, lambda x: reference.project_ball(x, 1.2)),
        ("simplex", 2.0, lambda x: reference.project_simplex(x, 2.0)),
    ],
)
def test_parity_with_gradient_step_and_operator(prox, strength, operator, plain_backend):
    start, gradient = noisy_quadratic(100)

    def step(w, g, memory, t):
        return operator(w - 0.05 * (g + 0.1 * w))

    def make(p):
        return ProxSGD(p, lr=0.05, prox=prox, strength=strength, weight_decay=0.1, **plain_backend)

    expected = naive_trajectory(step, start, gradient, 100)
    # the bisection ends at 1e-15, and each step contracts
    torch.testing.assert_close(trajectory(make, start, gradient, 100), expected, rtol=0, atol=1e-12)


def test_zeros_are_exact_and_the_box_is_never_left(backend):
    start, gradient = noisy_quadratic(300)
    path = trajectory(lambda p: ProxSGD(p, lr=0.05, strength=2.0, **backend), start, gradient, 300)
    assert (path[-1] == 0).sum() > 5
    path = trajectory(lambda p: ProxSGD(p, lr=0.05, prox="box", strength=0.2, **backend), start, gradient, 300)
    assert path[1:].abs().max() == 0.2


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 9), (2, 3, 4)])
def test_the_simplex(shape):
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    projected = project_simplex(x, 1.5)
    rows = x.reshape(-1, shape[-1] if shape else 1).numpy()
    expected = np.stack([reference.project_simplex(row, 1.5) for row in rows]).reshape(shape)
    np.testing.assert_allclose(projected.numpy(), expected, rtol=0, atol=1e-12)
    again = project_simplex(projected, 1.5)
    torch.testing.assert_close(again, projected, rtol=0, atol=1e-15)


def test_nothing_wrong_is_hidden_by_a_projection():
    for bad in (float("nan"), float("inf")):
        assert not project_simplex(torch.tensor([0.1, bad, 0.2])).isfinite().all()


@pytest.mark.parametrize("alpha", [0.1, 0.01])
def test_the_lasso(alpha):
    """Stochastic gradients of single rows under linear decay reach scikit-learn's optimum."""
    generator = np.random.default_rng(0)
    a = generator.standard_normal((200, 20))
    b = a[:, :4] @ np.array([2.0, -1.0, 0.5, 0.25]) + 0.1 * generator.standard_normal(200)

    def objective(x):
        return ((a @ x - b) ** 2).sum() / 400 + alpha * np.abs(x).sum()

    best = objective(Lasso(alpha, fit_intercept=False, tol=1e-10, max_iter=100000).fit(a, b).coef_)
    w = nn.Parameter(torch.zeros(20, dtype=torch.float64))
    optimizer = ProxSGD([w], lr=0.02, prox="l1", strength=alpha)
    scheduler = LinearDecayLR(optimizer, 4000)
    rows, targets = torch.from_numpy(a), torch.from_numpy(b)
    for chosen in torch.from_numpy(generator.integers(0, 200, (4000, 8))):
        x = rows[chosen]
        w.grad = x.T @ (x @ w.detach() - targets[chosen]) / 8
        optimizer.step()
        scheduler.step()
    assert objective(w.detach().numpy()) <= best * (1 + 1e-3) + 1e-6


def test_full_gradients_find_the_zeros_of_the_lasso():
    generator = np.random.default_rng(1)
    a = generator.standard_normal((100, 20))
    b = a[:, :4] @ np.array([2.0, -1.0, 0.5, 0.25]) + 0.1 * generator.standard_normal(100)
    solution = Lasso(0.1, fit_intercept=False, tol=1e-12, max_iter=100000).fit(a, b).coef_
    rows, targets, w = torch.from_numpy(a), torch.from_numpy(b), nn.Parameter(torch.zeros(20, dtype=torch.float64))
    optimizer = ProxSGD([w], lr=0.3, prox="l1", strength=0.1)
    for _ in range(400):
        w.grad = rows.T @ (rows @ w.detach() - targets) / 100
        optimizer.step()
    np.testing.assert_array_equal(w.detach().numpy() == 0, solution == 0)
    np.testing.assert_allclose(w.detach().numpy(), solution, rtol=0, atol=1e-7)
    assert 10 <= (solution == 0).sum() < 20


def test_a_function_as_prox(tmp_path):
    def keep_positive(x, lr):
        return x.clamp_min(0)

    start, gradient = noisy_quadratic(50)
    ours = trajectory(lambda p: ProxSGD(p, lr=0.1, prox=keep_positive), start, gradient, 50)
    naive = naive_trajectory(lambda w, g, m, t: np.maximum(w - 0.1 * g, 0), start, gradient, 50)
    torch.testing.assert_close(ours, naive, rtol=0, atol=1e-13)
    w = nn.Parameter(torch.ones(3))
    optimizer = ProxSGD([w], prox=keep_positive)
    copy.deepcopy(optimizer).step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="keep_positive' as prox, which it does not hold"):
        ProxSGD([w]).load_state_dict(state)


def test_statistics_and_wrong_values():
    w = nn.Parameter(torch.tensor([0.0, 1.0, 0.0, 2.0]))
    assert ProxSGD([w]).statistics()["zero_fraction"].item() == 0.5
    for kwargs, message in [
        ({"prox": "l3"}, "prox must be one of 'l1', 'box'"),
        ({"strength": -1.0}, "strength must be >= 0.0"),
        ({"prox": "box", "strength": 0.0}, "strength must be > 0.0"),
        ({"prox": "simplex", "fused": True}, "these options have no fused kernel"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            ProxSGD([w], **kwargs)
    with pytest.raises(ValueError, match="does not support complex"):
        ProxSGD([nn.Parameter(torch.ones(2, dtype=torch.complex64))], prox="simplex")


def test_equals_sgd_without_penalty():
    start, gradient = noisy_quadratic(50)
    sgd = trajectory(partial(torch.optim.SGD, lr=0.1, weight_decay=0.2), start, gradient, 50)
    ours = trajectory(lambda p: ProxSGD(p, lr=0.1, strength=0.0, weight_decay=0.2), start, gradient, 50)
    torch.testing.assert_close(ours, sgd, rtol=0, atol=1e-14)
