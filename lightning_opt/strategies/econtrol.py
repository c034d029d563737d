"""EControl: EF21 that also keeps the error of compression, and feeds a part of it back at every step."""

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_opt.compression import CompressionState, Compressor
from lightning_opt.compression.state import ErrorDtype, Init
from lightning_opt.registry import register

from ._compressed_ddp import CompressedDDPStrategy, OnWorldSizeChange


@register(
    "strategy",
    summary="Data-parallel training that sends compressed gradients and controls the error of compression",
    paper="2311.05645",
    card="econtrol",
    aliases={"ddp_econtrol": {}},
)
class EControlStrategy(CompressedDDPStrategy):
    r"""DDP with EControl: rank i sends :math:`\Delta_i = C(\eta e_i + g_i - h_i)`.

    Behind the message :math:`e_i \leftarrow e_i + g_i - h_i - \Delta_i`, then :math:`h_i \leftarrow h_i + \Delta_i`;
    the optimizer gets :math:`H = \frac1n \sum_i h_i`. It follows dense training where ranks hold different data and the
    gradients have little noise; with small noisy batches EF14 is better.

    Name for the Trainer: ``"ddp_econtrol"``.

    Args:
        compressor: From :mod:`lightning_opt.compression`; None is ``TopK(ratio=0.01)``.
        eta: How much of the error a message carries. None takes the compressor's contraction (k/d for TopK) for each
            tensor, which is best with full gradients; twice as much is best with noisy ones; ten times diverges.
        init: The first estimate: ``"dense"`` sends the first gradients in full, ``"compressed"`` takes what is left of
            them after compression, ``"zeros"`` also keeps the rest as error.
        min_numel: Tensors with fewer elements are sent in full at every step.
        error_dtype: What the error is stored in. ``"bfloat16"`` saves memory and loses small errors.
        on_world_size_change: A checkpoint of another number of ranks: ``"raise"``, or ``"mean"``: each rank begins with
            the mean of estimates and errors.
        kwargs: Those of Lightning's DDPStrategy and of DistributedDataParallel.

    Raises:
        ValueError: If a value is out of range, a communication hook is given too, or ``eta`` is None and no contraction
            of the compressor is known.
        MisconfigurationException: When fitting starts, for sharded modules, sparse or complex gradients, or a
            checkpoint that does not fit.

    Cost:
        Memory: three copies of the gradients a rank; in a checkpoint two a rank and one for all. Each step sends
        8 bytes for every entry that TopK keeps.

    Example:
        >>> from lightning_opt.compression import TopK
        >>> strategy = EControlStrategy(TopK(ratio=0.01), eta=0.02, process_group_backend="gloo")
    """

    def __init__(
        self,
        compressor: Compressor | None = None,
        eta: float | None = None,
        init: Init = "dense",
        min_numel: int = 256,
        error_dtype: ErrorDtype = "float32",
        on_world_size_change: OnWorldSizeChange = "raise",
        **kwargs: Any,
    ) -> None:
        options = {"eta": eta, "init": init, "min_numel": min_numel, "error_dtype": error_dtype}
        super().__init__("econtrol", compressor, options, on_world_size_change, **kwargs)

    @override
    def make_state(self) -> CompressionState:
        state = super().make_state()
        assert self.lightning_module is not None
        sizes = [p.numel() for p in self.lightning_module.parameters() if p.requires_grad]
        known = [d for n in sizes if n >= state.min_numel and (d := self.compressor.delta(n)) is not None]
        if state.eta is not None and known and state.eta > 4 * min(known):
            rank_zero_warn(
                f"EControlStrategy: eta={state.eta} is more than four times the contraction {min(known):.3g} of"
                f" {self.compressor!r}; from ten times on it diverges."
            )
        if state.error_dtype == "bfloat16":
            rank_zero_warn("EControlStrategy: an error in bfloat16 loses what is below a 256th of it.")
        return state
