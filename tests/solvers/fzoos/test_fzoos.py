import math
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_opt.solvers.fzoos import (
    Box,
    Client,
    FZooSSettings,
    NonFiniteObjectiveError,
    RandomFeatures,
    fedzo_minimize,
    fzoos_minimize,
)
from lightning_opt.solvers.fzoos.client import _mixed
from lightning_opt.solvers.fzoos.evaluate import one_by_one
from lightning_opt.testing._ranks import on_two_ranks
from tests.reference.fzoos import naive_fzoos

D = 5
CENTERS = (0.3, 0.55)
QUICK = {
    "local_steps": 4,
    "lr": 0.02,
    "n_features": 60,
    "active": 2,
    "active_pool": 10,
    "sync_active": 4,
    "sync_pool": 12,
}


def bowl(client):
    """Bowls of other centers and curvatures, not quadratic."""
    weights = torch.linspace(1, 2 + client, D, dtype=torch.float64)
    return lambda x: (weights * (x - CENTERS[client]) ** 2).sum() + 0.3 * torch.sin(5 * x).sum()


START = torch.full((D,), 0.6, dtype=torch.float64)
bowls = [bowl(0), bowl(1)]
one_client = pytest.mark.filterwarnings("ignore:.*with one client there is nothing to correct by")


def test_a_run_is_that_of_the_naive_reference():
    found = fzoos_minimize(bowls, START, rounds=3, **QUICK, init=6, noise=1e-3, lengthscale=0.8, bounds=None, seed=5)
    features = RandomFeatures(D, 60, lengthscale=0.8, seed=_mixed(5, 0))
    expected = naive_fzoos(
        [lambda x, f=f: float(f(torch.from_numpy(x))) for f in bowls],
        START.numpy(),
        rounds=3,
        init=6,
        sync_active=4,
        sync_pool=12,
        frequencies=features.frequencies.numpy(),
        phases=features.phases.numpy(),
        generators=[torch.Generator().manual_seed(_mixed(5, 1 + k)) for k in range(2)],
        length=0.8,
        noise=1e-3,
        lr=0.02,
        steps=4,
        active=2,
        pool=10,
        radius=0.01,
        gamma=1.0,
    )
    # matrices of condition 50 / 1e-3, so errors of 1e-11 in a gradient; Adam makes relative ones of them
    np.testing.assert_allclose(found.points.numpy(), expected, rtol=1e-7, atol=1e-7)
    assert np.abs(expected[-1] - expected[0]).max() > 0.1


def test_queries_bytes_and_values_are_counted():
    calls = [0, 0]

    def counted(client):
        def f(x):
            calls[client] += 1
            return bowls[client](x)

        return f

    result = fzoos_minimize([counted(0), counted(1)], START, rounds=3, **QUICK)
    a_round = 4 + 3 * 2 + 1 + 4
    assert calls == [11 + 3 * a_round] * 2
    assert result.queries.tolist() == [0, *(2 * (11 + r * a_round) for r in (1, 2, 3))]
    first, later = 2 * 8 * (D + 1 + 60 + 1), 2 * 8 * (D + 60 + 1)  # up and down
    assert result.num_bytes.tolist() == [0, first, first + later, first + 2 * later]
    expected = torch.stack([(bowls[0](x) + bowls[1](x)) / 2 for x in result.points])
    torch.testing.assert_close(result.objective, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(result.x, result.points[-1])


def test_it_comes_near_the_minimum_of_the_mean_and_not_of_one_client():
    fns = [lambda x, c=c: ((x - c) ** 2).sum() for c in (0.1, 0.3)]
    result = fzoos_minimize(fns, START, rounds=8, **{**QUICK, "lr": 0.05})
    assert float((result.x - 0.2).abs().max()) < 0.02


def test_the_correction_brings_clients_together_whose_optima_differ():
    # one is steep where the other is flat: averages of where each goes alone are off
    fns = [lambda x: 10 * (x - 0.2).square().sum(), lambda x: (x - 0.9).square().sum()]
    best = (10 * 0.2 + 0.9) / 11
    gaps = {
        gamma: float((fzoos_minimize(fns, START, rounds=8, gamma=gamma, **{**QUICK, "lr": 0.03}).x - best).abs().max())
        for gamma in (0.0, 1.0)
    }
    assert gaps[1.0] < 0.5 * gaps[0.0], gaps


def clients_of(indices, **changes):
    settings = FZooSSettings(**{**QUICK, **changes})
    return [Client(START, settings, index, Box((0.0, 1.0), D)) for index in indices]


def run_round(clients, objectives):
    for client, objective in zip(clients, objectives, strict=True):
        while not client.round_is_over:
            client.step(objective)
    new = torch.stack([client.point_message() for client in clients]).mean(0)
    weights = [c.weights_message(new, objective) for c, objective in zip(clients, objectives, strict=True)]
    for client in clients:
        client.end_round(torch.stack(weights).mean(0))


def test_identical_clients_are_not_corrected():
    clients = clients_of([3, 3])
    objectives = [one_by_one(bowls[0])] * 2
    run_round(clients, objectives)
    assert all(client.move().correction_norm < 1e-12 for client in clients)
    assert torch.equal(clients[0].x, clients[1].x)


def test_different_clients_are_corrected_from_the_second_round_on():
    clients = clients_of([0, 1])
    objectives = [one_by_one(f) for f in bowls]
    for client, objective in zip(clients, objectives, strict=True):
        client.begin(objective)
        assert client.move().correction_norm == 0
        client.look(objective)
    run_round(clients, objectives)
    for client, objective in zip(clients, objectives, strict=True):
        first = client.move().correction_norm
        assert first > 0.1
        client.look(objective)
        assert client.move().correction_norm < 0.7 * first  # gamma / t


@one_client
def test_one_client_is_as_without_correction():
    runs = [fzoos_minimize(bowls[0], START, rounds=3, gamma=gamma, **QUICK) for gamma in (0.0, 1.0)]
    assert torch.equal(runs[0].points, runs[1].points)
    with pytest.warns(UserWarning, match="nothing to correct by"):
        fzoos_minimize([bowls[0]], START, rounds=0)


def test_a_seed_gives_the_same_run_and_global_random_state_is_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    runs = [fzoos_minimize(bowls, START, rounds=2, seed=seed, **QUICK) for seed in (1, 1, 2)]
    assert torch.equal(runs[0].points, runs[1].points)
    assert not torch.equal(runs[0].points, runs[2].points)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("options", [{}, {"noise": "auto", "lengthscale": "fit", "keep_best": True}], ids=["", "auto"])
@pytest.mark.parametrize("steps", [2, 6, 9])
def test_a_client_goes_on_from_its_state(steps, options, tmp_path):
    objectives = [one_by_one(f) for f in bowls]

    def run(clients, start, stop):
        for _ in range(stop - start):
            for client, objective in zip(clients, objectives, strict=True):
                client.step(objective)
            if clients[0].round_is_over:
                run_round(clients, objectives)
        return clients

    whole = run(clients_of([0, 1], **options), 0, 17)
    states = [client.state_dict() for client in run(clients_of([0, 1], **options), 0, steps)]
    torch.save(states, tmp_path / "states.pt")
    resumed = clients_of([0, 1], **options)
    for client, state in zip(resumed, torch.load(tmp_path / "states.pt", weights_only=True), strict=True):
        client.load_state_dict(state)
    for one, other in zip(whole, run(resumed, steps, 17), strict=True):
        assert one.rounds > 1
        for name, value in one.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)


def test_the_search_stays_within_the_bounds_and_is_the_same_in_other_units():
    seen = []

    def f(x):
        seen.append(x)
        return (x / 10 - 1.5).square().sum()  # least beyond the upper bound

    result = fzoos_minimize([f, f], 10 * START, rounds=8, bounds=(0.0, 10.0), **{**QUICK, "lr": 0.05})
    assert float(torch.stack(seen).min()) >= 0
    assert float(torch.stack(seen).max()) <= 10
    assert torch.equal(result.x, torch.full((D,), 10.0, dtype=torch.float64))
    unit = fzoos_minimize([lambda x: (x - 1.5).square().sum()] * 2, START, rounds=8, **{**QUICK, "lr": 0.05})
    torch.testing.assert_close(unit.points, result.points / 10, rtol=0, atol=1e-6)


def test_a_lengthscale_is_chosen_by_likelihood_for_all_clients():
    # waves of length 0.1 and 1 in one coordinate, sampled widely: the first needs a shorter lengthscale
    chosen = []
    for wave in (0.1, 1.0):
        clients = clients_of([0, 1], lengthscale="fit", radius=0.3, init=40)
        objective = one_by_one(lambda x, wave=wave: torch.sin(2 * math.pi * x[:2] / wave).sum())
        run_round(clients, [objective] * 2)
        assert clients[0].features.lengthscale == clients[1].features.lengthscale
        chosen.append(clients[0].features.lengthscale / (0.3 * math.sqrt(D)))
    assert chosen[0] < chosen[1]
    assert all(factor in [2.0**k for k in range(-3, 5)] for factor in chosen)


def test_noise_is_measured_at_the_start():
    draws = torch.Generator().manual_seed(7)
    noisy = one_by_one(lambda x: bowls[0](x) + 0.2 * torch.randn((), generator=draws, dtype=torch.float64))
    (client,) = clients_of([0], noise="auto")
    for _ in range(5):
        client.step(noisy)
        assert torch.equal(client.x, START)
    # the variance of 5 values has a standard deviation of sqrt(2 / 4) of itself
    assert client.noise_variance == pytest.approx(0.04, rel=3 * math.sqrt(0.5))
    assert client.noise_variance == float(client.values.var())
    client.step(noisy)
    assert not torch.equal(client.x, START)
    assert client.queries == 5 + 10 + 1 + 2


def test_the_best_round_is_kept_if_asked_for():
    # steps far too long for the bowl: some rounds end worse than they began
    runs = {
        keep: fzoos_minimize(bowls, START, rounds=6, keep_best=keep, **{**QUICK, "lr": 0.4}) for keep in (False, True)
    }
    assert bool((runs[False].objective.diff() > 0).any())
    assert bool((runs[True].objective.diff() <= 0).all())
    assert torch.equal(runs[True].queries, runs[False].queries)


@one_client
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_names_its_client(value):
    with pytest.raises(NonFiniteObjectiveError, match=f"client 1 is {value} at 1 of 10 points"):
        fzoos_minimize([bowls[0], lambda x: value if float(x[0]) > 0.609 else 0.0], START, rounds=1, **QUICK)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": -1}, "rounds must be >= 0"),
        ({"local_steps": 0}, "local_steps must be >= 1"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"gamma": -1.0}, "gamma must be >= 0"),
        ({"n_features": 0}, "n_features must be >= 1"),
        ({"lengthscale": "long"}, "lengthscale must be a number, 'auto' or 'fit', got 'long'"),
        ({"lengthscale": -1.0}, "lengthscale must be > 0"),
        ({"noise": "some"}, "noise must be a number or 'auto', got 'some'"),
        ({"noise": -1.0}, "noise must be >= 0"),
        ({"active": 5, "active_pool": 4}, "active_pool must be >= 5"),
        ({"sync_active": 5, "sync_pool": 4}, "sync_pool must be >= 5"),
        ({"radius": 0.0}, "radius must be > 0"),
        ({"max_local": 0}, "max_local must be >= 1"),
        ({"bounds": (1.0, 0.0)}, "the lowest value below the highest"),
        ({"bounds": (0.0, math.inf)}, "bounds must be finite"),
        ({"bounds": ([0.0, 0.0], 1.0)}, "have length 5"),
        ({"bounds": (0.0, 0.5)}, "the start lies outside of the bounds"),
        ({"max_dim": 4}, "there are 5 coordinates to search, above max_dim=4: a client keeps every query"),
        ({"fns": []}, "at least one function"),
        ({"x0": START / 0}, "finite"),
        ({"x0": START[None]}, "vector"),
    ],
)
def test_wrong_arguments(changes, message):
    arguments = {"fns": bowls, "x0": START, "rounds": 1, **QUICK, **changes}
    with pytest.raises(ValueError, match=message):
        fzoos_minimize(arguments.pop("fns"), arguments.pop("x0"), **arguments)


def on_a_rank(_):
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    start = START if rank == 0 else START + 1  # that of rank 0 counts
    result = fzoos_minimize(bowl(rank), start, rounds=3, **QUICK, group=dist.group.WORLD)
    try:
        fzoos_minimize(bowls, START, rounds=1, group=dist.group.WORLD)
    except ValueError as error:
        message = str(error)
    return [result.points, result.objective, result.queries, result.num_bytes, message]


def test_ranks_of_a_group_are_simulated_clients():
    here = fzoos_minimize(bowls, START, rounds=3, **QUICK)
    for points, objective, queries, num_bytes, message in on_two_ranks(on_a_rank, None):
        torch.testing.assert_close(points, here.points, rtol=0, atol=1e-10)
        torch.testing.assert_close(objective, here.objective, rtol=0, atol=1e-10)
        assert torch.equal(queries, here.queries)
        assert torch.equal(num_bytes, here.num_bytes)
        assert "fns must be one function" in message


def test_finite_differences_are_gradients_of_a_linear_function():
    slope = torch.linspace(-1, 1, D, dtype=torch.float64)
    result = fedzo_minimize([lambda x: x @ slope] * 2, START, rounds=1, local_steps=1, lr=0.1, directions=D)
    torch.testing.assert_close(
        result.x, START - 0.1 * slope.sign(), rtol=0, atol=1e-5
    )  # Adam's first step; eps / slope
    assert result.queries.tolist() == [0, 2 * (D + 1)]


def test_corrections_of_the_baselines():
    # no clients differ: SCAFFOLD adds nothing; FedProx pulls back to the round's start, so it goes less far
    fn = lambda x: x.sum()  # noqa: E731
    runs = {
        correction: fedzo_minimize([fn, fn], START, rounds=3, correction=correction, directions=D, bounds=None)
        for correction in ("none", "prox", "scaffold")
    }
    torch.testing.assert_close(runs["scaffold"].x, runs["none"].x, rtol=0, atol=1e-10)
    assert float((runs["prox"].x - START).norm()) < 0.99 * float((runs["none"].x - START).norm())
    assert runs["scaffold"].num_bytes[-1] == 2 * runs["none"].num_bytes[-1] == 3 * 2 * 2 * 8 * D
    # where they do, it brings the mean of their ends nearer to the best of the mean
    fns = [lambda x: 10 * (x - 0.2).square().sum(), lambda x: (x - 0.9).square().sum()]
    best = (10 * 0.2 + 0.9) / 11
    gaps = [
        float((fedzo_minimize(fns, START, rounds=12, correction=c, lr=0.03, directions=D).x - best).abs().max())
        for c in ("none", "scaffold")
    ]
    assert gaps[1] < 0.7 * gaps[0], gaps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correction": "scafold"}, "Did you mean 'scaffold'"),
        ({"directions": 0}, "directions must be >= 1"),
        ({"mu": 0.0}, "mu must be > 0"),
        ({"rounds": -1}, "rounds must be >= 0"),
        ({"fns": [lambda x: math.nan]}, "client 0 is nan"),
    ],
)
def test_wrong_arguments_of_the_baselines(changes, message):
    arguments = {"fns": bowls, "rounds": 1, **changes}
    with pytest.raises(ValueError, match=message):
        fedzo_minimize(arguments.pop("fns"), START, **arguments)
