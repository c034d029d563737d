"""EF14: each rank sends its compressed gradient together with what compression has kept back so far."""

from typing import Any

from lightning_opt.compression import Compressor
from lightning_opt.compression.state import ErrorDtype
from lightning_opt.registry import register

from ._compressed_ddp import CompressedDDPStrategy, OnWorldSizeChange


@register(
    "strategy",
    summary="Data-parallel training that sends compressed gradients with the error of compression so far",
    paper="1901.09847",
    card="econtrol",
    aliases={"ddp_ef14": {}},
)
class EF14Strategy(CompressedDDPStrategy):
    r"""DDP with classical error feedback: rank i sends :math:`\Delta_i = C(g_i + e_i)`, and keeps what is left.

    :math:`e_i \leftarrow e_i + g_i - \Delta_i`; the optimizer gets :math:`\frac1n \sum_i \Delta_i`. The best choice
    with small noisy batches; where ranks hold different data it ends beside the optimum.

    Name for the Trainer: ``"ddp_ef14"``.

    Args:
        compressor: From :mod:`lightning_opt.compression`; None is ``TopK(ratio=0.01)``.
        min_numel: Tensors with fewer elements are sent in full at every step.
        error_dtype: What the error is stored in. ``"bfloat16"`` saves memory and loses small errors.
        on_world_size_change: A checkpoint of another number of ranks: ``"raise"``, or ``"mean"``: each rank begins with
            the mean of the errors.
        kwargs: Those of Lightning's DDPStrategy and of DistributedDataParallel.

    Raises:
        ValueError: If a value is out of range, or a communication hook is given too.
        MisconfigurationException: When fitting starts, for sharded modules, sparse or complex gradients, or a
            checkpoint that does not fit.

    Cost: one copy of the gradients a rank, in memory and in a checkpoint; on the wire as EF21.

    Example:
        >>> from lightning_opt.compression import ScaledSign
        >>> strategy = EF14Strategy(ScaledSign(), process_group_backend="gloo")
    """

    def __init__(
        self,
        compressor: Compressor | None = None,
        min_numel: int = 256,
        error_dtype: ErrorDtype = "float32",
        on_world_size_change: OnWorldSizeChange = "raise",
        **kwargs: Any,
    ) -> None:
        options = {"min_numel": min_numel, "error_dtype": error_dtype}
        super().__init__("ef14", compressor, options, on_world_size_change, **kwargs)
