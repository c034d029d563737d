"""Compression without error feedback, for comparison."""

from typing import Any

from lightning_opt.compression import Compressor
from lightning_opt.registry import register

from ._compressed_ddp import CompressedDDPStrategy


@register(
    "strategy",
    summary="Data-parallel training that sends compressed gradients and forgets the rest, for comparison",
    aliases={"ddp_topk_naive": {}},
)
class NaiveCompressionStrategy(CompressedDDPStrategy):
    """DDP that averages compressed gradients and forgets what compression lost. May diverge: for comparison only.

    Name for the Trainer: ``"ddp_topk_naive"``.

    Args:
        compressor: From :mod:`lightning_opt.compression`; None is ``TopK(ratio=0.01)``.
        min_numel: Tensors with fewer elements are sent in full at every step.
        kwargs: Those of Lightning's DDPStrategy and of DistributedDataParallel.

    Raises:
        ValueError: If a value is out of range, or a communication hook is given too.

    Example:
        >>> strategy = NaiveCompressionStrategy(process_group_backend="gloo")
    """

    def __init__(self, compressor: Compressor | None = None, min_numel: int = 256, **kwargs: Any) -> None:
        super().__init__("naive", compressor, {"min_numel": min_numel}, "mean", **kwargs)
