"""Data-parallel training whose gradients travel compressed: what the strategies with error feedback share."""

import re
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NoReturn

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.apply_func import apply_to_collection  # type: ignore[attr-defined]
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, FSDPPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_opt._checks import check_choice
from lightning_opt._lightning.log_rows import is_log_step, write_row
from lightning_opt.compression import CompressionState, Compressor, TopK, compressed_allreduce_hook
from lightning_opt.compression.state import Algorithm, check_eta, mean_local_state

OnWorldSizeChange = Literal["raise", "mean"]
KEY = "compression"  # of the checkpoint


class CompressedDDPStrategy(DDPStrategy):
    """DDP with a communication hook that compresses, on any device, and is part of the checkpoint.

    Args:
        algorithm: One of those of :class:`CompressionState`.
        compressor: By default ``TopK(ratio=0.01)``.
        options: Further arguments of :class:`CompressionState`.
        on_world_size_change: What to do with a checkpoint of another number of ranks.
        kwargs: Those of Lightning's DDPStrategy and of DistributedDataParallel.
    """

    log_prefix: ClassVar[str] = "comm"

    def __init__(
        self,
        algorithm: Algorithm,
        compressor: Compressor | None,
        options: dict[str, Any],
        on_world_size_change: OnWorldSizeChange,
        **kwargs: Any,
    ) -> None:
        own = ("ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper", "model_averaging_period")
        for name in own:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} must be None, got {kwargs[name]!r}: {type(self).__name__} is a communication hook itself,"
                    " and DDP takes one; use DDPStrategy with yours, or this one without"
                )
        if kwargs.get("find_unused_parameters") and kwargs.get("static_graph"):
            raise ValueError("find_unused_parameters and static_graph must not both be True, got True and True")
        check_choice("on_world_size_change", on_world_size_change, ["raise", "mean"])
        super().__init__(**kwargs)
        self.algorithm: Algorithm = algorithm
        self.compressor = TopK(ratio=0.01) if compressor is None else compressor
        self.options, self.on_world_size_change = options, on_world_size_change
        check_eta(algorithm, self.compressor, options.get("eta"))
        CompressionState(algorithm, self.compressor, **options)  # refuses wrong values
        self.state: CompressionState | None = None  # of the fit under way
        self._loaded: dict[str, Any] | None = None  # between the checkpoint and the model

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.check(trainer)
        super().setup(trainer)
        self._loaded = None

    def check(self, trainer: pl.Trainer) -> None:
        """Refuse what cannot be trained this way, before anything is wrapped.

        Raises:
            MisconfigurationException: For sharded modules and their precision plugins, and sparse or complex gradients.
        """
        name, module = type(self).__name__, trainer.lightning_module
        sharded = [n for n, m in module.named_modules() if isinstance(m, FullyShardedDataParallel)]
        if sharded or isinstance(self.precision_plugin, FSDPPrecision | DeepSpeedPrecision):
            what = f"{sharded[0] or 'the module'} is FSDP" if sharded else type(self.precision_plugin).__name__
            raise MisconfigurationException(
                f"{name} compresses the whole gradient of each rank, and {what}: FSDP and DeepSpeed divide gradients"
                " among the ranks. Use this strategy without them, or theirs without this one."
            )
        for n, m in module.named_modules():
            if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse:
                raise MisconfigurationException(
                    f"{name} cannot compress the sparse gradients of {n}; use sparse=False."
                )
        for n, p in module.named_parameters():
            if p.requires_grad and p.is_complex():
                raise MisconfigurationException(f"{name} cannot compress the complex gradients of {n}.")

    @override
    def configure_ddp(self) -> None:
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        self.state = None
        if self.world_size == 1:
            if self._loaded is not None and self.on_world_size_change == "raise":
                self._refuse(self._loaded["shared"]["world_size"])
            rank_zero_warn(
                f"{type(self).__name__} has one rank and nobody to send gradients to: it trains as DDP does, without"
                " compression."
            )
            return
        self.state = self.make_state()
        self.model.register_comm_hook(self.state, compressed_allreduce_hook)

    def make_state(self) -> CompressionState:
        """The state of this rank, that of the checkpoint if there is one."""
        assert self.lightning_module is not None
        state = CompressionState(
            self.algorithm, self.compressor, rank=self.global_rank, world_size=self.world_size, **self.options
        )
        state.name_parameters(self.lightning_module)
        state.loss_scale = self._loss_scale()
        if self._loaded is not None:
            shared, ranks = self._loaded["shared"], self._loaded["ranks"]
            if shared["world_size"] == self.world_size:
                local = ranks[self.global_rank]
            elif self.on_world_size_change == "mean":
                local = mean_local_state(shared, ranks)
            else:
                self._refuse(shared["world_size"])
            try:
                state.load(shared, local, self.lightning_module.named_parameters())
            except ValueError as error:
                raise MisconfigurationException(f"{type(self).__name__} cannot resume: {error}") from error
        self._warn_if_useless(state)
        return state

    def _refuse(self, ranks: int) -> NoReturn:
        raise MisconfigurationException(
            f"the checkpoint was written by {ranks} ranks, this run has {self.world_size}, and"
            f" each rank of {type(self).__name__} remembers something of its own. Resume with as many ranks, or"
            " with on_world_size_change='mean', by which every rank begins with the mean."
        )

    def _loss_scale(self) -> Callable[[], Tensor] | None:
        scaler = getattr(self.precision_plugin, "scaler", None)
        if scaler is None:
            return None
        one = torch.ones((), device=self.root_device)
        return lambda: scaler.scale(one)

    def _warn_if_useless(self, state: CompressionState) -> None:
        """Every message goes to every rank, while a ring sums dense gradients on the way."""
        assert self.lightning_module is not None
        sizes = [p.numel() for p in self.lightning_module.parameters() if p.requires_grad]
        sent = sum(self.compressor.nbytes(n) if n >= state.min_numel else 4 * n for n in sizes) * self.world_size
        if sent > 8 * sum(sizes):
            rank_zero_warn(
                f"{type(self).__name__}: {self.compressor!r} on {self.world_size} ranks sends"
                f" {sent / (8 * sum(sizes)):.1f} times the bytes of dense gradients; compress more, or use DDP."
            )

    # --- steps -----------------------------------------------------------------------------------------------------

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        super().pre_backward(closure_loss)
        if self.state is not None:
            self.state.measure = self._logs()

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self.state is not None and self._logs():
            write_row(self._trainer(), {name: value.item() for name, value in self.metrics(self.state).items()})
        return output

    def metrics(self, state: CompressionState) -> dict[str, Tensor]:
        """What is logged."""
        return state.metrics()

    def _logs(self) -> bool:
        trainer = self._trainer()
        return bool(trainer.loggers) and is_log_step(trainer)

    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        message = str(exception)
        for pattern, hint in _HINTS:
            if re.search(pattern, message) and hint not in message:
                exception.args = (f"{message}\n{hint}", *exception.args[1:])

    # --- checkpoints -----------------------------------------------------------------------------------------------

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if self.state is not None and "loops" in checkpoint:  # not where weights alone are saved
            own = apply_to_collection(self.state.local_state(), Tensor, _cpu_copy)
            ranks: list[Any] | None = [None] * self.world_size if self.is_global_zero else None
            dist.gather_object(own, ranks)
            shared = apply_to_collection(self.state.shared_state(), Tensor, _cpu_copy)
            checkpoint[KEY] = {"shared": shared, "ranks": ranks, **self.more_to_save()}
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def more_to_save(self) -> dict[str, Any]:
        """What a strategy adds: tensors and builtins, the same on every rank."""
        return {}

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        self._loaded = checkpoint.get(KEY)
        return checkpoint


_HINTS = (
    (
        r"(?i)timed out|timeout|connection (closed|reset|refused)|broken pipe|socket",
        "A rank did not arrive, or is gone: look for its own error above or in its log. `timeout` of the strategy says"
        " how long to wait; training goes on from the last checkpoint with ckpt_path=.",
    ),
    (
        r"parameters that were not used in producing the loss",  # as Lightning puts it
        "With this strategy: --trainer.strategy.find_unused_parameters=true, or find_unused_parameters=True.",
    ),
)


def _cpu_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
