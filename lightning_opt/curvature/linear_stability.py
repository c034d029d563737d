"""Exact linear stability of stochastic gradient descent at an interpolating minimum, for small problems."""

import torch
from torch import Tensor

from lightning_opt._checks import check_interval

MAX_DIM = 2000  # of the space of second moments; its matrix is dense


def second_moment_radius(
    jacobian: Tensor, lr: float, batch_size: int, *, momentum: float = 0.0, replacement: bool = True
) -> float:
    r"""How much the second moments of linearized SGD grow a step: stable if at most 1.

    Near a minimum that fits every sample, the distance d follows
    :math:`d \leftarrow d - \frac{\eta}{B} \sum_{i \in \text{batch}} g_i g_i^T d`, and its second moment
    :math:`S = E[d d^T]` the linear map

    .. math:: S \mapsto (I - \eta G) S (I - \eta G) + \eta^2 \nu\, (E[g g^T S g g^T] - G S G), \quad G = E[g g^T],

    with :math:`\nu = 1 / B`, or :math:`(n - B) / (B (n - 1))` for batches without replacement. Its spectral radius is
    returned, on the span of the :math:`g_i`; across it nothing moves. With momentum the map is that of the second
    moments of :math:`(d_t, d_{t-1})`.

    Args:
        jacobian: ``[n, p]``; row i is the gradient of the model's output at sample i, for the loss
            :math:`\frac{1}{2n} \sum_i (f(x_i) - y_i)^2`.
        lr: :math:`\eta`.
        batch_size: :math:`B`.
        momentum: Of the heavy ball.
        replacement: Whether samples of a batch are drawn independently.

    Raises:
        ValueError: If a number is out of its range, or the rank is so large (above 62, or 31 with momentum) that the
            map does not fit a dense matrix of 2,000 rows.

    Cost: an eigendecomposition of order r (r + 1) / 2 for Jacobians of rank r, four times that with momentum.

    Source: arXiv:2305.17490, section 3 for B = 1; other batches and momentum are derived here.

    Example:
        >>> J = torch.eye(2, dtype=torch.float64)
        >>> round(second_moment_radius(J, 1.0, batch_size=1), 12)  # (1 - 2/2 + 1/2) of each direction
        0.5
    """
    check_interval("lr", lr, 0)
    check_interval("momentum", momentum, 0, 1, closed="[)")
    g = _in_span(jacobian)
    noise = _noise(len(g), batch_size, replacement)
    p = g.shape[1]
    eye = torch.eye(p, dtype=g.dtype)
    curvature = g.T @ g / len(g)
    if not momentum:
        step = eye - lr * curvature
        basis = _symmetric_basis(p)
        image = step @ basis @ step + lr**2 * noise * (_fourth(g, basis) - curvature @ basis @ curvature)
        return torch.linalg.eigvalsh(_matrix(basis, image))[-1].item()  # a positive map: its radius is an eigenvalue
    zero = torch.zeros_like(eye)
    step = torch.cat(
        [torch.cat([(1 + momentum) * eye - lr * curvature, -momentum * eye], 1), torch.cat([eye, zero], 1)]
    )
    basis = _symmetric_basis(2 * p)
    image = step @ basis @ step.T
    present = basis[:, :p, :p]
    image[:, :p, :p] += lr**2 * noise * (_fourth(g, present) - curvature @ present @ curvature)
    return torch.linalg.eigvals(_matrix(basis, image)).abs().max().item()


def critical_lr(jacobian: Tensor, batch_size: int, *, momentum: float = 0.0, replacement: bool = True) -> float:
    r"""The largest learning rate with which SGD can stay at the minimum.

    Without momentum in closed form: with :math:`C = G \otimes I + I \otimes G` and
    :math:`K = (1 - \nu) G \otimes G + \nu E[g g^T \otimes g g^T]`, the map of :func:`second_moment_radius` is
    :math:`I - \eta C + \eta^2 K`, so :math:`\eta^* = 1 / \lambda_{\max}(C^{-1/2} K C^{-1/2})`. With momentum by
    bisection, to a relative 1e-10.

    Args:
        jacobian: ``[n, p]``, as for :func:`second_moment_radius`.
        batch_size: :math:`B`.
        momentum: Of the heavy ball.
        replacement: Whether samples of a batch are drawn independently.

    Raises:
        ValueError: As :func:`second_moment_radius`.

    Source: derived here.

    Example:
        >>> J = torch.eye(2, dtype=torch.float64)
        >>> lrs = critical_lr(J, 1), critical_lr(J, 2, replacement=False)
        >>> [round(lr, 12) for lr in lrs]  # 2 / trace, 2 / largest eigenvalue
        [2.0, 4.0]
    """
    if momentum:
        return _bisected(jacobian, batch_size, momentum, replacement)
    g = _in_span(jacobian)
    noise = _noise(len(g), batch_size, replacement)
    values = g.square().mean(dim=0)  # the curvature is diagonal in this basis, and so is C
    basis = _symmetric_basis(g.shape[1])
    scale = (values[:, None] + values[None, :]).rsqrt()
    scaled = scale * basis
    curved = (1 - noise) * values[:, None] * scaled * values[None, :] + noise * _fourth(g, scaled)
    return 1 / torch.linalg.eigvalsh(_matrix(basis, scale * curved))[-1].item()


def _bisected(jacobian: Tensor, batch_size: int, momentum: float, replacement: bool) -> float:
    top = torch.linalg.matrix_norm(jacobian.double(), 2).item() ** 2 / len(jacobian)
    low, high = 0.0, 2 * (1 + momentum) / top  # the limit of gradient descent, which noise only lowers
    for _ in range(40):
        middle = (low + high) / 2
        stable = second_moment_radius(jacobian, middle, batch_size, momentum=momentum, replacement=replacement) <= 1
        low, high = (middle, high) if stable else (low, middle)
    return low


def _in_span(jacobian: Tensor) -> Tensor:
    """The gradients in the basis of their principal directions, those of none left out."""
    if jacobian.ndim != 2 or not jacobian.any():
        raise ValueError(f"jacobian must be a matrix [n, p] that is not zero, got shape {tuple(jacobian.shape)}")
    left, values, _ = torch.linalg.svd(jacobian.detach().to("cpu", torch.float64), full_matrices=False)
    rank = int((values > values[0] * max(jacobian.shape) * torch.finfo(values.dtype).eps).sum())
    return left[:, :rank] * values[:rank]


def _noise(samples: int, batch_size: int, replacement: bool) -> float:
    check_interval("batch_size", batch_size, 1, *([] if replacement else [samples]))
    return noise_factor(batch_size, None if replacement else samples)


def noise_factor(batch_size: float, dataset_size: int | None = None) -> float:
    """Variance of the mean of a batch as a share of that of one sample: 1 / B, or less without replacement."""
    if dataset_size is None or dataset_size == 1:
        return 1 / batch_size
    return max(dataset_size - batch_size, 0) / (batch_size * (dataset_size - 1))


def _symmetric_basis(p: int) -> Tensor:
    """An orthonormal basis ``[p (p + 1) / 2, p, p]`` of the symmetric matrices."""
    rows, columns = torch.triu_indices(p, p)
    if len(rows) > MAX_DIM:
        raise ValueError(f"the Jacobian's rank (twice that with momentum) must be at most 62, got {p}")
    basis = torch.zeros(len(rows), p, p, dtype=torch.float64)
    number = torch.arange(len(rows))
    basis[number, rows, columns] = basis[number, columns, rows] = torch.where(rows == columns, 1.0, 0.5).double().sqrt()
    return basis


def _fourth(g: Tensor, moments: Tensor) -> Tensor:
    """E[g g' S g g'] for a batch of S."""
    inner = torch.einsum("ni,kij,nj->kn", g, moments, g)
    return torch.einsum("kn,ni,nj->kij", inner, g, g) / len(g)


def _matrix(basis: Tensor, image: Tensor) -> Tensor:
    return basis.flatten(1) @ image.flatten(1).T
