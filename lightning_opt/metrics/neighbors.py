"""What nearest neighbors say of samples: precision and recall in features, copies of training images in pixels."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_opt._checks import check_interval
from lightning_opt.registry import register

from ._images import check_images
from .distances import Features, feature_pair


class PrecisionRecall(NamedTuple):
    """Shares of two sets of images that lie in each other's manifold.

    Attributes:
        precision: Share of the samples that lie among the reference images: low where samples are unlike any of them.
        recall: Share of the reference images that lie among the samples: low where the samples lack a kind of them.
    """

    precision: float
    recall: float


@register("tool", summary="Improved precision and recall of samples", paper="1904.06991")
def precision_recall(samples: Tensor, reference: Tensor, k: int = 3, features: Features = "auto") -> PrecisionRecall:
    r"""Improved precision and recall.

    The manifold of a set is the union of balls around the features of its members, each with the distance to the k-th
    nearest other member as its radius. Precision is the share of samples in the manifold of the reference, recall the
    share of the reference in the manifold of the samples. Two sets from one distribution have values well below 1,
    which depend on their size and k.

    Args:
        samples: ``[N, C, H, W]``, floating point in [0, 1].
        reference: As many images.
        k: Which neighbor gives the radius.
        features: As for :func:`frechet_distance`.

    Returns:
        Both shares.

    Raises:
        ValueError: If the sets differ in size, are not images in [0, 1], or ``k`` is not in [1, N - 1].

    Cost: one pass of the net over both sets; N x N distances four times, 256 rows at a time.

    Source: arXiv 1904.06991, equations 1 and 2.

    Example:
        >>> reference = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> precision_recall(torch.tensor([[0.0], [0.1], [20.0], [20.1]]), reference, k=1, features=None)
        PrecisionRecall(precision=0.5, recall=0.25)
    """
    a, b = feature_pair(samples, reference, features)
    check_interval("k", k, 1, len(a) - 1)
    return PrecisionRecall(precision=_share_inside(a, b, k), recall=_share_inside(b, a, k))


@register("tool", summary="Distance of each sample to the nearest training image: finds copies")
def nearest_neighbor_distance(samples: Tensor, train: Tensor) -> Tensor:
    """Distance of each image to the nearest of the training images, in pixels: 0 for a copy.

    Compare with the distances of held-out images: a model that has memorized comes much nearer than they do.

    Args:
        samples: ``[N, C, H, W]``, floating point in [0, 1].
        train: ``[M, C, H, W]``, likewise.

    Returns:
        ``[N]``, float64: root mean square of the difference of the pixels.

    Raises:
        ValueError: If the images are not in [0, 1] or differ in shape.

    Cost: N x M products of images, 256 rows at a time.

    Example:
        >>> train = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4)
        >>> nearest_neighbor_distance(torch.full((1, 1, 4, 4), 0.75), train)
        tensor([0.2500], dtype=torch.float64)
    """
    check_images("samples", samples)
    check_images("train", train, tuple(samples.shape[1:]))
    a, b = samples.detach().flatten(1).float(), train.detach().flatten(1).float().to(samples.device)
    distances = []
    for part in a.split(_ROWS):
        # a product finds the neighbor quickly, but its rounding would hide a copy
        nearest = (b.square().sum(1) - 2 * part @ b.T).argmin(dim=1)
        distances.append((part.double() - b[nearest].double()).square().mean(dim=1).sqrt())
    return torch.cat(distances)


_ROWS = 256


def _share_inside(points: Tensor, centers: Tensor, k: int) -> float:
    radii = torch.cat(
        [_distances(part, centers).kthvalue(k + 1).values for part in centers.split(_ROWS)]
    )  # first: itself
    inside = [(_distances(part, centers) <= radii).any(dim=1) for part in points.split(_ROWS)]
    return float(torch.cat(inside).double().mean())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
