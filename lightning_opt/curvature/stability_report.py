"""The stability of a module on its data, outside of training."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn

from lightning_opt._checks import check_choice, check_interval
from lightning_opt._lightning.probe import loss_of, untouched

from ._trace_by_parameter import Trace, estimates, output_loss
from .ggn import GGNOperator
from .hessian import HessianOperator
from .lanczos import lanczos
from .operator import CurvatureOperator
from .probe_mode import probe_mode
from .stability import Stability, stability


@dataclasses.dataclass(frozen=True)
class StabilityReport:
    """What :func:`stability_report` measured.

    Attributes:
        stability: Trace and top eigenvalue, and what they mean at the rate and batch size in question.
        lambda_error: An eigenvalue lies within it of ``stability.lambda_max``.
        loss: Mean over the samples. The bounds are about minima with a loss near zero.
        samples: That were measured on.
        by_parameter: What each parameter contributes to the trace.
    """

    stability: Stability
    lambda_error: float
    loss: float
    samples: int
    by_parameter: dict[str, float]

    def __str__(self) -> str:
        s = self.stability
        return "\n".join(
            [
                f"loss {self.loss:.4g} over {self.samples} samples, lr {s.lr:.4g}, batch size {s.batch_size:g}",
                f"trace {s.trace:.4g} (± {s.trace_stderr:.2g}), lambda_max {s.lambda_max:.4g} (±"
                f" {self.lambda_error:.2g})",
                f"rho_tr {s.rho_tr:.3f} (± {s.rho_tr_stderr:.2g}), rho_top {s.rho_top:.3f}, rho_mix {s.rho_mix:.3f};"
                f" rho_mix is 1 at lr {s.lr_ceiling:.4g}",
            ]
        )


def stability_report(
    module: nn.Module,
    loader: Iterable[Any],
    lr: float,
    batch_size: int | None = None,
    *,
    momentum: float = 0.0,
    trace: Trace = "hutchinson",
    num_probes: int = 16,
    lambda_max_steps: int = 10,
    max_batches: int | None = None,
    dataset_size: int | Literal["auto", "infinite"] = "auto",
    mse_factor: float = 1.0,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    forward_fn: Callable[[Any, Any], Tensor] | None = None,
    seed: int = 0,
) -> StabilityReport:
    r"""Measure trace and top eigenvalue of the curvature on data, and relate them to learning rate and batch size.

    Where :class:`lightning_opt.callbacks.StabilityMonitor` follows the batches of a run, this looks at a module as it
    is, on all data: after training, or before a rate is chosen. :func:`stability` says what the shares mean. The module
    is left as it was, and needs no Trainer.

    Args:
        module: A LightningModule, whose ``training_step`` computes the loss, or any module with ``loss_fn``.
        loader: Batches with the samples in the first dimension; read once, and kept in memory on the module's device.
        lr: Learning rate of the run in question.
        batch_size: Samples of its steps, over micro-batches and ranks; None for the loader's.
        momentum: Of its optimizer, in [0, 1).
        trace: ``"hutchinson"``: of the Hessian of the loss, from random signs. ``"fisher_mc"``: of the Gauss-Newton
            matrix for cross-entropy, from labels drawn from the prediction. ``"exact_mse"``: of the Gauss-Newton matrix
            for squared errors, exactly. The top eigenvalue is of the same matrix.
        num_probes: Of the two estimators, at least 2.
        lambda_max_steps: Lanczos steps.
        max_batches: Look at so many batches only.
        dataset_size: Samples of an epoch, which draws without replacement: ``"auto"`` asks the loader, a number, or
            ``"infinite"`` for samples drawn independently.
        mse_factor: For ``"exact_mse"``: the loss over half the squared error, summed over outputs, mean over samples.
        loss_fn: Computes the mean loss from module and batch, in the place of ``training_step``.
        forward_fn: Computes the outputs ``[samples, outputs]`` from module and batch, for ``"fisher_mc"`` and
            ``"exact_mse"``; default: the module called on the first part of the batch.
        seed: Of the random vectors and labels.

    Raises:
        ValueError: If a number is out of its range, the loader is empty, the batch size is not known, or there is
            nothing to compute the loss with.
        NonFiniteCurvatureError: If a product holds NaN or infinity.

    Cost: ``lambda_max_steps + num_probes`` Hessian products over the loader (``"fisher_mc"``: a backward pass a probe;
    ``"exact_mse"``: one a sample and output).

    Source: arXiv:2305.17490; see :func:`stability`.

    Example:
        >>> import torch
        >>> from lightning_opt.curvature import stability_report
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 1.0]])
        >>> loss_fn = lambda net, batch: (net(batch[0]) - batch[1]).square().mean() / 2
        >>> batches = [(x, net(x).detach())]
        >>> print(stability_report(net, batches, 0.5, batch_size=1, trace="exact_mse", loss_fn=loss_fn))
        loss 0 over 4 samples, lr 0.5, batch size 1
        trace 2.5 (± 0), lambda_max 2 (± 0)
        rho_tr 0.625 (± 0), rho_top 0.500, rho_mix 0.625; rho_mix is 1 at lr 0.8
    """
    check_choice("trace", trace, get_args(Trace))
    check_interval("num_probes", num_probes, 2)
    check_interval("lambda_max_steps", lambda_max_steps, 1)
    check_interval("mse_factor", mse_factor, 0, closed="()")
    check_interval("seed", seed, 0)
    if max_batches is not None:
        check_interval("max_batches", max_batches, 1)
    if loss_fn is None and not hasattr(module, "training_step"):
        raise ValueError(f"loss_fn must be given, since {type(module).__name__} has no training_step, got None")
    of_step = getattr(loader, "batch_size", None) if batch_size is None else batch_size
    if of_step is None:
        raise ValueError(f"batch_size must be given, since {type(loader).__name__} has none, got None")
    check_interval("batch_size", of_step, 1)
    check_interval("lr", lr, 0)
    check_interval("momentum", momentum, 0, 1, closed="[)")
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"module must have parameters that require gradients, and {type(module).__name__} has none")
    device = parameters[0].device
    generator = torch.Generator().manual_seed(seed)
    with untouched(module, device), probe_mode(module):
        # inside, since a loader draws from the global random state
        batches = [move_data_to_device(batch, device) for batch in itertools.islice(loader, max_batches)]
        if not batches:
            raise ValueError("loader must hold at least one batch, got none")
        counts = [extract_batch_size(batch) for batch in batches]
        shares = [count / sum(counts) for count in counts]
        loss = loss_of(module, loss_fn)
        with torch.no_grad():
            mean_loss = sum(share * loss(batch).item() for batch, share in zip(batches, shares, strict=True))
        operator: CurvatureOperator
        forward = None if trace == "hutchinson" else _Outputs(module, forward_fn)
        if forward is None:
            operator = HessianOperator(loss, parameters, batches, weights=counts)
        else:
            operator = GGNOperator(
                lambda batch: (forward(batch), None),
                output_loss(trace, mse_factor),
                parameters,
                batches,
                weights=counts,
            )
        ritz = lanczos(operator, lambda_max_steps, generator=generator)
        parts = estimates(
            trace, operator, forward, batches, shares,
            num_probes=num_probes, mse_factor=mse_factor, generator=generator,
        )  # fmt: skip
    traces = parts.sum(dim=1)
    names = {id(p): name for name, p in module.named_parameters()}
    return StabilityReport(
        stability=stability(
            traces.mean().item(),
            ritz.ritz_values[-1].item(),
            lr=lr,
            batch_size=of_step,
            momentum=momentum,
            dataset_size=_dataset_size(loader, dataset_size),
            trace_stderr=0.0 if trace == "exact_mse" else traces.std().item() / math.sqrt(len(traces)),
        ),
        lambda_error=ritz.residuals[-1].item(),
        loss=mean_loss,
        samples=sum(counts),
        by_parameter=dict(zip([names[id(p)] for p in operator.params], parts.mean(dim=0).tolist(), strict=True)),
    )


class _Outputs:
    """The outputs of a module for a batch."""

    def __init__(self, module: nn.Module, forward_fn: Callable[[Any, Any], Tensor] | None) -> None:
        self.module, self.forward_fn = module, forward_fn

    def __call__(self, batch: Any) -> Tensor:
        if self.forward_fn is not None:
            return self.forward_fn(self.module, batch)
        return self.module(batch[0] if isinstance(batch, Sequence) else batch)


def _dataset_size(loader: Iterable[Any], given: int | str) -> int | None:
    if isinstance(given, int):
        check_interval("dataset_size", given, 1)
        return given
    check_choice("dataset_size", given, ["auto", "infinite"])
    dataset = getattr(loader, "dataset", None)
    return len(dataset) if given == "auto" and isinstance(dataset, Sized) else None
