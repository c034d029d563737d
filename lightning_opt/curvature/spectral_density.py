"""The density of a spectrum by stochastic Lanczos quadrature (Ubaru, Chen, Saad, 2017; Ghorbani et al., 2019)."""

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_opt._checks import check_interval
from lightning_opt.registry import register

from .lanczos import lanczos
from .operator import CurvatureOperator


class Moment(NamedTuple):
    """A mean over probes with its standard error."""

    value: float
    stderr: float


@dataclasses.dataclass(frozen=True)
class SpectralDensity:
    r"""A quadrature of the spectrum.

    .. math::
        \frac 1 n \sum_i f(\lambda_i) \approx \frac 1 p \sum_{j=1}^p \sum_{l=1}^m w_{jl}\, f(\theta_{jl})

    Attributes:
        nodes: Ritz values of each probe, ``[p, m]``, ascending, float64 on the CPU.
        weights: Their weights, ``[p, m]``; each row has sum 1. Where a probe stopped early, its first entries weigh 0.
        size: n, the number of eigenvalues.
        products: Products made.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    products: int

    def moment(self, order: int) -> Moment:
        r"""The mean of :math:`\lambda^{order}` over the spectrum, with its standard error over probes.

        Raises:
            ValueError: If ``order`` is negative.
        """
        check_interval("order", order, 0)
        return self.mean(self.nodes**order)

    def mean(self, values: Tensor) -> Moment:
        """The mean over the spectrum of a function, given its values at the nodes ``[p, m]``.

        The standard error is NaN for a single probe.
        """
        samples = (self.weights * values).sum(dim=1)
        return Moment(float(samples.mean()), standard_error(samples))

    def density(self, grid: Tensor, width: float) -> Tensor:
        """The density on a grid ``[g]``, with each node widened to a Gaussian; it integrates to one.

        Args:
            grid: Where to evaluate it.
            width: Standard deviation of the Gaussians, in units of the eigenvalues.

        Raises:
            ValueError: If ``width`` is not positive.
        """
        check_interval("width", width, 0, closed="()")
        grid = grid.to("cpu", torch.float64)
        kernel = torch.exp(-0.5 * ((grid[:, None] - self.nodes.flatten()) / width) ** 2) / (
            width * math.sqrt(2 * math.pi)
        )
        return kernel @ self.weights.flatten() / len(self.nodes)


@register("tool", summary="Spectral density of a curvature operator", paper="1901.10159", card="curvature")
def slq_density(
    operator: CurvatureOperator,
    num_steps: int,
    num_probes: int,
    *,
    generator: torch.Generator,
    reorthogonalize: bool = True,
) -> SpectralDensity:
    """Estimate the spectral density by Lanczos runs from random vectors.

    The moments up to order ``2 num_steps - 1`` of each probe are exact for its vector, and their mean over probes is
    an unbiased estimate of those of the spectrum; so more probes make them better, and more steps resolve more.

    Args:
        operator: Symmetric.
        num_steps: Lanczos steps a probe.
        num_probes: Random start vectors.
        generator: On the CPU: draws the vectors.
        reorthogonalize: As in :func:`lanczos`.

    Returns:
        Nodes and weights.

    Raises:
        ValueError: If an argument is out of range.
        NonFiniteCurvatureError: If a product holds NaN or infinity.

    Cost:
        ``num_steps * num_probes`` products, and the memory of one Lanczos run.

    Example:
        >>> import torch
        >>> from lightning_opt.curvature import MatrixOperator, slq_density
        >>> a = MatrixOperator(torch.diag(torch.linspace(-1, 3, 101, dtype=torch.float64)))
        >>> density = slq_density(a, 10, 20, generator=torch.Generator().manual_seed(0))
        >>> mean = density.moment(1)
        >>> abs(mean.value - 1) < 3 * mean.stderr
        True
    """
    check_interval("num_probes", num_probes, 1)
    runs = [
        lanczos(operator, num_steps, generator=generator, reorthogonalize=reorthogonalize) for _ in range(num_probes)
    ]
    longest = max(run.steps for run in runs)
    nodes, weights = torch.zeros(2, num_probes, longest, dtype=torch.float64)
    for row, run in enumerate(runs):
        nodes[row, : longest - run.steps] = run.ritz_values[0]
        nodes[row, longest - run.steps :] = run.ritz_values
        weights[row, longest - run.steps :] = run.weights
    return SpectralDensity(nodes, weights, operator.size, sum(run.products for run in runs))


def standard_error(samples: Tensor) -> float:
    """Of the mean of independent samples ``[k]``; NaN for a single one."""
    return float(samples.std(correction=1)) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
