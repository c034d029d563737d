"""Consensus-based optimization beside the package cbx, a naive reference, and closed forms."""

import math
import warnings

import numpy as np
import pytest
import torch

from lightning_opt.solvers import consensus
from lightning_opt.solvers.consensus import (
    ConsensusSettings,
    Swarm,
    alpha_for_ess,
    cbo_minimize,
    cbo_move_,
    consensus_point,
    consensus_weights,
)
from tests.reference import consensus as reference

pytestmark = pytest.mark.usefixtures("one_thread")


def rastrigin(x):
    return (x**2 - 3 * (2 * torch.pi * x).cos() + 3).sum(dim=-1)


def points(n=30, d=6, seed=0):
    return 3 * torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draws(swarm, stream, move):
    """What the swarm draws for all particles in a move."""
    twin = Swarm(swarm.settings, swarm.consensus)
    twin.moves = move
    return twin._noise(range(swarm.settings.n_particles), stream)


@pytest.mark.parametrize("noise", ["isotropic", "anisotropic"])
def test_parity_with_cbx(noise):
    """The same draws give the same particles; rounding of 1e-15 grows with alpha times the gradient, here up to 100."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cbx.dynamics.cbo import CBO

    start, sigma, alpha = points(), 0.5, 5.0
    settings = ConsensusSettings(n_particles=30, dt=0.05, lam=1.0, sigma=sigma, alpha=alpha, noise=noise)
    swarm = Swarm(settings, start.mean(dim=0))
    swarm.particles = start.clone()
    move = iter(range(1000))
    theirs = CBO(
        lambda x: rastrigin(torch.from_numpy(x)).numpy(),
        x=start.numpy()[None],
        noise=noise,
        dt=0.05,
        lamda=1.0,
        sigma=sigma,
        alpha=alpha,
        f_dim="3D",
        check_f_dims=False,
        sampler=lambda size: draws(swarm, consensus.MOVE, next(move)).numpy().reshape(size),
        post_process=lambda dynamic: None,
        verbosity=0,
    )
    for _ in range(50):
        theirs.step()
        swarm.step(rastrigin)
        assert np.abs(theirs.x[0] - swarm.particles.numpy()).max() < 1e-10
        assert np.abs(theirs.consensus[0, 0] - swarm.consensus.numpy()).max() < 1e-10
    assert (swarm.particles - start).abs().max() > 1  # it did move


@pytest.mark.parametrize(
    ("noise", "update", "tol"),
    [("anisotropic", "full", 1e-5), ("anisotropic", "partial", 1.5), ("isotropic", "full", 0.3)],
)
def test_the_authors_training_as_loops(noise, update, tol):
    """Batches of particles, kicks and cooling; rounding grows with alpha, which three epochs bring to 8."""
    settings = ConsensusSettings(
        n_particles=12,
        particle_batch=4,
        update=update,
        dt=0.1,
        sigma=0.4,
        alpha=2.0,
        noise=noise,
        alpha_schedule="double_per_epoch",
        sigma_schedule="log2",
        stagnation_tol=tol,
    )
    start = points(12, 3)
    swarm = Swarm(settings, start.mean(dim=0))
    swarm.particles = start.clone()
    expected = reference.train(
        lambda x: rastrigin(torch.tensor(x, dtype=torch.float64)).item(),
        start.tolist(),
        epochs=3,
        steps=5,
        order=lambda step: torch.randperm(
            12, generator=swarm._generator(torch.device("cpu"), consensus.ORDER, step)
        ).tolist(),
        noise=lambda move: draws(swarm, consensus.MOVE, move).tolist(),
        kick=lambda move: draws(swarm, consensus.KICK, move).tolist(),
        batch=4,
        full=update == "full",
        dt=0.1,
        lam=1.0,
        sigma=0.4,
        alpha=2.0,
        tol=tol,
        isotropic=noise == "isotropic",
    )
    kicks = 0
    for step in range(15):
        swarm.step(rastrigin, epoch=step // 5)
        kicks += swarm.statistics["moved"] < tol
        assert swarm.consensus.tolist() == pytest.approx(expected[step], abs=1e-10)
    assert (kicks > 0) == (tol > 1e-5)


def test_without_noise_particles_contract_by_a_known_factor():
    """Differences of particles shrink by 1 - lam dt in every step, wherever the consensus is."""
    settings = ConsensusSettings(n_particles=30, dt=0.1, lam=2.0, sigma=0.0, alpha=5.0)
    swarm = Swarm(settings, points()[0])
    swarm.particles = points()
    for step in range(1, 11):
        swarm.step(rastrigin)
        expected = (points() - points()[0]) * (1 - 0.2) ** step
        assert torch.allclose(swarm.particles - swarm.particles[0], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scheme", ["cbo", "hopping"])
def test_a_constant_added_to_the_function_changes_no_bit(scheme):
    """1024 is added without rounding: the values are made coarse."""

    def coarse(x):
        return (rastrigin(x) * 64).round() / 64

    runs = [
        cbo_minimize(lambda x, c=c: coarse(x) + c, points()[0], steps=20, scheme=scheme, sigma=0.5, alpha=10.0)
        for c in (0.0, 1024.0)
    ]
    assert torch.equal(runs[0].path, runs[1].path)


@pytest.mark.parametrize("scheme", ["cbo", "hopping"])
def test_a_moved_space_moves_the_run(scheme):
    shift = torch.tensor([5.0, -3.0], dtype=torch.float64)
    start = torch.tensor([1.0, 2.0], dtype=torch.float64)
    here = cbo_minimize(rastrigin, start, steps=30, scheme=scheme, sigma=0.5, alpha=2.0)
    there = cbo_minimize(lambda x: rastrigin(x - shift), start + shift, steps=30, scheme=scheme, sigma=0.5, alpha=2.0)
    assert torch.allclose(there.path, here.path + shift, atol=1e-9)  # 30 steps of rounding, times alpha


def test_hopping_on_a_linear_function_is_gradient_descent():
    """Tilting a normal distribution by exp(-alpha a.x) moves its mean by -alpha sigma^2 a.

    With n samples and alpha sigma |a| = 1 the standard error is sigma sqrt(e / n) to a small factor: 1e-3 for 200,000.
    """
    a = torch.tensor([0.6, -0.8], dtype=torch.float64)
    start = torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = cbo_minimize(
        lambda x: x @ a, start, steps=3, scheme="hopping", n_particles=200_000, sigma=0.5, alpha=2.0, seed=3
    )
    expected = torch.stack([start - k * 2.0 * 0.5**2 * a for k in (1, 2, 3)])
    assert (found.path - expected).abs().max() < 6e-3  # 4 standard errors, of up to 3 steps


def test_hopping_on_a_quadratic_is_the_implicit_step():
    """The mean of the product of two normal densities: x / (1 + alpha sigma^2 h)."""
    start = torch.tensor([0.5, -1.0], dtype=torch.float64)
    found = cbo_minimize(
        lambda x: 0.75 * x.square().sum(dim=1),
        start,
        steps=3,
        scheme="hopping",
        n_particles=200_000,
        sigma=0.5,
        alpha=2.0,
    )
    factor = 1 / (1 + 2.0 * 0.5**2 * 1.5)
    expected = torch.stack([start * factor**k for k in (1, 2, 3)])
    assert (found.path - expected).abs().max() < 4e-3


@pytest.mark.parametrize("scheme", ["cbo", "hopping"])
def test_parts_of_a_swarm_are_the_whole(scheme):
    """The parts' candidates are those of the whole: random numbers belong to a particle, not to who holds it."""
    settings = ConsensusSettings(scheme=scheme, n_particles=50)
    seen = []

    def evaluate(x):
        seen.append(x.clone())
        return rastrigin(x)

    for own in (range(50), range(17), range(17, 50), range(50, 50)):  # more ranks than candidates leave some without
        part = Swarm(settings, points()[0], own, gather=lambda v, own, n: torch.zeros(n, dtype=v.dtype))
        part.step(evaluate)
        assert part.consensus.isfinite().all()
    assert torch.equal(seen[0], torch.cat(seen[1:]))


def test_blocks_of_random_numbers_are_of_the_particle(monkeypatch):
    """Pieces of any size are those of one pass."""
    found = []
    for rows in (2**24, 7 * 6):
        monkeypatch.setattr(consensus, "ROWS", rows)
        found.append(cbo_minimize(rastrigin, points()[0], steps=5, scheme="hopping", n_particles=40, sigma=0.5))
    assert torch.equal(found[0].path, found[1].path)
    assert found[0].evaluations == found[1].evaluations == 200
    numbers = Swarm(ConsensusSettings(n_particles=2000), torch.zeros(4096))._noise(range(500), consensus.MOVE)
    assert numbers.mean().abs() < 4 / math.sqrt(numbers.numel())
    assert (numbers[0] @ numbers[1] / 4096).abs() < 4 / math.sqrt(4096)


def test_both_schemes_find_the_minimum_among_many():
    start = torch.full((2,), 3.0, dtype=torch.float64)
    cbo = cbo_minimize(rastrigin, start, steps=150, n_particles=100, init_std=3.0, sigma=1.0)
    hop = cbo_minimize(
        rastrigin, start, steps=150, n_particles=200, scheme="hopping", sigma=0.7, sigma_schedule="decay"
    )
    for found in (cbo, hop):
        assert found.consensus.abs().max() < 0.4  # the next minimum is at distance 1
        assert found.best_value == pytest.approx(rastrigin(found.best).item())
        assert found.best_value < 0.1
    assert cbo.evaluations == 150 * 100


def test_the_seed_is_all_that_is_random():
    state = torch.get_rng_state()
    runs = [cbo_minimize(rastrigin, points()[0], steps=5, seed=seed).path for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_candidates_without_a_finite_value_have_no_weight():
    some = points(4, 2)
    some[1] = math.inf
    values = torch.tensor([1.0, math.nan, math.inf, 2.0])
    expected = consensus_point(some[[0, 3]], values[[0, 3]], 3.0)
    assert torch.equal(consensus_point(some, values, 3.0), expected)
    swarm = Swarm(ConsensusSettings(n_particles=4), some[0])
    swarm.step(lambda x: values)
    assert swarm.statistics["lost"] == 2
    with pytest.raises(ValueError, match=r"some value must be finite, got \[nan, nan, nan\]\.\.\."):
        swarm.step(lambda x: torch.full((4,), math.nan))
    assert swarm.steps == 1


def test_weights_are_exact_where_float32_would_not_be():
    values = torch.tensor([1000.0, 1000.001], dtype=torch.float64)
    ratio = consensus_weights(values, 1e4)
    assert (ratio[1] / ratio[0]).item() == pytest.approx(math.exp(-10), rel=1e-8)  # 1e-13 of 1000, times 1e4


def test_alpha_by_effective_sample_size():
    values = rastrigin(points(100))
    for share in (0.1, 0.5, 0.9):
        weights = consensus_weights(values, alpha_for_ess(values, share))
        assert 1 / weights.square().sum() == pytest.approx(100 * share, rel=1e-6)
    assert alpha_for_ess(values * 10) == pytest.approx(alpha_for_ess(values) / 10, rel=1e-6)
    assert consensus_weights(torch.ones(3), alpha_for_ess(torch.ones(3))).tolist() == pytest.approx([1 / 3] * 3)


def test_schedules():
    log2 = ConsensusSettings(sigma=2.0, sigma_schedule="log2", alpha=3.0, alpha_schedule="double_per_epoch")
    assert [log2.sigma_in(e, 0) for e in (0, 2)] == [2.0, 1.0]
    assert [log2.alpha_in(e) for e in (0, 3)] == [3.0, 24.0]
    decay = ConsensusSettings(sigma=2.0, sigma_schedule="decay")
    assert [decay.sigma_in(0, step) for step in (99, 100, 200)] == pytest.approx([2.0, 1.96, 1.9208])


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("n_particles", 1, "must be >= 2"),
        ("n_particles", 2.5, "must be an integer"),
        ("dt", 0.0, "must be > 0"),
        ("lam", -1.0, "must be >= 0"),
        ("sigma", -0.1, "must be >= 0"),
        ("sigma", math.nan, "must be >= 0"),
        ("alpha", 0.0, "must be > 0"),
        ("noise", "isotropc", "must be one of .* Did you mean 'isotropic'"),
        ("scheme", "hop", "must be one of 'cbo', 'hopping'"),
        ("particle_batch", 30, "must be >= 2 and divide n_particles=100"),
        ("particle_batch", 1, "must be >= 2 and divide n_particles=100"),
        ("update", "none", "must be one of 'full', 'partial'"),
        ("alpha_schedule", "double", "must be one of"),
        ("sigma_schedule", "log", "must be one of"),
        ("stagnation_tol", -1.0, "must be >= 0"),
        ("init_std", 0.0, "must be > 0"),
        ("seed", -1, "must be >= 0"),
        ("steps", 0, "must be >= 1"),
        ("epoch_length", 0, "must be >= 1"),
    ],
)
def test_wrong_values(name, value, accepted):
    with pytest.raises(ValueError, match=f"{name} {accepted}"):
        cbo_minimize(rastrigin, torch.zeros(2), **{"steps": 1, name: value})


def test_wrong_shapes():
    with pytest.raises(ValueError, match="x0 must hold n_particles=100 particles, got 3"):
        cbo_minimize(rastrigin, torch.zeros(3, 2), steps=1)
    with pytest.raises(ValueError, match=r"x0 must be a point \[d\], got \(100, 2\)"):
        cbo_minimize(rastrigin, torch.zeros(100, 2), steps=1, scheme="hopping")
    with pytest.raises(ValueError, match=r"one value for each of 100 points, got \(\)"):
        cbo_minimize(torch.sum, torch.zeros(2), steps=1)
    with pytest.raises(ValueError, match="particle_batch must be None for scheme='hopping'"):
        cbo_minimize(rastrigin, torch.zeros(2), steps=1, scheme="hopping", particle_batch=10)


def test_warnings_of_dynamics_that_do_not_settle():
    with pytest.warns(UserWarning, match="lam \\* dt = 1.2 is above 1"):
        ConsensusSettings(dt=0.6, lam=2.0, sigma=0.1)
    settings = ConsensusSettings(noise="isotropic", dt=0.1)
    with pytest.warns(UserWarning, match="100 dimensions particles drift apart on average for sigma above 0.138"):
        Swarm(settings, torch.zeros(100))
    bound = math.sqrt(1.9 / 100)  # (1 - lam dt)^2 + d sigma^2 dt = 1
    still = torch.ones(2000, 100, dtype=torch.float64)
    moved = cbo_move_(
        still.clone(), still[0] * 0, torch.randn_like(still), dt=0.1, lam=1.0, sigma=bound, kind="isotropic"
    )
    assert moved.square().sum(dim=1).mean().item() == pytest.approx(100, rel=0.01)  # std of the mean: 0.1 percent
