import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_opt._checks import check_interval
from lightning_opt.registry import register

from .decoder import GenomeDecoder
from .genome import Genome, Init
from .mutation_power import MutationPower
from .novelty import Novelty
from .search import Generation, GeneticSearch

Fitness = Callable[[Tensor], Any]


@dataclasses.dataclass(frozen=True)
class DeepGAResult:
    """What a run of :func:`deep_ga` found.

    Attributes:
        elite: The genome of the best individual.
        weights: Its weights ``[P]``.
        fitness: Its fitness, or the mean of its validation.
        evaluations: Calls of the fitness, counted by individual.
        history: One entry a generation.
        state: Continues the run: give it to ``deep_ga`` again.
    """

    elite: Genome
    weights: Tensor
    fitness: float
    evaluations: int
    history: list[Generation]
    state: dict[str, Any]


@register(
    "solver",
    summary="genetic algorithm on seed lists, for weights of any number and fitness of any kind",
    paper="1712.06567",
    card="deep-neuroevolution",
)
@torch.no_grad()
def deep_ga(
    fitness: Fitness,
    init: int | Init,
    *,
    generations: int = 100,
    population: int = 100,
    truncation: int = 20,
    mutation_power: MutationPower = 0.02,
    elite_candidates: int = 1,
    elite_episodes: int = 0,
    novelty: Novelty | None = None,
    seed: int = 0,
    vectorized: bool = False,
    chunk_size: int = 64,
    target: float | None = None,
    state: dict[str, Any] | None = None,
) -> DeepGAResult:
    """Maximize a function of a vector that may be neither differentiable nor exact, by a genetic algorithm.

    An individual is the list of random seeds of its mutations, so memory is that of ``truncation`` and ``chunk_size``
    vectors, whatever the population, and the result is a few kilobytes. See :class:`GeneticSearch` for the algorithm.

    Source: arXiv:1712.06567.

    Args:
        fitness: Takes weights ``[P]`` and returns a number, more being better; with ``novelty`` the pair of it and the
            behavior, a vector of the same length for all (see :func:`pad_behaviors`). With ``vectorized`` it takes
            ``[n, P]`` and returns ``[n]``, or the pair of it and ``[n, d]``.
        init: Initial weights ``[P]``; or a function that draws them from a seed, such as :func:`fan_in_init` makes it;
            or P, for zeros.
        generations: At most so many in this call.
        population: Individuals of a generation.
        truncation: Parents; 0 for random search.
        mutation_power: Standard deviation of a mutation, or a function of the generation such as
            :class:`PowerSchedule`.
        elite_candidates: With noisy fitness: so many of the best are measured again to choose the elite.
        elite_episodes: How often.
        novelty: Select by novelty; the result is still the fittest.
        seed: Of all choices.
        vectorized: Evaluate ``chunk_size`` individuals at once.
        chunk_size: See there.
        target: Stop when the elite has this fitness.
        state: ``result.state`` of a run to continue, with the same ``init`` and settings.

    Returns:
        The elite with its weights.

    Raises:
        ValueError: If an argument is out of its range, all individuals have a fitness that is not finite, or the state
            is that of another search.

    Cost: ``population`` evaluations a generation, and ``elite_candidates * elite_episodes``; two normal numbers a
        weight and individual at most.

    Example:
        >>> result = deep_ga(lambda x: -x.square().sum(), torch.ones(5), generations=40, mutation_power=0.1)
        >>> result.fitness > -0.2, len(result.elite.to_bytes()) <= 8 * 40
        (True, True)
    """
    check_interval("generations", generations, 0)
    check_interval("chunk_size", chunk_size, 1)
    if isinstance(init, int):
        check_interval("init", init, 1)
        init = torch.zeros(init)
    search = GeneticSearch(
        population=population,
        truncation=truncation,
        mutation_power=mutation_power,
        elite_candidates=elite_candidates,
        elite_episodes=elite_episodes,
        novelty=novelty,
        seed=seed,
        initial_seeds=not isinstance(init, Tensor),
    )
    if state is not None:
        search.load_state_dict(state)
    if search.elite is None and generations == 0:
        raise ValueError("generations must be >= 1 without a state to continue, got 0")
    decoder = GenomeDecoder(init)
    decoder.remember(_kept(search))

    def evaluate(genomes: list[Genome]) -> tuple[Tensor, Tensor | None]:
        size = chunk_size if vectorized else 1
        parts = []
        for start in range(0, len(genomes), size):
            weights = decoder.stack(genomes[start : start + size])
            result = fitness(weights if vectorized else weights[0])
            values, behavior = result if isinstance(result, tuple) else (result, None)
            values = torch.as_tensor(values).reshape(len(weights))
            parts.append((values, None if behavior is None else torch.as_tensor(behavior).reshape(len(weights), -1)))
        values, behaviors = torch.cat([v for v, _ in parts]), [b for _, b in parts if b is not None]
        return values, torch.cat(behaviors) if behaviors else None

    history = []
    for _ in range(generations):
        if target is not None and search.elite_score >= target:
            break
        genomes = search.ask()
        values, behavior = evaluate(genomes)
        candidates = search.candidates(values)
        scores = None
        if candidates:
            again = [evaluate([genomes[i] for i in candidates])[0].double() for _ in range(elite_episodes)]
            scores = torch.stack(again).mean(dim=0)
        history.append(search.tell(values, behavior, scores))
        decoder.remember(_kept(search))
    assert search.elite is not None
    weights = decoder.weights(search.elite)
    return DeepGAResult(search.elite, weights, search.elite_score, search.evaluations, history, search.state_dict())


def _kept(search: GeneticSearch) -> list[Genome]:
    """The genomes that the next generation is made of."""
    return [*search.parents, *([] if search.elite is None else [search.elite])]
