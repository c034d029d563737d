import copy

import numpy as np
import pytest
import torch

from lightning_opt.solvers.deep_ga import DeceptiveMaze, GeneticSearch, Genome, Novelty, PowerSchedule, deep_ga
from tests.reference.deep_ga import dense_ga

SMALL = {"population": 12, "truncation": 4, "mutation_power": 0.25, "seed": 3}  # 0.25 is exact in float32


def sphere(weights):
    return -weights.square().sum(-1)


def initial(seed):
    return torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("truncation", [4, 1, 12, 0])
@pytest.mark.parametrize("seeded", [False, True])
def test_it_is_the_algorithm_with_dense_weights(vectorized, truncation, seeded):
    start = torch.ones(6, dtype=torch.float64)
    settings = {**SMALL, "truncation": truncation}
    init = initial if seeded else start
    result = deep_ga(sphere, init, generations=15, vectorized=vectorized, chunk_size=5, **settings)
    elites = dense_ga(
        lambda w: -np.sum(w**2),
        start.numpy(),
        generations=15,
        population=12,
        truncation=truncation,
        power=0.25,
        seed=3,
        initial=(lambda seed: initial(seed).numpy()) if seeded else None,
        random_search=truncation == 0,
    )
    np.testing.assert_allclose(result.weights.numpy(), elites[-1][0], rtol=1e-14)
    scores = [generation.elite_score for generation in result.history]
    np.testing.assert_allclose(scores, [score for _, score in elites], rtol=1e-14)
    assert result.evaluations == 15 * 12


def test_exact_fitness_never_falls():
    result = deep_ga(sphere, torch.ones(50), generations=40, **SMALL)
    scores = [generation.elite_score for generation in result.history]
    assert scores == sorted(scores)
    assert scores[-1] > scores[0]
    assert result.fitness == sphere(result.weights).item()


def test_children_of_one_parent_lie_around_it():
    """E|child|^2 = |parent|^2 + sigma^2 P, within 3 standard errors."""
    n, sigma, count = 100, 0.3, 400
    search = GeneticSearch(population=count + 1, truncation=1, mutation_power=sigma)
    norms: list = []

    def fitness(weights):
        norms.append(weights.square().sum().item())
        return -norms[-1]

    result = deep_ga(fitness, torch.ones(n), generations=2, population=count + 1, truncation=1, mutation_power=sigma)
    parent, *children = norms[count + 1 :]  # of the second generation: the elite, then its children
    assert parent == min(norms[: count + 1])
    children = np.array(children)
    assert abs(children.mean() - parent - sigma**2 * n) < 3 * children.std() / count**0.5
    assert len(result.elite) <= 2
    assert search.ask()[0] == Genome()


def test_without_noise_to_speak_of_nothing_changes():
    result = deep_ga(sphere, torch.ones(6), generations=5, population=8, truncation=8, mutation_power=1e-30)
    assert all(generation.mean == generation.best == -6.0 for generation in result.history)


def test_runs_continue_bit_for_bit():
    maze = DeceptiveMaze(steps=5)
    options = {**SMALL, "novelty": Novelty(k=3, archive_prob=0.3), "vectorized": True}
    whole = deep_ga(maze, maze.n_params, generations=9, **options)
    first = deep_ga(maze, maze.n_params, generations=4, **options)
    assert first.state["archive"] is not None
    again = deep_ga(maze, maze.n_params, generations=5, state=copy.deepcopy(first.state), **options)
    assert [*first.history, *again.history] == whole.history
    assert (again.elite, again.fitness, again.evaluations) == (whole.elite, whole.fitness, whole.evaluations)
    assert again.state["parents"] == whole.state["parents"]
    assert torch.equal(again.state["archive"], whole.state["archive"])
    assert torch.equal(again.weights, whole.weights)


def test_it_stops_at_the_target_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    result = deep_ga(sphere, torch.ones(3), generations=500, target=-0.5, **SMALL)
    assert result.fitness >= -0.5
    assert len(result.history) < 500
    assert all(generation.elite_score < -0.5 for generation in result.history[:-1])
    assert torch.equal(torch.get_rng_state(), before)


def test_individuals_without_a_finite_fitness_have_no_children():
    def fitness(weights):
        values = sphere(weights)
        return torch.where(weights[:, 0] > 1, torch.tensor([torch.nan, torch.inf])[weights[:, 1].gt(1).long()], values)

    result = deep_ga(fitness, torch.ones(4), generations=10, vectorized=True, **SMALL)
    assert result.history[0].nonfinite > 0
    assert np.isfinite(result.fitness)
    assert result.weights[0] <= 1


def test_all_individuals_without_a_finite_fitness():
    with pytest.raises(ValueError, match="generation 0: the fitness of all 12 individuals is NaN or infinite"):
        deep_ga(lambda w: w.sum() * torch.nan, 3, generations=1, **SMALL)
    search = GeneticSearch(**SMALL)
    with pytest.raises(ValueError, match="all 12"):
        search.tell(torch.full((12,), torch.inf))
    assert search.generation == 0


def test_the_elite_is_chosen_by_its_validation():
    search = GeneticSearch(**SMALL, elite_candidates=3, elite_episodes=2)
    genomes = search.ask()
    fitness = torch.arange(12.0)
    assert search.candidates(fitness) == [11, 10, 9]
    result = search.tell(fitness, candidate_scores=torch.tensor([1.0, 3.0, torch.nan]))
    assert search.elite == genomes[10]
    assert result.elite_score == 3
    assert search.parents == [genomes[i] for i in (11, 10, 9, 8)]
    assert search.evaluations == 12 + 3 * 2
    # in the next generation the elite is the first individual, and a candidate whatever its fitness
    genomes = search.ask()
    assert genomes[0] == search.elite
    assert search.candidates(fitness) == [0, 11, 10]
    search.tell(fitness, candidate_scores=torch.tensor([5.0, 4.0, 3.0]))
    assert search.elite == genomes[0]
    assert search.parents == [genomes[i] for i in (0, 11, 10, 9)]  # the elite in the place of the fourth


def test_validation_is_repeated_measurement():
    generator = torch.Generator().manual_seed(0)

    def noisy(weights):
        return sphere(weights) + torch.randn((), generator=generator)

    result = deep_ga(noisy, torch.ones(3), generations=6, elite_candidates=4, elite_episodes=5, **SMALL)
    assert result.evaluations == 6 * (12 + 4 * 5)


def test_novelty_selects_what_is_far_and_keeps_the_fittest():
    search = GeneticSearch(**SMALL, novelty=Novelty(k=2, archive_prob=1.0))
    genomes = search.ask()
    behavior = torch.zeros(12, 2)
    behavior[[2, 5, 7, 9]] = torch.tensor([[9.0, 0.0], [0.0, 8.0], [-7.0, 0.0], [0.0, -6.0]])
    fitness = -torch.arange(12.0)
    search.tell(fitness, behavior)
    assert search.parents == [genomes[i] for i in (2, 5, 7, 9)]
    assert search.elite == genomes[0]
    assert len(search.archive) == 12
    elite, genomes = search.elite, search.ask()
    assert elite not in genomes
    search.tell(fitness - 1, behavior)  # none is as fit
    assert search.elite == elite
    search.tell(fitness + 1, behavior)
    assert search.elite != elite


def test_archive_probability():
    search = GeneticSearch(population=500, truncation=5, novelty=Novelty(k=2, archive_prob=0.1))
    for _ in range(4):
        search.tell(torch.zeros(500), torch.randn(500, 2))
    assert abs(len(search.archive) - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5


def test_the_power_of_each_gene_follows_the_schedule():
    schedule = PowerSchedule(0.5, 0.125, 2)
    options = {**SMALL, "mutation_power": schedule, "truncation": 1}
    search = GeneticSearch(**options)
    for _ in range(4):
        search.tell(torch.arange(12.0))  # the last child is the fittest
    assert search.elite.powers == (0.5, 0.3125, 0.125, 0.125)
    exponential = PowerSchedule(0.5, 0.125, 2, kind="exponential")
    assert [round(exponential(g), 12) for g in range(4)] == [0.5, 0.25, 0.125, 0.125]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"population": 1}, "population"),
        ({"truncation": 13}, "truncation must be in"),
        ({"truncation": -1}, "truncation"),
        ({"truncation": 0, "novelty": Novelty()}, "random search"),
        ({"mutation_power": 0.0}, "mutation_power"),
        ({"mutation_power": lambda generation: -1.0}, "mutation_power"),
        ({"elite_candidates": 3}, "need each other"),
        ({"elite_episodes": 3}, "need each other"),
        ({"seed": -1}, "seed"),
        ({"generations": 0}, "generations"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_wrong_values(argument, message):
    with pytest.raises(ValueError, match=message):
        deep_ga(sphere, 3, **{**SMALL, **argument})


def test_wrong_answers():
    with pytest.raises(ValueError, match="novelty needs behavior"):
        deep_ga(sphere, 3, novelty=Novelty(), **SMALL)
    search = GeneticSearch(**SMALL)
    with pytest.raises(ValueError, match=r"fitness must have the shape \[12\]"):
        search.tell(torch.zeros(3))
    with pytest.raises(ValueError, match="no individual has finite fitness and behavior"):
        GeneticSearch(**SMALL, novelty=Novelty()).tell(torch.zeros(12), torch.full((12, 1), torch.nan))
    state = deep_ga(sphere, 3, generations=2, **SMALL).state
    with pytest.raises(ValueError, match="seed=3 there, 4 here"):
        deep_ga(sphere, 3, state=state, **{**SMALL, "seed": 4})
    with pytest.raises(ValueError, match="initial_seeds=False there, True here"):
        deep_ga(sphere, initial, state=state, **SMALL)
    for kind in ({"start": 0}, {"end": -1}, {"generations": 0}, {"kind": "cosine"}):
        with pytest.raises(ValueError, match=next(iter(kind))):
            PowerSchedule(**{"start": 0.1, "end": 0.1, "generations": 3, **kind})
