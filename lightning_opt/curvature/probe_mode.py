"""A module's mode while its curvature is measured."""

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_opt._checks import check_choice


@contextlib.contextmanager
def probe_mode(
    module: nn.Module, *, batch_norm: Literal["batch", "running"] = "batch", dropout: bool = False
) -> Iterator[None]:
    """Evaluate a module repeatedly without a trace: running statistics do not move, and modes are put back.

    All products of an operator belong inside. With ``"batch"``, normalization layers use the statistics of the batch,
    as in training, and the curvature is that of the training loss; it then couples the samples of a batch, so that
    micro-batches are not one batch, and gradients of single samples do not exist. With ``"running"`` they use their
    running statistics, as in evaluation. Recurrent layers run without cuDNN, whose differentiate once only.

    Args:
        module: Of any kind; its other layers are put into evaluation mode.
        batch_norm: Where the layers derived from torch's batch and instance normalization take their statistics from.
            Those that keep no running statistics use the batch's in either case.
        dropout: Leave all other layers in their present mode, so that dropout draws. An operator draws the same
            numbers in each of its products.

    Raises:
        ValueError: If ``batch_norm`` is unknown.

    Example:
        >>> import torch
        >>> from lightning_opt.curvature import probe_mode
        >>> layer = torch.nn.BatchNorm1d(3)
        >>> with probe_mode(layer):
        ...     mean = layer(torch.arange(6.0).view(2, 3)).mean().item()
        >>> mean, layer.running_mean.tolist()
        (0.0, [0.0, 0.0, 0.0])
    """
    check_choice("batch_norm", batch_norm, ["batch", "running"])
    modes = {m: m.training for m in module.modules()}
    norms = {m: m.track_running_stats for m in modes if isinstance(m, _NormBase)}
    try:
        for m in modes:
            if m in norms:
                m.training = batch_norm == "batch"
            elif not dropout:
                m.training = False
        if batch_norm == "batch":
            for m in norms:
                m.track_running_stats = False  # the layers then neither read nor write their buffers
        recurrent = any(isinstance(m, nn.RNNBase) for m in modes)
        with torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext():
            yield
    finally:
        for m, training in modes.items():
            m.training = training
        for m, tracks in norms.items():
            m.track_running_stats = tracks
