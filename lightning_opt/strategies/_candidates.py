"""The training loss of many candidate parameter vectors on one batch, without a graph and without a trace."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_opt._lightning.probe import loss_of, untouched

Vectorize = Literal["auto", "always", "never"]
# bytes of intermediate results that a chunk of candidates may have: on a CPU about its last cache
CHUNK_BYTES = {"cpu": 2**25}
CHUNK_BYTES_ELSEWHERE = 2**30


class FlatParameters:
    """Named parameters as one vector.

    Args:
        named: Parameters by name, all of one dtype and on one device.

    Raises:
        ValueError: If there is none, or their dtypes or devices differ.

    Example:
        >>> flat = FlatParameters(dict(torch.nn.Linear(2, 1).named_parameters()))
        >>> flat.write(torch.arange(3.0))
        >>> flat.read(), flat.views(torch.zeros(5, 3))["weight"].shape
        (tensor([0., 1., 2.]), torch.Size([5, 1, 2]))
    """

    def __init__(self, named: dict[str, nn.Parameter]) -> None:
        if not named:
            raise ValueError("there must be a parameter to search over, got none that is trained")
        kinds = {(p.dtype, p.device) for p in named.values()}
        if len(kinds) > 1:
            raise ValueError(f"parameters must be of one dtype and on one device, got {sorted(map(str, kinds))}")
        self.named = named
        self.dimension = sum(p.numel() for p in named.values())
        ((self.dtype, self.device),) = kinds

    def views(self, points: Tensor) -> dict[str, Tensor]:
        """Vectors ``[..., dimension]`` as parameters ``[..., *shape]`` by name, without a copy."""
        parts = points.split([p.numel() for p in self.named.values()], dim=-1)
        batch = points.shape[:-1]
        return {name: part.view(*batch, *p.shape) for (name, p), part in zip(self.named.items(), parts, strict=True)}

    def read(self) -> Tensor:
        """The parameters, ``[dimension]``, a copy."""
        return torch.cat([p.detach().reshape(-1) for p in self.named.values()])

    @torch.no_grad()
    def write(self, point: Tensor) -> None:
        """Set the parameters to a vector ``[dimension]``."""
        for name, view in self.views(point.to(self.device, self.dtype)).items():
            self.named[name].copy_(view)


class CandidateLoss:
    """Evaluates ``training_step`` of a module at candidates for its parameters.

    A module is evaluated at many candidates at once by ``torch.func.vmap``, in chunks whose intermediate results stay
    in the cache; where its code does not allow that (a branch on values, ``.item()``, a metric or a buffer that it
    writes to), at one after the other. The first call tries, and holds two of the losses against a loop. Each
    candidate sees the same random numbers (dropout), and nothing of an evaluation stays: see
    :func:`lightning_opt._lightning.probe.untouched`.

    Args:
        module: Its ``training_step`` gives the loss.
        flat: The parameters that are searched.
        strategy: Its ``train_step_context`` is that of the Trainer's precision.
        vectorize: "auto", or "always" and "never" to insist.
        chunk: Candidates evaluated at once; None lets the size of the intermediate results decide.

    Cost: one forward pass a candidate; per chunk one copy of the buffers and two transfers of random states.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        flat: FlatParameters,
        strategy: Any,
        vectorize: Vectorize = "auto",
        chunk: int | None = None,
    ) -> None:
        self._module = module
        self._flat = flat
        self._strategy = strategy
        self._vectorize = vectorize
        self._chunk = chunk

    @torch.no_grad()
    def __call__(self, points: Tensor, batch: Any, batch_idx: int) -> Tensor:
        """Losses ``[n]``, in float32 or wider, of points ``[n, dimension]`` on the batch."""
        if len(points) == 0:
            return torch.empty(0, dtype=torch.promote_types(points.dtype, torch.float32), device=points.device)
        points = points.to(self._flat.device, self._flat.dtype)
        if self._chunk is None and self._vectorize != "never":
            with _CountBytes() as results:
                self._losses(None, batch, batch_idx)
            limit = CHUNK_BYTES.get(self._flat.device.type, CHUNK_BYTES_ELSEWHERE)
            self._chunk = max(1, limit // max(results.bytes, 1))
        if self._vectorize == "auto":
            self._vectorize = self._try(points, batch, batch_idx)
        losses = self._at_once if self._vectorize == "always" else self._one_by_one
        return losses(points, batch, batch_idx)

    def measure(self, batch_idx: int) -> Callable[[Any], Tensor]:
        """What is measured of a candidate: a function of the batch, called with the module's parameters set."""
        return loss_of(self._module, batch_idx=batch_idx)

    def _try(self, points: Tensor, batch: Any, batch_idx: int) -> Vectorize:
        """Whether candidates can be evaluated at once, with the losses that they have one by one."""
        few = points[:2]
        try:
            reason = self._difference(few, batch, batch_idx)
            if reason and self._draws(batch, batch_idx):  # vmap draws other random numbers than a loop
                with untouched(self._module, self._flat.device):
                    self._module.eval()
                    reason = self._difference(few, batch, batch_idx)
        except Exception as error:  # whatever vmap cannot do
            reason = str(error).partition("\n")[0]
        if not reason:
            return "always"
        rank_zero_info(
            f"{type(self._strategy).__name__}: {type(self._module).__name__} is evaluated at one candidate after the"
            f" other, since torch.func.vmap cannot evaluate it at several: {reason}"
        )
        return "never"

    def _difference(self, points: Tensor, batch: Any, batch_idx: int) -> str:
        at_once, one_by_one = (losses(points, batch, batch_idx) for losses in (self._at_once, self._one_by_one))
        tolerance = 100 * torch.finfo(self._compute_dtype()).eps
        equal = torch.allclose(at_once, one_by_one, rtol=tolerance, atol=tolerance, equal_nan=True)
        return "" if equal else f"the losses differ, {at_once.tolist()} and {one_by_one.tolist()}"

    def _draws(self, batch: Any, batch_idx: int) -> bool:
        device = self._flat.device
        generators = torch if device.type == "cpu" else torch.get_device_module(device)
        with untouched(self._module, device), torch.no_grad():
            before = generators.get_rng_state()
            loss_of(self._module, batch_idx=batch_idx)(batch)
            return not torch.equal(before, generators.get_rng_state())

    def _compute_dtype(self) -> torch.dtype:
        with self._strategy.precision_plugin.train_step_context():
            kind = self._flat.device.type
            return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self._flat.dtype

    def _one_by_one(self, points: Tensor, batch: Any, batch_idx: int) -> Tensor:
        before = self._flat.read()
        losses = []
        try:
            for point in points:
                self._flat.write(point)
                losses.append(self._losses(None, batch, batch_idx))
        finally:
            self._flat.write(before)
        return torch.stack(losses)

    def _at_once(self, points: Tensor, batch: Any, batch_idx: int) -> Tensor:
        assert self._chunk is not None
        return torch.cat([self._losses(some, batch, batch_idx) for some in points.split(self._chunk)])

    def _losses(self, points: Tensor | None, batch: Any, batch_idx: int) -> Tensor:
        """The losses of points at once, or that of the module as it is."""
        with (
            untouched(self._module, self._flat.device),
            torch.no_grad(),
            self._strategy.precision_plugin.train_step_context(),
        ):
            loss = self.measure(batch_idx)
            if points is None:
                return _wide(loss(batch))
            called = _Called(self._module, loss)

            def of_one(parameters: dict[str, Tensor]) -> Tensor:
                return functional_call(called, parameters, (batch,))

            views = {f"module.{name}": view for name, view in self._flat.views(points).items()}
            return _wide(vmap(of_one, randomness="same")(views))


class _Called(nn.Module):
    """A module whose forward is a function of another module."""

    def __init__(self, module: nn.Module, function: Any) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, batch: Any) -> Tensor:
        return self.function(batch)


class _CountBytes(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations make, without views."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            made = [x for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, Tensor)]
            self.bytes += sum(tensor.nbytes for tensor in made)
        return result


def _wide(losses: Tensor) -> Tensor:
    return losses.detach().to(torch.promote_types(losses.dtype, torch.float32))


def parts(n: int, ranks: int) -> Sequence[range]:
    """``n`` candidates in consecutive parts, one a rank, whose sizes differ by at most one.

    Example:
        >>> parts(5, 2)
        [range(0, 3), range(3, 5)]
    """
    ends = [n * rank // ranks + (n * rank % ranks > 0) for rank in range(ranks + 1)]
    return [range(start, end) for start, end in zip(ends, ends[1:], strict=False)]
