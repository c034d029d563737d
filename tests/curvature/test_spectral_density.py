import math

import pytest
import torch

from lightning_opt.curvature import MatrixOperator, slq_density

from .test_lanczos import generator, rotated

F64 = torch.float64


def test_moments_within_their_standard_errors(matrix):
    """The first four moments over 20 seeds: z-scores as a Student distribution of 29 degrees has them."""
    operator = MatrixOperator(matrix)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    scores = torch.zeros(20, 4, dtype=F64)
    means = torch.zeros(20, 4, dtype=F64)
    for seed in range(20):
        density = slq_density(operator, 3, 30, generator=generator(seed))
        assert density.products == 90
        for order in range(1, 5):
            moment = density.moment(order)
            scores[seed, order - 1] = (moment.value - float((eigenvalues**order).mean())) / moment.stderr
            means[seed, order - 1] = moment.value
    # one of 80 correlated scores may lie beyond 3: for each the probability is 0.5%
    assert int((scores.abs() > 3).sum()) <= 1
    # an honest error: the mean square of 20 scores is near 1
    assert ((scores**2).mean(dim=0) > 0.4).all()
    assert ((scores**2).mean(dim=0) < 2.2).all()
    # all 600 probes together
    exact = torch.stack([(eigenvalues**order).mean() for order in range(1, 5)])
    assert ((means.mean(dim=0) - exact).abs() < 3 * means.std(dim=0) / math.sqrt(20)).all()


def test_density_beside_the_exact_one(matrix):
    """Kolmogorov's distance of the two distributions falls with the steps."""
    eigenvalues = torch.linalg.eigvalsh(matrix)

    def wasserstein(density):
        order = density.nodes.flatten().argsort()
        nodes = density.nodes.flatten()[order]
        weights = density.weights.flatten()[order] / len(density.nodes)
        points = torch.cat([nodes, eigenvalues]).sort().values
        exact = torch.searchsorted(eigenvalues, points, right=True).double() / len(eigenvalues)
        cumulative = torch.cat([torch.zeros(1, dtype=F64), weights.cumsum(0)])
        ours = cumulative[torch.searchsorted(nodes, points, right=True)]
        return float(((ours - exact).abs()[:-1] * points.diff()).sum())

    operator = MatrixOperator(matrix)
    coarse, fine = (wasserstein(slq_density(operator, m, 10, generator=generator())) for m in (3, 30))
    spread = float(eigenvalues.std())
    assert fine < 0.05 * spread
    assert fine < 0.5 * coarse


def test_density_integrates_to_one():
    density = slq_density(MatrixOperator(rotated([0.0] * 30 + [4.0] * 10)), 5, 8, generator=generator())
    grid = torch.linspace(-2, 6, 4001)
    curve = density.density(grid, 0.1)
    assert float(torch.trapezoid(curve, grid)) == pytest.approx(1, abs=1e-9)
    # three quarters of the eigenvalues are zero
    share = density.mean((density.nodes < 2).double())
    assert abs(share.value - 0.75) < 3 * share.stderr
    peak = float(curve[grid.argmin().item() + int((0 + 2) / 8 * 4000)])
    assert peak == pytest.approx(share.value / (0.1 * math.sqrt(2 * math.pi)), rel=1e-6)


def test_probes_that_stop_early_are_padded():
    """With a start vector each of their own, all break down after two steps; a probe of the full matrix does not."""
    density = slq_density(MatrixOperator(rotated([1.0] * 5 + [3.0] * 5)), 6, 3, generator=generator())
    assert density.nodes.shape == (3, 2)
    torch.testing.assert_close(density.weights.sum(dim=1), torch.ones(3, dtype=F64))
    single = slq_density(MatrixOperator(torch.eye(4)), 3, 1, generator=generator()).moment(1)
    assert single.value == pytest.approx(1)
    assert math.isnan(single.stderr)


def test_wrong_arguments():
    a = MatrixOperator(torch.eye(4))
    with pytest.raises(ValueError, match="num_probes must be >= 1"):
        slq_density(a, 3, 0, generator=generator())
    density = slq_density(a, 3, 2, generator=generator())
    with pytest.raises(ValueError, match="width must be > 0"):
        density.density(torch.zeros(1), 0.0)
    with pytest.raises(ValueError, match="order must be >= 0"):
        density.moment(-1)
