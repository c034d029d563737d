"""Evaluating the loss of a LightningModule for a plugin's own purposes, without a trace."""

import collections
import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric

Loss = Callable[[Any], Tensor]
LossFn = Callable[[pl.LightningModule, Any], Tensor]

LARGE = 2**20  # elements; a larger tensor that is neither buffer nor parameter nor of a metric is taken for data
FEW = 64  # entries; containers within longer ones are taken for data
_INTERNALS = frozenset(vars(nn.Module()))
_CONTAINERS = (
    list,
    dict,
    set,
    collections.OrderedDict,
    collections.defaultdict,
    collections.Counter,
    collections.deque,
)
_RANDOM = (random.Random, np.random.Generator, np.random.RandomState)


def check_can_probe(
    trainer: pl.Trainer, pl_module: pl.LightningModule, who: str, loss_fn: LossFn | None = None
) -> None:
    """Refuse what :func:`probing` cannot evaluate; to be called in ``setup``.

    Args:
        trainer: About to fit.
        pl_module: Its module.
        who: The plugin that asks.
        loss_fn: As for :func:`probing`.

    Raises:
        MisconfigurationException: With manual optimization and no ``loss_fn``, a ``training_step`` that takes
            ``dataloader_iter``, or a strategy that shards the module.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise MisconfigurationException(
            f"{who} evaluates the loss of the whole module, and {type(trainer.strategy).__name__} may hold parts of it;"
            " use a single device or DDP."
        )
    if loss_fn is None and not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{who} cannot evaluate the loss of {type(pl_module).__name__} by its training_step, which optimizes by"
            " hand; give loss_fn=..., a function of the module and a batch."
        )
    if loss_fn is None and is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            f"{who} has no batch to give to a training_step that takes dataloader_iter; give loss_fn=..., a function of"
            " the module and a batch."
        )


@contextlib.contextmanager
def probing(
    trainer: pl.Trainer, pl_module: pl.LightningModule, loss_fn: LossFn | None = None, batch_idx: int = 0
) -> Iterator[Loss]:
    """Within, ``loss(batch)`` is the training loss of a batch on the device; behind, all is as it was before.

    The loss is that of ``training_step`` of the module itself, without DDP around it, without the Trainer's autocast,
    and with compiled parts run eagerly, so that it can be differentiated twice. A ``training_step`` that skips the
    batch gives NaN, which reaches the gradient.

    The module works on twins of what it may write to: buffers, metrics, random generators, plain attributes such as
    counters, lists and tensors. ``self.log`` does nothing, and loggers are dummies. The global random states and those
    of the device are put back. Modes stay as they are: dropout draws, and BatchNorm uses the statistics of the batch.

    Nothing here touches weights or ``.grad``: take derivatives by ``torch.autograd.grad``, inside. What goes on between
    ranks is not undone, so every rank must make the same evaluations if the module communicates. Not undone either:
    what ``training_step`` does to objects beyond the module, and forward hooks, which see the evaluations.

    Args:
        trainer: Fitting; see :func:`check_can_probe`.
        pl_module: Its module.
        loss_fn: Computes the loss from module and batch in the place of ``training_step``.
        batch_idx: For a ``training_step`` that asks for it.

    Yields:
        The loss: a function of a batch that returns a 0-dim tensor with its graph.

    Cost: a copy of the module's buffers and metric states, and two transfers of random states. With ``torch.compile``
        the evaluation itself is that of the plain module.
    """
    loss = loss_of(pl_module, loss_fn, batch_idx)
    loggers = trainer.loggers
    try:
        with untouched(pl_module, trainer.strategy.root_device):
            trainer.loggers = [DummyLogger() for _ in loggers]
            yield loss
    finally:
        trainer.loggers = loggers


@contextlib.contextmanager
def untouched(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, a module may be evaluated and differentiated twice; behind, all is as it was before.

    See :func:`probing` for what is put back, and what is not. It needs no Trainer: ``self.log`` does nothing.

    Args:
        module: Of any kind.
        device: Whose random state is put back.
    """
    generators = _random_states(device)
    modules = list(module.modules())
    before = [(m, dict(vars(m))) for m in modules]
    memo: dict[int, Any] = {}
    try:
        for m in modules:
            vars(m).update(_twins(m, memo))
            if isinstance(m, pl.LightningModule):
                vars(m).update(log=_silent, log_dict=_silent)
        with torch.inference_mode(False), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for m, attributes in before:
            vars(m).clear()
            vars(m).update(attributes)
        _set_random_states(device, generators)


def is_probed(module: nn.Module) -> bool:
    """Whether a LightningModule is being evaluated within :func:`untouched`."""
    return vars(module).get("log") is _silent


def loss_of(module: Any, loss_fn: LossFn | None = None, batch_idx: int = 0) -> Loss:
    """The loss of a batch as a scalar: that of ``loss_fn``, or else of ``training_step``; NaN for a skipped batch."""
    step = loss_fn or _training_step(module, batch_idx)
    return lambda batch: _scalar(step(module, batch), module)


def _training_step(pl_module: pl.LightningModule, batch_idx: int) -> Callable[[pl.LightningModule, Any], Any]:
    # as Lightning decides it
    takes_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
    index = (batch_idx,) if takes_index else ()
    return lambda module, batch: module.training_step(batch, *index)


def _scalar(output: Any, module: nn.Module) -> Tensor:
    loss = output.get("loss") if isinstance(output, dict) else output
    if loss is None:
        trained = next(p for p in module.parameters() if p.requires_grad)
        return (trained * torch.nan).sum()
    return loss.reshape(())


def _silent(*args: Any, **kwargs: Any) -> None:
    """In the place of ``self.log``."""


def _twins(module: nn.Module, memo: dict[int, Any]) -> dict[str, Any]:
    """What the attributes of a module are for the time of a probe."""
    limit = float("inf") if isinstance(module, Metric) else LARGE
    own = {name: _twin(value, memo, limit) for name, value in vars(module).items() if name not in _INTERNALS}
    buffers = {name: _twin(value, memo, float("inf")) for name, value in vars(module)["_buffers"].items()}
    return {**own, "_buffers": buffers}


def _twin(value: Any, memo: dict[int, Any], limit: float) -> Any:
    """A copy of a value that can be written to; the value itself if that cannot be."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor):
        if value.requires_grad or value.numel() > limit or isinstance(value, nn.Parameter):
            return value
        twin: Any = value.clone()
    elif isinstance(value, torch.Generator):
        twin = torch.Generator(value.device)
        twin.set_state(value.get_state())
    elif isinstance(value, _RANDOM):
        twin = copy.deepcopy(value)
    elif type(value) in _CONTAINERS:
        twin = copy.copy(value)
        memo[id(value)] = twin
        if len(value) <= FEW and isinstance(value, dict):
            twin.update((key, _twin_inside(entry, memo)) for key, entry in value.items())
        elif len(value) <= FEW and isinstance(value, list):
            twin[:] = [_twin_inside(entry, memo) for entry in value]
    else:
        return value
    memo[id(value)] = twin
    return twin


def _twin_inside(value: Any, memo: dict[int, Any]) -> Any:
    """Of an entry of a container: containers and counters are written to, tensors are replaced."""
    return value if isinstance(value, Tensor) else _twin(value, memo, LARGE)


def _random_states(device: torch.device) -> tuple[Any, ...]:
    on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_device


def _set_random_states(device: torch.device, states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.get_device_module(device).set_rng_state(states[3], device)
