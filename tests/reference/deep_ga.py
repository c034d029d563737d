"""A genetic algorithm that keeps all weights of the population (arXiv:1712.06567, algorithm 1), in numpy."""

import numpy as np
import torch


def dense_ga(fitness, start, *, generations, population, truncation, power, seed, initial=None, random_search=False):
    """Run it with the package's draws.

    Args:
        fitness: Of a vector.
        start: Weights that mutations start from, if ``initial`` is None.
        generations: How many.
        population: Individuals, the elite among them.
        truncation: Parents.
        power: Of a mutation.
        seed: Of the draws.
        initial: Draws initial weights from a seed.
        random_search: Fresh weights in every generation.

    Returns:
        Elite weights and fitness of every generation.
    """
    elites, parents, elite = [], None, None
    for generation in range(generations):
        draws = np.random.default_rng((seed, generation, 0))
        seeds = draws.integers(2**32, size=population).tolist()
        if parents is None or random_search:
            weights = [initial(s) if initial else start + power * noise(s, start) for s in seeds]
            if initial is None and elite is None:
                weights[0] = start.copy()
        else:
            chosen = draws.integers(len(parents), size=population)
            weights = [parents[k] + power * noise(s, parents[k]) for k, s in zip(chosen, seeds, strict=True)]
        if elite is not None:
            weights[0] = elite
        values = np.array([fitness(w) for w in weights])
        order = np.argsort(-values, kind="stable")
        elite = weights[order[0]]
        parents = [weights[k] for k in order[:truncation]]
        elites.append((elite, values[order[0]]))
    return elites


def noise(seed, like):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, dtype=torch.float64, generator=generator).numpy()
