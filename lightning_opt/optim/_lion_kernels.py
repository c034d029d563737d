r"""The convex functions K of Lion-K (arXiv:2310.05898, table 1): gradient, value, conjugate and domain of each.

With weight decay :math:`\lambda`, Lion-K minimises :math:`f(x) + K^*(\lambda x) / \lambda`; the domain of the
conjugate is the constraint :math:`\lambda x \in \mathrm{dom} K^*`. Each kernel works on one tensor; the
elementwise ones also on a list.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_opt._checks import check_choice, check_interval

from ._tensor_list import TensorList


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One convex, even function K.

    Attributes:
        gradient: ``(z, args)`` to a subgradient of K at z.
        value: ``(z, args)`` to K(z).
        conjugate: ``(x, args)`` to the conjugate K*(x) for x inside its domain.
        gauge: ``(x, args)`` to the gauge of the domain of K*: at most 1 inside; 0 where K* is finite everywhere.
        elementwise: Whether the gradient acts on each coordinate alone; such kernels have a fused form.
        argument: Name of the kernel's argument, or None.
    """

    gradient: Callable[[Any, dict[str, Any]], Any]
    value: Callable[[Tensor, dict[str, Any]], Tensor]
    conjugate: Callable[[Tensor, dict[str, Any]], Tensor]
    gauge: Callable[[Tensor, dict[str, Any]], Tensor]
    elementwise: bool = False
    argument: str | None = None


def direction(z: Any, kernel: str, args: dict[str, Any]) -> Any:
    """Subgradient of the kernel at ``z``, a tensor or a :class:`TensorList`."""
    k = KERNELS[kernel]
    if isinstance(z, TensorList) and not k.elementwise:
        return TensorList(k.gradient(t, args) for t in z.tensors)
    return k.gradient(z, args)


def validate(kernel: str, args: dict[str, Any], params: list[Tensor]) -> None:
    """Raise ValueError if a kernel, its arguments, or parameters that it cannot act on are wrong."""
    check_choice("kernel", kernel, KERNELS)
    argument = KERNELS[kernel].argument
    accepted = {argument, "relative"} if argument == "e" else {argument} - {None}
    for name in args:
        if name not in accepted:
            wanted = ", ".join(sorted(repr(a) for a in accepted if a)) or "none"
            raise ValueError(f"kernel_args of kernel {kernel!r} must be among: {wanted}; got {name!r}")
    if argument is not None and argument not in args:
        raise ValueError(f"kernel {kernel!r} needs kernel_args={{{argument!r}: ...}}")
    if argument == "e":
        check_interval("kernel_args['e']", args["e"], 0.0, closed="(]")
    if argument == "p":
        check_interval("kernel_args['p']", args["p"], 1.0, 2.0)
    for p in params:
        if argument == "k":
            if not isinstance(args["k"], int):
                raise ValueError(f"kernel_args['k'] must be an integer, got {args['k']!r}")
            check_interval("kernel_args['k']", args["k"], 1, p.numel())
        if kernel == "spectral" and p.ndim < 2:
            raise ValueError(
                f"kernel 'spectral' needs parameters of two or more dimensions, got shape {tuple(p.shape)}: "
                "put vectors into a group of their own"
            )
        if not KERNELS[kernel].elementwise and p.is_complex():
            raise ValueError(f"kernel {kernel!r} does not support complex parameters")


def threshold(z: Any, args: dict[str, Any]) -> Any:
    """The gradient scale e, in units of the momentum; with ``relative`` in units of its root mean square."""
    if not args.get("relative"):
        return args["e"]
    if isinstance(z, TensorList):
        return TensorList(threshold(t, args) for t in z.tensors)
    return args["e"] * z.square().mean().sqrt()


def _box(x: Tensor, args: dict[str, Any]) -> Tensor:
    return x.abs().amax()


def _free(x: Tensor, args: dict[str, Any]) -> Tensor:
    return x.new_zeros(())


def _rows(z: Tensor) -> Tensor:
    return z.reshape(z.shape[0], -1) if z.ndim else z.reshape(1, 1)


def _unit(z: Tensor, norm: Tensor) -> Tensor:
    return torch.where(norm > 0, z / norm, torch.zeros_like(z))


def _lp(z: Tensor, args: dict[str, Any]) -> Tensor:
    p = args["p"]
    norm = torch.linalg.vector_norm(z, p)
    return z.sign() * _unit(z.abs(), norm) ** (p - 1)


def _dual(args: dict[str, Any]) -> float:
    return float("inf") if args["p"] == 1 else args["p"] / (args["p"] - 1)


def _topk(z: Tensor, args: dict[str, Any]) -> Tensor:
    flat = z.reshape(-1)
    chosen = flat.abs().topk(args["k"]).indices
    return torch.zeros_like(flat).index_copy(0, chosen, flat[chosen].sign()).reshape(z.shape)


def _huber(z: Tensor, args: dict[str, Any]) -> Tensor:
    e, size = threshold(z, args), z.abs()
    return torch.where(size <= e, size.square() / (2 * e), size - e / 2).sum()


def _relativistic(z: Any, args: dict[str, Any]) -> Any:
    e = threshold(z, args)
    return z / (z * z + e * e).sqrt()


def _soft(z: Any, args: dict[str, Any]) -> Any:
    return z.sign() * (z.abs() > threshold(z, args))


def _spectral(z: Tensor, args: dict[str, Any]) -> Tensor:
    """:math:`U V^T` by 30 cubic Newton-Schulz steps: each multiplies a small singular value by 1.5."""
    x = _rows(z)
    transposed = x.shape[0] > x.shape[1]
    x = x.mT if transposed else x
    x = _unit(x, torch.linalg.matrix_norm(x))
    for _ in range(30):
        x = 1.5 * x - 0.5 * (x @ x.mT) @ x
    return (x.mT if transposed else x).reshape(z.shape)


KERNELS: dict[str, Kernel] = {
    "sign": Kernel(lambda z, a: z.sign(), lambda z, a: z.abs().sum(), _free, _box, elementwise=True),
    "lp": Kernel(
        _lp,
        lambda z, a: torch.linalg.vector_norm(z, a["p"]),
        _free,
        lambda x, a: torch.linalg.vector_norm(x, _dual(a)),
        argument="p",
    ),
    "l2": Kernel(
        lambda z, a: _unit(z, torch.linalg.vector_norm(z)),
        lambda z, a: torch.linalg.vector_norm(z),
        _free,
        lambda x, a: torch.linalg.vector_norm(x),
    ),
    "group": Kernel(
        lambda z, a: _unit(_rows(z), torch.linalg.vector_norm(_rows(z), dim=1, keepdim=True)).reshape(z.shape),
        lambda z, a: torch.linalg.vector_norm(_rows(z), dim=1).sum(),
        _free,
        lambda x, a: torch.linalg.vector_norm(_rows(x), dim=1).amax(),
    ),
    "soft": Kernel(
        _soft,
        lambda z, a: (z.abs() - threshold(z, a)).clamp_min(0).sum(),
        lambda x, a: a["e"] * x.abs().sum(),
        _box,
        elementwise=True,
        argument="e",
    ),
    "huber": Kernel(
        lambda z, a: (z / threshold(z, a)).clamp(-1.0, 1.0),
        _huber,
        lambda x, a: a["e"] / 2 * x.square().sum(),
        _box,
        elementwise=True,
        argument="e",
    ),
    "topk": Kernel(
        _topk,
        lambda z, a: z.abs().reshape(-1).topk(a["k"]).values.sum(),
        _free,
        lambda x, a: torch.maximum(x.abs().amax(), x.abs().sum() / a["k"]),
        argument="k",
    ),
    "relativistic": Kernel(
        _relativistic,
        lambda z, a: (z.square() + threshold(z, a) ** 2).sqrt().sum(),
        lambda x, a: -a["e"] * (1 - x.square()).clamp_min(0).sqrt().sum(),
        _box,
        elementwise=True,
        argument="e",
    ),
    "quadratic": Kernel(
        lambda z, a: z,
        lambda z, a: z.square().sum() / 2,
        lambda x, a: x.square().sum() / 2,
        _free,
        elementwise=True,
    ),
    "spectral": Kernel(
        _spectral,
        lambda z, a: torch.linalg.matrix_norm(_rows(z), "nuc"),
        _free,
        lambda x, a: torch.linalg.matrix_norm(_rows(x), 2),
    ),
}
