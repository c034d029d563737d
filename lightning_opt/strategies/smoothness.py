"""How fast the gradient of a loss changes, for step sizes and weights."""

from typing import Any

import torch
from torch import nn

from lightning_opt._checks import check_interval
from lightning_opt._lightning.probe import LossFn, loss_of, untouched
from lightning_opt.curvature import HessianOperator, NonFiniteCurvatureError, probe_mode, top_eigenpairs
from lightning_opt.registry import register


@register("tool", summary="Smoothness of a module's loss on a batch", paper="2402.10774")
def estimate_smoothness(
    module: nn.Module, batch: Any, iters: int = 20, *, loss_fn: LossFn | None = None, seed: int = 0
) -> float:
    """The largest magnitude of an eigenvalue of the Hessian of the loss on a batch, at the present weights.

    It is found by a Krylov method, which is never worse than the power iteration with as many products. Where the loss
    is not quadratic the smoothness of a whole run may be larger.

    Args:
        module: A LightningModule, or any module with ``loss_fn``. It is left as it was.
        batch: On the module's device.
        iters: Products with the Hessian at most.
        loss_fn: Computes the loss from module and batch, in the place of ``training_step``.
        seed: Of the start vector.

    Returns:
        The estimate, from below; NaN where the loss is not finite.

    Raises:
        ValueError: If ``iters`` is below 1, or the loss does not depend on the parameters.

    Cost:
        A forward pass, and two backward passes for each product.

    Example:
        >>> import torch
        >>> module = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> round(estimate_smoothness(module, x, loss_fn=lambda m, x: (m(x) ** 2).sum()), 4)
        18.0
    """
    check_interval("iters", iters, 1)
    parameters = [p for p in module.parameters() if p.requires_grad]
    with untouched(module, parameters[0].device), probe_mode(module):
        operator = HessianOperator(loss_of(module, loss_fn), parameters, [batch])
        generator = torch.Generator().manual_seed(seed)
        try:
            pairs = top_eigenpairs(operator, which="LM", tol=0.01, max_products=iters, generator=generator)
        except NonFiniteCurvatureError:
            return float("nan")
    return abs(float(pairs.eigenvalues[0]))
