"""The bounds of arXiv:2305.17490 and ours for larger batches, against the exact second moments of linearized SGD."""

import pytest
import torch

from lightning_opt.curvature import critical_lr, second_moment_radius, stability
from tests.reference import linear_stability as naive


def jacobian(n, p, seed):
    return torch.randn(n, p, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_radius_is_that_of_the_definition(batch_size, momentum, replacement):
    J = jacobian(4, 2, seed=batch_size)
    for lr in (0.1, 0.7, 1.5):
        expected = naive.radius(J, lr, batch_size, momentum, replacement)
        actual = second_moment_radius(J, lr, batch_size, momentum=momentum, replacement=replacement)
        assert actual == pytest.approx(expected, rel=1e-9)  # eigenvalues of a nonsymmetric matrix


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_at_the_critical_rate_the_radius_is_one(momentum):
    for seed in range(5):
        J = jacobian(5, 3, seed)
        lr = critical_lr(J, 2, momentum=momentum)
        assert (
            second_moment_radius(J, 0.999 * lr, 2, momentum=momentum)
            < 1
            < second_moment_radius(J, 1.001 * lr, 2, momentum=momentum)
        )


def test_gradient_descent_is_bounded_by_the_top_eigenvalue_alone():
    for seed in range(5):
        J = jacobian(6, 3, seed)
        edge = 2 / torch.linalg.eigvalsh(J.T @ J / 6)[-1].item()
        assert critical_lr(J, 6, replacement=False) == pytest.approx(edge, rel=1e-12)
        assert critical_lr(J, 10**9) == pytest.approx(edge, rel=1e-7)
        assert critical_lr(J, 6, momentum=0.5, replacement=False) == pytest.approx(1.5 * edge, rel=1e-7)


def test_the_bounds_hold_at_the_exact_edge_of_3000_random_problems():
    generator = torch.Generator().manual_seed(0)
    tightest = 0.0
    for case in range(3000):
        n, p = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, 8), (1, 5)))
        batch_size = (1, 2, 4)[case % 3]
        replacement = case % 2 == 0 or batch_size > n
        J = torch.randn(n, p, generator=generator, dtype=torch.float64)
        G = J.T @ J / n
        at_edge = stability(
            G.trace().item(),
            torch.linalg.eigvalsh(G)[-1].item(),
            lr=critical_lr(J, batch_size, replacement=replacement),
            batch_size=batch_size,
            dataset_size=None if replacement else n,
        )
        assert at_edge.rho_tr <= 1 + 1e-9, (case, at_edge)
        assert at_edge.rho_top <= 1 + 1e-9, (case, at_edge)
        if batch_size == 1:
            tightest = max(tightest, at_edge.rho_tr)
    assert tightest > 0.9999  # the bound cannot be improved


def test_with_momentum_the_top_eigenvalue_is_bounded_alike():
    for seed in range(20):
        J = jacobian(5, 2, seed)
        G = J.T @ J / 5
        lr = critical_lr(J, 1, momentum=0.8)
        top = torch.linalg.eigvalsh(G)[-1].item()
        assert stability(G.trace().item(), top, lr=lr, batch_size=1, momentum=0.8).rho_top <= 1 + 1e-9


@pytest.mark.parametrize(("batch_size", "expected"), [(1, 2.0), (2, 3.313), (8, 5.377), (64, 6.569)])
def test_equal_norms(batch_size, expected):
    """The mixed bound is sufficient and within 12% of the edge."""
    for seed in range(10):
        J = jacobian(12, 6, seed)
        J = J / J.norm(dim=1, keepdim=True)
        G = J.T @ J / 12
        top = torch.linalg.eigvalsh(G)[-1].item()
        edge = critical_lr(J, batch_size)
        ceiling = stability(G.trace().item(), top, lr=1.0, batch_size=batch_size).lr_ceiling
        assert 0.88 * edge <= ceiling <= edge * (1 + 1e-12)
    assert 0.75 * expected < edge < 1.35 * expected  # that of another draw of the same size


def test_batches_of_one_and_equal_norms_are_exact():
    J = jacobian(12, 6, 0)
    assert critical_lr(J / J.norm(dim=1, keepdim=True), 1) == pytest.approx(2.0, rel=1e-12)


def test_the_quantities():
    s = stability(6.0, 2.0, lr=0.1, batch_size=4, momentum=0.5, dataset_size=10, trace_stderr=1.0)
    noise = (10 - 4) / (4 * 9)
    assert s.rho_tr == pytest.approx(0.1 / 0.5 * noise * 6.0 / 2)
    assert s.rho_tr_stderr == pytest.approx(0.1 / 0.5 * noise / 2)
    assert s.rho_top == pytest.approx(0.1 * 2.0 / 3)
    assert s.rho_mix == pytest.approx(s.rho_tr + (1 - noise) * s.rho_top)
    assert stability(6.0, 2.0, lr=s.lr_ceiling, batch_size=4, momentum=0.5, dataset_size=10).rho_mix == pytest.approx(1)
    assert stability(6.0, 2.0, lr=0.1, batch_size=10, dataset_size=10).rho_tr == 0  # gradient descent has no noise
    assert stability(0.0, 0.0, lr=0.1, batch_size=1).lr_ceiling == float("inf")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: critical_lr(torch.zeros(3, 2), 1), "not zero"),
        (lambda: critical_lr(torch.ones(3, 2), 4, replacement=False), r"batch_size must be in \[1, 3\], got 4"),
        (lambda: critical_lr(jacobian(70, 70, 0), 1), "at most 62"),
        (lambda: second_moment_radius(torch.ones(3, 2), -1.0, 1), "lr must be >= 0"),
        (lambda: stability(1.0, 1.0, lr=0.1, batch_size=0), "batch_size must be >= 1"),
        (lambda: stability(1.0, 1.0, lr=0.1, batch_size=1, momentum=1.0), r"momentum must be in \[0, 1\)"),
    ],
)
def test_wrong_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
