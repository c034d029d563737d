"""Naive curvature: dense matrices from torch.func, one sample at a time, and the algorithms as they are printed."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel


def _flat(module: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    return torch.cat([p.reshape(-1) for p in params.values()]), params


def _call(module: nn.Module, params: dict[str, Tensor], flat: Tensor, x: Tensor) -> Tensor:
    parts = flat.split([p.numel() for p in params.values()])
    named = {name: part.view(p.shape) for (name, p), part in zip(params.items(), parts, strict=True)}
    with sdpa_kernel(SDPBackend.MATH):
        return functional_call(module, named, (x,), tie_weights=True)


def dense_hessian(module: nn.Module, loss, x: Tensor, y: Tensor) -> Tensor:
    """The Hessian over the trainable parameters."""
    flat, params = _flat(module)
    return jacrev(jacrev(lambda flat: loss(_call(module, params, flat, x), y)))(flat)


def dense_ggn(module: nn.Module, loss, x: Tensor, y: Tensor) -> Tensor:
    """The sum over all pairs of outputs of their gradients' outer product, times the loss's second derivative."""
    flat, params = _flat(module)
    outputs = _call(module, params, flat, x)
    jacobian = jacrev(lambda flat: _call(module, params, flat, x).reshape(-1))(flat)
    of_loss = jacrev(jacrev(lambda z: loss(z.view_as(outputs), y)))(outputs.reshape(-1))
    return jacobian.T @ of_loss @ jacobian


def dense_fisher(module: nn.Module, loss, x: Tensor, y: Tensor) -> Tensor:
    """The mean over samples of the outer product of their gradients."""
    params = [p for p in module.parameters() if p.requires_grad]
    total = 0
    for i in range(len(x)):
        gradient = torch.autograd.grad(loss(module(x[i : i + 1]), y[i : i + 1]), params)
        flat = torch.cat([g.reshape(-1) for g in gradient])
        total = total + torch.outer(flat, flat)
    return total / len(x)


def tridiagonal(matrix: np.ndarray, start: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Diagonal and off-diagonal of Q^T A Q, with Q from the QR decomposition of the Krylov matrix."""
    columns = [start / np.linalg.norm(start)]
    for _ in range(steps - 1):
        columns.append(matrix @ columns[-1])
        columns[-1] /= np.linalg.norm(columns[-1])
    q, _ = np.linalg.qr(np.stack(columns, axis=1))
    t = q.T @ matrix @ q
    return np.diag(t), np.abs(np.diag(t, 1))


def xtrace(matrix: np.ndarray, omega: np.ndarray) -> np.ndarray:
    """The estimates of XTrace, one for each column of omega, from one decomposition for each that leaves it out."""
    estimates = []
    for i in range(omega.shape[1]):
        q, _ = np.linalg.qr(matrix @ np.delete(omega, i, axis=1))
        rest = omega[:, i] - q @ (q.T @ omega[:, i])
        estimates.append(np.trace(q.T @ matrix @ q) + rest @ matrix @ rest)
    return np.array(estimates)
