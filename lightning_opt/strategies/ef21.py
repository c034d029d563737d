"""EF21, EF21-W and EF21-SGDM: each rank sends the compressed difference to what the others know of its gradient."""

from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_opt._checks import check_interval
from lightning_opt._lightning.probe import check_can_probe
from lightning_opt.compression import CompressionState, Compressor, ef21_stepsize
from lightning_opt.compression.state import Init
from lightning_opt.registry import register

from ._compressed_ddp import CompressedDDPStrategy, OnWorldSizeChange
from .smoothness import estimate_smoothness


@register(
    "strategy",
    summary="Data-parallel training that sends compressed differences of gradients",
    paper="2402.10774",
    card="ef21",
    aliases={"ddp_ef21": {}, "ddp_ef21_sgdm": {"momentum": 0.1}, "ddp_ef21_w": {"weights": "auto"}},
)
class EF21Strategy(CompressedDDPStrategy):
    r"""DDP with EF21: rank i sends :math:`u_i = C(g_i - h_i)`, and the optimizer gets :math:`H = \frac1n \sum_i h_i`.

    Behind the message :math:`h_i \leftarrow h_i + u_i`, and every rank adds the mean of all messages to H. For TopK and
    other homogeneous compressors EF21-W is the same method, and the theory behind it allows EF21 larger steps: see
    :func:`lightning_opt.compression.ef21_stepsize`. With small batches use ``momentum=0.1``, or the noise of the
    gradients keeps EF21 from converging.

    Names for the Trainer: ``"ddp_ef21"``, ``"ddp_ef21_sgdm"`` (momentum 0.1) and ``"ddp_ef21_w"`` (weights "auto").

    Args:
        compressor: From :mod:`lightning_opt.compression`; None is ``TopK(ratio=0.01)``.
        weights: Of the ranks: equal, one a rank, or ``"auto"``: as the smoothness of each rank's loss on its first
            batch. They matter for compressors that are not homogeneous.
        momentum: EF21-SGDM averages gradients before it compresses them: ``v = (1 - momentum) v + momentum g``.
        init: The first estimate: ``"dense"`` sends the first gradients in full, ``"compressed"`` and ``"zeros"`` do
            not; for EF21 the two are the same.
        min_numel: Tensors with fewer elements are sent in full at every step.
        on_world_size_change: A checkpoint of another number of ranks: ``"raise"``, or ``"mean"``: each rank begins with
            the mean of the estimates.
        kwargs: Those of Lightning's DDPStrategy and of DistributedDataParallel.

    Raises:
        ValueError: If a value is out of range, or a communication hook is given too.
        MisconfigurationException: When fitting starts, for sharded modules, sparse or complex gradients, or a
            checkpoint that does not fit.

    Cost:
        Memory: two copies of the gradients a rank, one more with momentum; in a checkpoint one (two) a rank and one for
        all. Each step sends 8 bytes for every entry that TopK keeps. ``"auto"`` takes some 20 products with the Hessian
        once.

    Example:
        >>> from lightning_opt.compression import TopK
        >>> strategy = EF21Strategy(TopK(ratio=0.01), momentum=0.1, process_group_backend="gloo")
    """

    def __init__(
        self,
        compressor: Compressor | None = None,
        weights: Literal["uniform", "auto"] | list[float] = "uniform",
        momentum: float | None = None,
        init: Init = "dense",
        min_numel: int = 256,
        on_world_size_change: OnWorldSizeChange = "raise",
        **kwargs: Any,
    ) -> None:
        if isinstance(weights, str) and weights not in ("uniform", "auto"):
            raise ValueError(f"weights must be 'uniform', 'auto' or one positive number a rank, got {weights!r}")
        if not isinstance(weights, str):
            for weight in weights:
                check_interval("weights", weight, 0, closed="()")
            if abs(sum(weights) - 1) > 1e-6:
                raise ValueError(f"weights must sum to 1, got {weights!r}")
        options = {"momentum": momentum, "init": init, "min_numel": min_numel}
        super().__init__("ef21", compressor, options, on_world_size_change, **kwargs)
        self.weights = weights
        self._smoothness: list[float] | None = None  # of each rank, where it was measured
        self._to_be_weighed = False

    @override
    def check(self, trainer: pl.Trainer) -> None:
        super().check(trainer)
        if self.weights == "auto":
            check_can_probe(trainer, trainer.lightning_module, "EF21Strategy(weights='auto')")

    @override
    def make_state(self) -> CompressionState:
        state = super().make_state()
        fresh = state.step == 0
        self._smoothness = (self._loaded or {}).get("smoothness")
        if fresh and not isinstance(self.weights, str):
            try:
                state.set_weights(self.weights)
            except ValueError as error:
                raise MisconfigurationException(f"EF21Strategy: {error}") from error
        elif not isinstance(self.weights, str) and state.weights not in (None, self.weights):
            rank_zero_warn(
                f"EF21Strategy goes on with the ranks' weights of the checkpoint, {state.weights}, which its estimates"
                f" were made with, and not with weights={self.weights}."
            )
        self._to_be_weighed = fresh and self.weights == "auto"
        return state

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._to_be_weighed and self.state is not None:
            self._to_be_weighed = False
            self._weigh(self.state, args[0] if args else kwargs["batch"])
        return super().training_step(*args, **kwargs)

    def _weigh(self, state: CompressionState, batch: Any) -> None:
        assert self.lightning_module is not None
        own = torch.tensor([estimate_smoothness(self.lightning_module, batch)], device=self.root_device)
        everyone = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(everyone, own)
        smoothness = torch.cat(everyone).double().cpu()
        if not bool((smoothness.isfinite() & (smoothness > 0)).all()):
            rank_zero_warn(f"EF21Strategy: the ranks' losses have smoothness {smoothness.tolist()}; weighed alike.")
            return
        self._smoothness = smoothness.tolist()
        state.set_weights((smoothness / smoothness.sum()).tolist())

    @override
    def more_to_save(self) -> dict[str, Any]:
        return {"smoothness": self._smoothness}

    @override
    def metrics(self, state: CompressionState) -> dict[str, Tensor]:
        values = super().metrics(state)
        if self._smoothness is not None:
            assert self.lightning_module is not None
            sizes = [p.numel() for p in self.lightning_module.parameters() if p.requires_grad]
            alphas = [self.compressor.delta(n) for n in sizes if n >= state.min_numel]
            if alphas and None not in alphas:
                mean = sum(self._smoothness) / len(self._smoothness)  # at least the smoothness of the mean
                gamma = ef21_stepsize(mean, self._smoothness, min(a for a in alphas if a is not None))
                values["comm/ef21_gamma_max"] = torch.tensor(gamma)
        return values
