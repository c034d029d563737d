"""What strategies share that train by evaluations of the loss alone, over the ranks of torch.distributed."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.data import ResumableLoader

from ._candidates import CandidateLoss, FlatParameters, Vectorize, parts

KEY = "lightning_opt_search"  # of the state in a checkpoint


class GradientFreeStrategy(DDPStrategy):
    """A strategy whose step chooses new parameters from losses of candidates.

    A subclass says what it does in :meth:`start`, :meth:`search`, :meth:`search_state` and :meth:`load_search_state`.
    This class does the rest:

    - It runs on one device, without torch.distributed, and on several ranks, which it starts as DDP does. There is no
      DDP wrapper and no backward; all ranks begin with the parameters and buffers of rank 0.
    - One batch is one step of the Trainer. :meth:`search` returns the vector that the parameters then take;
      ``training_step`` runs there once as usual, which gives the step's loss and what the module logs. Evaluations of
      candidates log nothing and leave no trace.
    - ``same_batch``: every rank reads every training batch, so that candidates are compared on one objective; with
      ``same_batch = False`` each rank reads its own share. Validation is shared out over ranks either way.
    - What is searched are the parameters that the optimizer holds and that require a gradient. The optimizer is not
      used otherwise: no learning rate, no weight decay, no schedule, no gradient clipping.
    - The state of all ranks goes into every checkpoint and comes back with ``fit(ckpt_path=...)``.

    Args:
        vectorize: Whether candidates are evaluated at once by ``torch.func.vmap``: "auto" where the module allows it,
            "always" (an error where it does not) or "never".
        chunk: Candidates evaluated at once; None lets the size of the intermediate results decide.
        ddp: What :class:`lightning.pytorch.strategies.DDPStrategy` takes, ``process_group_backend`` and
            ``start_method`` among it.

    Raises:
        ValueError: If a value is out of range.
        MisconfigurationException: In ``setup``, for gradient accumulation or clipping, manual optimization, a
            GradScaler (``precision="16-mixed"``), normalization with running statistics, a ``training_step`` that
            takes ``dataloader_iter``, arguments that are about DDP's gradients, and a callback that works on gradients
            (it says ``needs_gradients = True``).
    """

    same_batch: ClassVar[bool] = True
    log_prefix: ClassVar[str]

    def __init__(self, *, vectorize: Vectorize = "auto", chunk: int | None = None, **ddp: Any) -> None:
        super().__init__(**ddp)
        check_choice("vectorize", vectorize, ["auto", "always", "never"])
        if chunk is not None:
            check_interval("chunk", chunk, 1)
        self._vectorize: Vectorize = vectorize
        self._candidates_at_once = chunk
        self._refused = [name for name in ("ddp_comm_hook", "ddp_comm_state", "ddp_comm_wrapper") if ddp.get(name)]
        self._loaded: dict[str, Any] | None = None  # between load_checkpoint and the start of training
        self._batch: tuple[Any, int] | None = None
        self._to_log: dict[str, float] = {}
        self._started = False

    @abstractmethod
    def start(self, point: Tensor) -> None:
        """Begin a search at the module's parameters ``[dimension]``; in every ``fit``, before any state is loaded."""

    @abstractmethod
    def search(self) -> tuple[Tensor, dict[str, float]]:
        """One step: evaluate candidates, and return the parameters to take ``[dimension]`` and what to log.

        Both the same on all ranks, unless each reads its own batches. Names are logged as ``<log_prefix>/<name>``.
        """

    @abstractmethod
    def search_state(self) -> dict[str, Any]:
        """The state of this rank: tensors and builtins."""

    @abstractmethod
    def load_search_state(self, states: list[dict[str, Any]]) -> None:
        """Take back what :meth:`search_state` returned on each rank of the run that was saved, by rank.

        Raises:
            MisconfigurationException: If it is of a search that this one cannot continue.
        """

    # What subclasses use

    def evaluate(self, points: Tensor) -> Tensor:
        """Losses ``[n]`` of points ``[n, dimension]`` on the batch of this step, in float32 or wider.

        Without a graph, without a trace; a loss that is not finite is returned as it is, and NaN where
        ``training_step`` returns None. Calls no collective: ranks may evaluate different numbers of points.
        """
        assert self._batch is not None
        return self.candidate_loss(points, *self._batch)

    def own_part(self, n: int) -> range:
        """Which of ``n`` candidates this rank evaluates."""
        return parts(n, self.world_size)[self.global_rank]

    def gather(self, values: Tensor, own: Iterable[int], n: int) -> Tensor:
        """All of ``n`` values, one a candidate, from those of each rank; the same bits on every rank.

        Args:
            values: Of this rank, ``[len(own)]``.
            own: Which candidates they belong to; every candidate belongs to one rank.
            n: Candidates in all.

        Returns:
            ``[n]``. NaN arrives as NaN and infinity as infinity.
        """
        everything = torch.zeros(n, dtype=values.dtype, device=self.root_device)
        everything[torch.as_tensor(list(own), dtype=torch.int64, device=self.root_device)] = values.to(self.root_device)
        return self.sum_over_ranks(everything)  # one number and zeros: exact

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self._is_distributed():
            dist.all_reduce(tensor)
        return tensor

    def is_searched(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether a parameter that the optimizer holds is part of the search."""
        return parameter.requires_grad

    # Lightning's hooks

    def setup_distributed(self) -> None:
        """Join the other ranks, if there are any."""
        if self._is_alone():
            self.set_world_ranks()
        else:
            super().setup_distributed()

    def _configure_launcher(self) -> None:
        if self._is_alone():
            self._launcher = None
        else:
            super()._configure_launcher()

    def setup(self, trainer: pl.Trainer) -> None:
        """Check what the search cannot do, and set up the module on its device."""
        fitting = trainer.state.fn == "fit"
        if fitting:
            self._check(trainer)
        elif self._is_alone():
            self.configure_alone(trainer)
            return
        super().setup(trainer)

    def configure_alone(self, trainer: pl.Trainer) -> None:
        """Set up one device for an evaluation: there is nobody to take a module's parameters from."""
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self.setup_precision_plugin()

    def configure_ddp(self) -> None:
        """Begin on all ranks with the parameters and buffers of rank 0; nothing wraps the module."""
        assert self.lightning_module is not None
        if self._is_distributed():
            with torch.no_grad():
                for tensor in (*self.lightning_module.parameters(), *self.lightning_module.buffers()):
                    dist.broadcast(tensor, src=0)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """One share for all ranks while training, if they are to read the same batches."""
        if self._is_training_data() and self.same_batch:
            return {"num_replicas": 1, "rank": 0}
        return super().distributed_sampler_kwargs

    def process_dataloader(self, dataloader: object) -> object:
        """The same for a loader that finds its rank by itself."""
        if isinstance(dataloader, ResumableLoader) and self._is_training_data():
            dataloader.same_on_all_ranks = self.same_batch
        return super().process_dataloader(dataloader)

    def on_train_start(self) -> None:
        """Begin the search, or take it up again."""
        module = self.lightning_module
        assert module is not None
        held = {id(p) for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        named = {n: p for n, p in module.named_parameters() if id(p) in held and self.is_searched(n, p)}
        try:
            self.flat = FlatParameters(named)
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
        self.candidate_loss = CandidateLoss(module, self.flat, self, self._vectorize, self._candidates_at_once)
        self.start(self.flat.read())
        if self._loaded is not None:
            self._take_up(self._loaded)
            self._loaded = None
        self._started = True
        super().on_train_start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Keep the batch for the evaluations."""
        self._batch = batch, batch_idx

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The one evaluation of a step that logs."""
        assert self.lightning_module is not None
        with torch.no_grad():  # the loop's closure switches gradients on
            output = super().training_step(*args, **kwargs)
            for name, value in self._to_log.items():
                self.lightning_module.log(f"{self.log_prefix}/{name}", value, on_step=True, on_epoch=False)
        return output

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Nothing: there is no graph."""
        return closure_loss

    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        """Choose the parameters, then run ``training_step`` there."""
        with torch.no_grad():
            point, self._to_log = self.search()
            self.flat.write(point)
        loss = closure()
        self._batch = None
        return loss

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Add the state of all ranks."""
        if self._started and "optimizer_states" in checkpoint:  # not save_weights_only
            state = move_data_to_device(self.search_state(), torch.device("cpu"))
            states: list[Any] = [state]
            if self._is_distributed():
                states = [None] * self.world_size
                dist.gather_object(state, states if self.is_global_zero else None)
            checkpoint[KEY] = {"strategy": type(self).__name__, "ranks": states}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Keep the state aside; Lightning loads before it sets up."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self._loaded = checkpoint.get(KEY, {})
        return checkpoint

    def teardown(self) -> None:
        """Let go of the batch and of a checkpoint that was loaded to evaluate; the state stays, to be saved."""
        self._batch = self._loaded = None
        super().teardown()

    # Helpers

    def _take_up(self, loaded: dict[str, Any]) -> None:
        if loaded.get("strategy") != type(self).__name__:
            wrote = loaded.get("strategy", "a strategy without a search")
            rank_zero_warn(
                f"{type(self).__name__}: the checkpoint was written with {wrote}; the search begins at its weights."
            )
            return
        self.load_search_state(move_data_to_device(loaded["ranks"], self.root_device))

    def _check(self, trainer: pl.Trainer) -> None:
        """Refuse what would be silently wrong."""
        name, module = type(self).__name__, trainer.lightning_module
        if trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                f"{name} makes a step of every batch and cannot accumulate: accumulate_grad_batches must be 1, got"
                f" {trainer.accumulate_grad_batches}. Use larger batches."
            )
        if trainer.gradient_clip_val or is_overridden("configure_gradient_clipping", module):
            raise MisconfigurationException(f"{name} has no gradients to clip: leave out gradient_clip_val.")
        if not module.automatic_optimization:
            raise MisconfigurationException(
                f"{name} chooses the parameters itself, and {type(module).__name__} optimizes by hand:"
                " automatic_optimization must be True."
            )
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                f"{name} has no gradients to scale: precision must be 32-true, 64-true or bf16-mixed, got 16-mixed."
            )
        if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise MisconfigurationException(f"{name} has no batch to give to a training_step with dataloader_iter.")
        for child_name, child in module.named_modules():
            if getattr(child, "running_mean", None) is not None:
                raise MisconfigurationException(
                    f"{name} cannot search over a module whose statistics follow the evaluations: {child_name} of type"
                    f" {type(child).__name__} needs track_running_stats=False, or another normalization."
                )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if getattr(callback, "needs_gradients", False):
                raise MisconfigurationException(
                    f"{name} has no gradients, and {type(callback).__name__} works on them; leave it out."
                )
        if self._refused:
            raise MisconfigurationException(f"{name} sends no gradients; leave out {', '.join(self._refused)}.")

    def _is_alone(self) -> bool:
        return self.num_nodes * self.num_processes == 1 and self.world_size == 1  # Ray tells the latter only

    def _is_distributed(self) -> bool:
        return not self._is_alone() and dist.is_available() and dist.is_initialized()

    def _is_training_data(self) -> bool:
        return self.lightning_module is not None and self.lightning_module.trainer.training
