import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_opt._checks import check_interval


@dataclasses.dataclass(frozen=True)
class Novelty:
    """Novelty search: behavior that differs from what was seen is selected, and fitness is not looked at.

    Attributes:
        k: Nearest neighbors whose mean distance is the novelty.
        archive_prob: Probability with which an individual enters the archive of behaviors that stay.

    Raises:
        ValueError: If a number is out of its range.
    """

    k: int = 25
    archive_prob: float = 0.01

    def __post_init__(self) -> None:
        check_interval("k", self.k, 1)
        check_interval("archive_prob", self.archive_prob, 0, 1)


def novelty_scores(b: Tensor, archive: Tensor | None, k: int) -> Tensor:
    """Mean Euclidean distance of each behavior to its nearest neighbors among the others and the archive.

    Source: arXiv:1712.06567, section 3.3, after Lehman and Stanley (2011).

    Args:
        b: Behaviors of a population ``[N, d]``.
        archive: Earlier behaviors ``[M, d]``, or None.
        k: Number of neighbors; all there are if there are fewer.

    Returns:
        ``[N]``, in the dtype of ``b``; 0 for a behavior with ``k`` duplicates.

    Raises:
        ValueError: If the shapes do not fit, or there is no neighbor.

    Cost: N (N + M) distances.

    Example:
        >>> novelty_scores(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[5.0]]), k=1)
        tensor([1., 1., 2.])
    """
    check_interval("k", k, 1)
    if b.ndim != 2:
        raise ValueError(f"b must have the shape [N, d], got {list(b.shape)}")
    others = b if archive is None or not len(archive) else torch.cat([b, archive.to(b)])
    if len(others) < 2:
        raise ValueError("a single behavior has no neighbor")
    # by differences, not by products: equal behaviors have a distance of exactly 0
    distances = torch.cdist(b, others, compute_mode="donot_use_mm_for_euclid_dist")
    distances[range(len(b)), range(len(b))] = torch.inf  # oneself is no neighbor
    return distances.topk(min(k, len(others) - 1), largest=False).values.mean(dim=1)


def pad_behaviors(behaviors: Sequence[Tensor]) -> Tensor:
    """Behaviors of different length as one tensor: the shorter ones repeat their last element.

    Args:
        behaviors: N tensors ``[length, ...]``, none empty.

    Returns:
        ``[N, longest * ...]``.

    Raises:
        ValueError: If one is empty.

    Example:
        >>> pad_behaviors([torch.tensor([1.0, 2.0]), torch.tensor([3.0])])
        tensor([[1., 2.],
                [3., 3.]])
    """
    if not behaviors or not all(len(behavior) for behavior in behaviors):
        raise ValueError("every behavior must have at least one element")
    longest = max(map(len, behaviors))
    padded = [torch.cat([b, b[-1:].expand(longest - len(b), *b.shape[1:])]) for b in behaviors]
    return torch.stack(padded).flatten(1)
