"""A network as the list of random seeds that made it (arXiv:1712.06567, section 3.1)."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lightning_opt._checks import check_interval

Init = Tensor | Callable[[int], Tensor]
SEEDS = 2**32  # torch's CPU generator uses 32 bits of a seed


@dataclasses.dataclass(frozen=True)
class Genome:
    """Seeds and powers of mutations: ``theta = init(seeds[0])``, then ``theta += powers[i] * noise(seeds[i + 1])``.

    With one seed more than powers the first seed draws the initial weights. With as many seeds as powers the mutations
    start from weights that are given, and the empty genome stands for those.

    Attributes:
        seeds: Each in [0, 2^32).
        powers: Standard deviation of each mutation, rounded to float32.

    Raises:
        ValueError: If the numbers of seeds and powers do not fit, or one is out of its range.

    Example:
        >>> child = Genome(seeds=(7,)).mutated(seed=3, power=0.05)
        >>> child.seeds, len(child), len(child.to_bytes())
        ((7, 3), 1, 12)
    """

    seeds: tuple[int, ...] = ()
    powers: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.seeds) - len(self.powers) not in (0, 1):
            raise ValueError(
                f"{len(self.seeds)} seeds and {len(self.powers)} powers: seeds may be one more, or as many"
            )
        for seed in self.seeds:
            check_interval("seed", seed, 0, SEEDS, closed="[)")
        for power in self.powers:
            check_interval("power", power, 0, closed="()")
        object.__setattr__(self, "seeds", tuple(map(int, self.seeds)))
        object.__setattr__(self, "powers", tuple(float(np.float32(power)) for power in self.powers))

    def __len__(self) -> int:
        """The number of mutations."""
        return len(self.powers)

    @property
    def init_seed(self) -> int | None:
        """The seed of the initial weights; None if the mutations start from given weights."""
        return self.seeds[0] if len(self.seeds) > len(self.powers) else None

    @property
    def parent(self) -> "Genome":
        """The genome without its last mutation."""
        return Genome(self.seeds[:-1], self.powers[:-1])

    def mutated(self, seed: int, power: float) -> "Genome":
        """The genome with one mutation more."""
        return Genome((*self.seeds, seed), (*self.powers, power))

    def to_bytes(self) -> bytes:
        """Seeds as uint32, then powers as float32, little-endian: 8 bytes a mutation, and 4 of an initial seed."""
        return np.array(self.seeds, "<u4").tobytes() + np.array(self.powers, "<f4").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Genome":
        """The inverse of :meth:`to_bytes`.

        Raises:
            ValueError: If the bytes are no genome.
        """
        if len(data) % 4:
            raise ValueError(f"a genome has a multiple of 4 bytes, got {len(data)}")
        seeds = (len(data) // 4 + 1) // 2
        return cls(
            tuple(np.frombuffer(data[: 4 * seeds], "<u4").tolist()),
            tuple(np.frombuffer(data[4 * seeds :], "<f4").tolist()),
        )


def decode(genome: Genome, init: Init) -> Tensor:
    """The weights of a genome.

    Noise is added strictly from left to right, each mutation rounded on its own, so the bits are those of the weights
    that were built up over the generations, on any device. They depend on torch's normal generator: on its version
    and on the instruction set that it uses.

    Args:
        genome: With or without a seed of initial weights, as ``init`` asks.
        init: The given initial weights ``[P]``, or the function that draws them from a seed; float32 or float64.

    Returns:
        A new tensor ``[P]``.

    Raises:
        ValueError: If the genome has an initial seed and ``init`` is a tensor, or the other way round.

    Cost: P normal numbers a mutation.

    Example:
        >>> genome = Genome((1, 2), (0.1, 0.2))
        >>> parent = decode(genome.parent, torch.zeros(3))
        >>> torch.equal(decode(genome, torch.zeros(3)), parent + perturbation(2, parent, genome.powers[1]))
        True
    """
    weights = initial_weights(genome, init)
    start = 0 if genome.init_seed is None else 1
    for seed, power in zip(genome.seeds[start:], genome.powers, strict=True):
        weights += perturbation(seed, weights, power)
    return weights


def initial_weights(genome: Genome, init: Init) -> Tensor:
    """A new tensor with the weights before any mutation.

    Raises:
        ValueError: As :func:`decode`.
    """
    if isinstance(init, Tensor):
        if genome.init_seed is not None:
            raise ValueError("the genome draws its initial weights from a seed: init must be a function of a seed")
        return init.detach().clone()
    if genome.init_seed is None:
        raise ValueError("the genome mutates given weights: init must be a tensor")
    return init(genome.init_seed)


def perturbation(seed: int, like: Tensor, power: float) -> Tensor:
    """``power * N(0, I)`` in the shape and dtype of a tensor, drawn on the CPU from a seed of its own."""
    noise = torch.randn(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(seed))
    # the product is rounded before it is added: a fused sum would depend on how a loop is vectorized
    return noise.mul_(power).to(like.device)
