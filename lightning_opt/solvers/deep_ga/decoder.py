import torch
from torch import Tensor

from .genome import Genome, Init, decode, perturbation


class GenomeDecoder:
    """Decodes children of a few remembered genomes at the cost of one mutation each.

    The bits are those of :func:`decode`.

    Args:
        init: As for :func:`decode`.

    Cost: the memory of the weights that are remembered.

    Example:
        >>> decoder = GenomeDecoder(torch.zeros(5))
        >>> parent = Genome((1,), (0.1,))
        >>> decoder.remember([parent])
        >>> child = parent.mutated(2, 0.1)
        >>> torch.equal(decoder.weights(child), decode(child, torch.zeros(5)))
        True
    """

    def __init__(self, init: Init) -> None:
        self.init = init
        self._known: dict[Genome, Tensor] = {}

    def weights(self, genome: Genome) -> Tensor:
        """A new tensor ``[P]``."""
        if genome in self._known:
            return self._known[genome].clone()
        if len(genome) and genome.parent in self._known:
            known = self._known[genome.parent]
            return known + perturbation(genome.seeds[-1], known, genome.powers[-1])
        return decode(genome, self.init)

    def stack(self, genomes: list[Genome]) -> Tensor:
        """The weights of several genomes, ``[n, P]``."""
        return torch.stack([self.weights(genome) for genome in genomes])

    def remember(self, genomes: list[Genome]) -> None:
        """Keep the weights of these genomes, and of no others."""
        self._known = {genome: self.weights(genome) for genome in dict.fromkeys(genomes)}
