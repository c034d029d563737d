import torch
from torch import Tensor

from lightning_opt._checks import check_interval
from lightning_opt.registry import register

from ._images import check_images


@register("tool", summary="Sliced Wasserstein distance between two sets of images, without a network")
def sliced_wasserstein(samples: Tensor, reference: Tensor, *, directions: int = 256, seed: int = 0) -> float:
    """Wasserstein-1 distance of the pixels along random directions, the mean over directions.

    It needs no network, and so shows nothing that a network would be blind to or invent.

    Args:
        samples: ``[N, C, H, W]``, floating point in [0, 1].
        reference: As many images.
        directions: Number of random unit vectors in the space of pixels.
        seed: Seed of the directions; the global random state is neither used nor changed.

    Returns:
        The distance, in units of a pixel's value; 0 for the same set.

    Raises:
        ValueError: If the images are not in [0, 1] or the sets differ in size or shape.

    Cost: N x ``directions`` products of images, and a sort of each direction.

    Example:
        >>> zeros, ones = torch.zeros(5, 1, 1, 1), torch.ones(5, 1, 1, 1)
        >>> sliced_wasserstein(zeros, ones)
        1.0
    """
    check_images("samples", samples)
    check_images("reference", reference, tuple(samples.shape[1:]))
    check_interval("directions", directions, 1)
    if len(samples) != len(reference):
        raise ValueError(
            f"samples and reference must hold equally many images, got {len(samples)} and {len(reference)}"
        )
    a, b = samples.detach().flatten(1).double(), reference.detach().flatten(1).double().to(samples.device)
    vectors = torch.randn(a.shape[1], directions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vectors = (vectors / vectors.norm(dim=0)).to(a.device)
    return float(((a @ vectors).sort(dim=0).values - (b @ vectors).sort(dim=0).values).abs().mean())
