"""The genetic algorithm itself: it asks for genomes and is told their fitness."""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_opt._checks import check_interval

from .genome import SEEDS, Genome
from .mutation_power import MutationPower, power_at
from .novelty import Novelty, novelty_scores


@dataclasses.dataclass(frozen=True)
class Generation:
    """What one generation came to.

    Attributes:
        best: The largest fitness.
        mean: The mean of the finite ones.
        elite_score: Fitness of the elite, or the mean of its validation.
        sigma: Mutation power of the children.
        nonfinite: Individuals whose fitness is NaN or infinite.
        novelty_mean: Mean novelty, or None.
    """

    best: float
    mean: float
    elite_score: float
    sigma: float
    nonfinite: int
    novelty_mean: float | None = None


class GeneticSearch:
    """Truncation selection with one elite, mutation only.

    A generation is the unchanged elite and ``population - 1`` children of the ``truncation`` best of the last one, the
    elite among them, each with one mutation more than its parent; the first is ``population`` initial genomes. With
    ``truncation=0`` it is random search: fresh genomes beside the elite. With ``novelty`` parents are the most novel,
    all individuals are children, and the elite, the fittest ever seen, is only kept.

    Everything is drawn from ``(seed, generation)``, so ranks that are told the same fitness ask for the same genomes,
    and the state holds no generator. An individual without finite fitness is neither parent nor elite.

    Source: arXiv:1712.06567, algorithm 1 and section 3.3, and the authors' code.

    Args:
        population: Individuals of a generation.
        truncation: Parents; 0 for random search.
        mutation_power: Standard deviation of a mutation, or a function of the generation.
        elite_candidates: The best individuals whose fitness is measured again to choose the elite; 1: the fittest is.
        elite_episodes: How often it is measured.
        novelty: Search for novelty.
        seed: Of all choices.
        initial_seeds: Whether genomes begin with the seed of initial weights, or mutate given ones.

    Raises:
        ValueError: If a number is out of its range, or several candidates are asked for and no episodes, or the other
            way round.

    Example:
        >>> search = GeneticSearch(population=4, truncation=2, mutation_power=0.1)
        >>> genomes = search.ask()
        >>> search.tell(torch.tensor([0.0, 2.0, 1.0, torch.nan])).best
        2.0
        >>> search.elite == genomes[1], search.parents == [genomes[1], genomes[2]]
        (True, True)
    """

    def __init__(
        self,
        *,
        population: int = 100,
        truncation: int = 20,
        mutation_power: MutationPower = 0.02,
        elite_candidates: int = 1,
        elite_episodes: int = 0,
        novelty: Novelty | None = None,
        seed: int = 0,
        initial_seeds: bool = False,
    ) -> None:
        check_interval("population", population, 2)
        check_interval("truncation", truncation, 0, population)
        check_interval("elite_candidates", elite_candidates, 1, population)
        check_interval("elite_episodes", elite_episodes, 0)
        check_interval("seed", seed, 0)
        if (elite_candidates > 1) != (elite_episodes > 0):
            raise ValueError(
                "elite_candidates above 1 and elite_episodes above 0 need each other, got"
                f" elite_candidates={elite_candidates}, elite_episodes={elite_episodes}"
            )
        if novelty is not None and truncation == 0:
            raise ValueError("truncation must be >= 1 with novelty, got 0, which is random search")
        power_at(mutation_power, 0)
        self.population, self.truncation, self.mutation_power = population, truncation, mutation_power
        self.elite_candidates, self.elite_episodes = elite_candidates, elite_episodes
        self.novelty, self.seed, self.initial_seeds = novelty, seed, initial_seeds
        self.generation = 0
        self.evaluations = 0
        self.parents: list[Genome] = []
        self.elite: Genome | None = None
        self.elite_score = -torch.inf
        self.archive: Tensor | None = None

    def ask(self) -> list[Genome]:
        """The genomes of this generation, the same however often it is asked."""
        random = np.random.default_rng((self.seed, self.generation, 0))
        seeds = random.integers(SEEDS, size=self.population).tolist()
        power = power_at(self.mutation_power, self.generation)
        carried = [self.elite] if self.elite is not None and self.novelty is None else []
        if not self.parents:
            fresh = [Genome((seed,)) if self.initial_seeds else Genome((seed,), (power,)) for seed in seeds]
            first = carried if self.initial_seeds else carried or [Genome()]
            return [*first, *fresh[len(first) :]]
        chosen = random.integers(len(self.parents), size=self.population).tolist()
        children = [self.parents[i].mutated(seed, power) for i, seed in zip(chosen, seeds, strict=True)]
        return [*carried, *children[len(carried) :]]

    def candidates(self, fitness: Tensor) -> list[int]:
        """The individuals whose fitness is to be measured again, the elite among them; none if that is not asked for.

        Args:
            fitness: ``[population]``, of the genomes in their order.
        """
        if not self.elite_episodes:
            return []
        ranked = _ranked(fitness, torch.isfinite(fitness))
        carried = [0] if self.elite is not None and self.novelty is None and 0 in ranked else []
        best = [i for i in ranked if i not in carried]
        return [*carried, *best[: self.elite_candidates - len(carried)]]

    def tell(
        self, fitness: Tensor, behavior: Tensor | None = None, candidate_scores: Tensor | None = None
    ) -> Generation:
        """Choose elite and parents, and go on to the next generation.

        Args:
            fitness: ``[population]``, more is better.
            behavior: ``[population, d]``, with novelty.
            candidate_scores: Mean fitness of the :meth:`candidates` over their episodes.

        Raises:
            ValueError: If no fitness is finite, or an argument is missing. Nothing is changed then.
        """
        fitness = torch.as_tensor(fitness).detach().double().cpu()
        if fitness.shape != (self.population,):
            raise ValueError(f"fitness must have the shape [{self.population}], got {list(fitness.shape)}")
        usable = torch.isfinite(fitness)
        if not usable.any():
            raise ValueError(
                f"generation {self.generation}: the fitness of all {self.population} individuals is NaN or infinite"
            )
        sigma = power_at(self.mutation_power, self.generation)
        mean, best, count = fitness[usable].mean().item(), fitness[usable].max().item(), int((~usable).sum())
        scores = fitness
        if self.novelty is not None:
            scores, usable = self._novelty(behavior, usable)
        genomes = self.ask()
        elite, elite_score = self._elite(genomes, fitness, candidate_scores)
        parents = [genomes[i] for i in _ranked(scores, usable)[: self.truncation]]
        if self.novelty is None and self.truncation and elite not in parents:
            parents = [elite, *parents[: self.truncation - 1]]
        if self.novelty is not None:
            self._extend_archive(behavior, usable)
        self.elite, self.elite_score, self.parents = elite, elite_score, parents
        self.evaluations += self.population + len(self.candidates(fitness)) * self.elite_episodes
        self.generation += 1
        novelty_mean = scores[usable].mean().item() if self.novelty is not None else None
        return Generation(best, mean, elite_score, sigma, count, novelty_mean)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and builtins: genomes as hexadecimal text (torch reloads no empty bytes), no weights."""
        return {
            "settings": self._settings(),
            "generation": self.generation,
            "evaluations": self.evaluations,
            "parents": [genome.to_bytes().hex() for genome in self.parents],
            "elite": None if self.elite is None else self.elite.to_bytes().hex(),
            "elite_score": self.elite_score,
            "archive": self.archive,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: If it is that of a search with other settings; the mutation power may differ.
        """
        differences = [
            f"{name}={state['settings'].get(name)} there, {value} here"
            for name, value in self._settings().items()
            if state["settings"].get(name) != value
        ]
        if differences:
            raise ValueError(f"the state is of another search: {', '.join(differences)}")
        self.generation, self.evaluations = state["generation"], state["evaluations"]
        self.parents = [Genome.from_bytes(bytes.fromhex(data)) for data in state["parents"]]
        self.elite = None if state["elite"] is None else Genome.from_bytes(bytes.fromhex(state["elite"]))
        self.elite_score, self.archive = state["elite_score"], state["archive"]

    def _settings(self) -> dict[str, Any]:
        names = ("population", "truncation", "elite_candidates", "elite_episodes", "seed", "initial_seeds")
        novelty = None if self.novelty is None else dataclasses.asdict(self.novelty)
        return {**{name: getattr(self, name) for name in names}, "novelty": novelty}

    def _elite(self, genomes: list[Genome], fitness: Tensor, scores: Tensor | None) -> tuple[Genome, float]:
        among = self.candidates(fitness)
        if among:
            if scores is None or scores.shape != (len(among),):
                raise ValueError(f"candidate_scores must have the shape [{len(among)}]")
            scores = scores.detach().double().cpu()
            if not torch.isfinite(scores).any():  # the episodes tell nothing: take the fitness
                scores = fitness[among]
        else:
            among, scores = list(range(self.population)), fitness
        best = _ranked(scores, torch.isfinite(scores))[0]
        elite, score = genomes[among[best]], scores[best].item()
        if self.novelty is not None and self.elite is not None and score <= self.elite_score:
            return self.elite, self.elite_score
        return elite, score

    def _novelty(self, behavior: Tensor | None, usable: Tensor) -> tuple[Tensor, Tensor]:
        assert self.novelty is not None
        if behavior is None or behavior.ndim != 2 or len(behavior) != self.population:
            found = "None" if behavior is None else list(behavior.shape)
            raise ValueError(f"novelty needs behavior of the shape [{self.population}, d], got {found}")
        behavior = behavior.detach().double().cpu()
        usable = usable & torch.isfinite(behavior).all(dim=1)
        if not usable.any():
            raise ValueError(f"generation {self.generation}: no individual has finite fitness and behavior")
        scores = torch.zeros(self.population, dtype=torch.float64)
        if usable.sum() > 1 or self.archive is not None:
            scores[usable] = novelty_scores(behavior[usable], self.archive, self.novelty.k)
        return scores, usable

    def _extend_archive(self, behavior: Tensor | None, usable: Tensor) -> None:
        assert self.novelty is not None
        assert behavior is not None
        draws = np.random.default_rng((self.seed, self.generation, 1)).random(self.population)
        enters = usable & (torch.from_numpy(draws) < self.novelty.archive_prob)
        if enters.any():
            new = behavior.detach().double().cpu()[enters]
            self.archive = new if self.archive is None else torch.cat([self.archive, new])


def _ranked(scores: Tensor, usable: Tensor) -> list[int]:
    """The usable individuals, best first; of equal ones the first."""
    order = scores.argsort(descending=True, stable=True).tolist()
    return [i for i in order if usable[i]]
