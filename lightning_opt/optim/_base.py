"""The base of our optimizers: torch.optim conventions, state that keeps its dtype, one update on several backends."""

import difflib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer as TorchOptimizer
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack, override

from lightning_opt import cpu_kernels, triton_kernels
from lightning_opt._checks import check_choice, check_interval, nearest

from ._rounding import store, stream
from ._tensor_list import TensorList

StateDtype = Literal["float32", "bfloat16"]
Scalar = float | Tensor | TensorList
"""A number of one step: a float, a 0-dim tensor, a vector with one value a tensor, or a list of 0-dim tensors."""


class Options(TypedDict, total=False):
    """Options that every optimizer of the package takes; each may be set per group.

    Attributes:
        maximize: Ascend instead of descend.
        foreach: Use ``torch._foreach_*`` (True), or a loop over tensors (False).
        fused: Use the fused kernel: None where it supports the tensors at hand, True always (or raise), False never.
            On CPU tensors that is the compiled CPU kernel, on CUDA tensors the Triton kernel.
        capturable: Keep the step count on the parameter's device and never wait for the device, for CUDA graphs.
        differentiable: Let autograd go through the step.
        state_dtype: dtype of the state tensors, or a dict with one per state name; None is float32 for low-precision
            parameters and the parameter's dtype otherwise.
        stochastic_rounding: Round bfloat16 parameters and states stochastically, with bits that depend on the step, the
            tensor and the element only.
    """

    maximize: bool
    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool
    state_dtype: StateDtype | dict[str, StateDtype] | None
    stochastic_rounding: bool


_OPTIONS = Options(
    maximize=False,
    foreach=None,
    fused=None,
    capturable=False,
    differentiable=False,
    state_dtype=None,
    stochastic_rounding=False,
)
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_DEVICE, _DTYPE = attrgetter("device"), attrgetter("dtype")


class Optimizer(TorchOptimizer):
    """torch.optim.Optimizer with what every optimizer of this package promises.

    A subclass gives ``validate`` (wrong values of a group), ``state_names`` and ``coefficients`` (the numbers of a
    step), and ``update`` (the mathematics, in place, in plain torch); ``fused_kernel`` names its fused twin. This
    class does the rest: closures, groups, missing, sparse and complex gradients, ``maximize``, ``foreach``,
    ``fused``, ``capturable`` and ``differentiable``, low-precision parameters and states, stochastic rounding.

    State of a bfloat16 or float16 parameter is float32 unless ``state_dtype`` says otherwise, and ``load_state_dict``
    keeps the dtype that was saved (torch casts it to the parameter's, pytorch/pytorch#43706).

    Args:
        params: Parameters, named parameters or groups, as everywhere in torch.optim.
        defaults: The method's own options; each may be set per group.
        **options: See :class:`Options`.

    Raises:
        ValueError: If an option is out of range (naming it), options exclude each other, or there are no parameters.
        RuntimeError: In ``step``, if a gradient is sparse; or if ``fused=True`` cannot be honoured.
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    update: ClassVar[Callable[..., None]]
    """The update of one tensor, or of a :class:`TensorList`, in place: the specification that kernels are held to.

    Called as ``update(p, g, state, c, **flags)`` with the parameter, its gradient (of the loss to be minimised; it must
    not be changed), a namespace with one tensor for each state name, one with the coefficients, and the :meth:`flags`.
    """
    counts_steps: ClassVar[bool] = True
    """Whether the update depends on the number of the step; ``step`` is then part of the state."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any], **options: Unpack[Options]) -> None:
        for name in options:
            if name not in _OPTIONS:
                near = nearest(name, [*defaults, *_OPTIONS], 1)
                hint = f". Did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}{hint}")
        self._update_pre_hooks: dict[int, Callable[[Any], None]] = {}
        super().__init__(params, {**defaults, **_OPTIONS, **options})

    # --- what a method gives ---------------------------------------------------------------------------------------

    def validate(self, group: dict[str, Any]) -> None:
        """Raise ValueError if a value of this group is wrong."""

    def states_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the state tensors that this group's options need."""
        return self.state_names

    def coefficients(self, step: Any, lr: Any, group: dict[str, Any]) -> dict[str, Any]:
        """The numbers of one step, computed alike from a float, a tensor or a :class:`TensorList` of steps.

        Args:
            step: Number of the step, from 1.
            lr: Learning rate.
            group: The parameter group.
        """
        raise NotImplementedError

    def flags(self, group: dict[str, Any]) -> dict[str, Any]:
        """Options that choose between forms of the update; keyword arguments of ``update`` and of the fused kernel."""
        return {}

    def prepare(self, gradients: Sequence[Tensor]) -> None:
        """Called in every step with all gradients of all groups, before any tensor is updated.

        For methods in which tensors depend on each other; gradients are as they are, also with ``maximize``.
        """

    def fused_kernel(self, group: dict[str, Any]) -> str | None:
        """Name of the kernel in ``cpu_kernels`` and ``triton_kernels``, or None if these options have none."""
        return None

    def statistics(self, loss: Tensor | None = None) -> dict[str, Tensor]:
        """What the method lets a user watch: 0-dim tensors, without waiting for the device.

        Args:
            loss: Loss of the last batch, where a quantity needs it.
        """
        return {}

    def diagnose(self, statistics: dict[str, float], step: int) -> str | None:
        """A warning if the statistics of a logged step show that the method has degenerated, else None."""
        return None

    @classmethod
    def param_groups_for(cls, module: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups of a module, without weight decay on biases and norms (fewer than two dimensions).

        Args:
            module: Any module; parameters that do not require gradients are left out.

        Returns:
            One or two groups of named parameters.

        Example:
            >>> from lightning_opt.optim import AdaBelief
            >>> groups = AdaBelief.param_groups_for(nn.Linear(3, 2))
            >>> [([name for name, _ in group["params"]], group.get("weight_decay")) for group in groups]
            [(['weight'], None), (['bias'], 0.0)]
        """
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [(name, p) for name, p in named if p.ndim > 1]},
            {"params": [(name, p) for name, p in named if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    # --- torch.optim -----------------------------------------------------------------------------------------------

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch.optim.

        Raises:
            ValueError: If one of its values is wrong; the group is then not added.
        """
        super().add_param_group(param_group)
        try:
            self._validate_options(self.param_groups[-1])
            self.validate(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def register_update_pre_hook(self, hook: Callable[[Any], None]) -> Callable[[], None]:
        """Call ``hook(optimizer)`` in every step after the closure and before the update, when gradients are final.

        torch's own ``register_step_pre_hook`` fires before the closure, when they are those of the step before.

        Returns:
            A function that removes the hook. Hooks are not pickled.
        """
        key = max(self._update_pre_hooks, default=0) + 1
        self._update_pre_hooks[key] = hook
        return lambda: self._update_pre_hooks.pop(key, None) and None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_update_pre_hooks": {}}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_update_pre_hooks", {})

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict and keep the dtype of every state tensor as it was saved.

        Options that the saved groups lack keep their present values, and so do ``foreach`` and ``fused``, which say how
        this machine computes.

        Args:
            state_dict: What ``state_dict()`` of an optimizer of the same class returned, on any device and backend.

        Raises:
            ValueError: If the state is not one of this method, or not of these parameters; nothing is loaded then.
        """
        groups = [
            {
                **{name: value for name, value in own.items() if name != "params"},
                **{name: value for name, value in saved.items() if name not in ("foreach", "fused")},
            }
            for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False)
        ]
        if len(groups) == len(state_dict["param_groups"]):  # else torch says what is wrong
            state_dict = {**state_dict, "param_groups": groups}
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = [p for group in self.param_groups for p in group["params"]]
        of_parameter = dict(zip(parameters, saved, strict=False))
        for group, own_group in zip(groups, self.param_groups, strict=False):
            for p in own_group["params"]:
                self._check_loaded(
                    state_dict["state"].get(of_parameter.get(p)), p, {**group, "params": own_group["params"]}
                )
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for p in group["params"]:
                for name, value in state_dict["state"].get(of_parameter.get(p), {}).items():
                    if isinstance(value, Tensor):
                        device = torch.device("cpu") if name == "step" and not group["capturable"] else p.device
                        self.state[p][name] = value.detach().to(device, copy=True)
                if p in self.state:
                    self._count_from_zero(p, self.state[p], group)

    def _check_loaded(self, state: Any, p: Tensor, group: dict[str, Any]) -> None:
        """Raise ValueError if what was loaded is not the state of this method for this parameter."""
        if not state:
            return
        wanted = [*self.states_of(group), *(["step"] if self.counts_steps else [])]
        missing = [name for name in wanted if not isinstance(state.get(name), Tensor)]
        if missing:
            raise ValueError(
                f"the loaded state has no tensor {missing[0]!r}{_naming(group, p)}, but {', '.join(state)}: it was "
                "saved by another library or method; convert it first, with from_peer_state_dict where "
                f"{type(self).__name__} has it"
            )
        for name in self.states_of(group):
            if state[name].shape != p.shape:
                raise ValueError(
                    f"the loaded {name!r} has shape {tuple(state[name].shape)}, but its parameter"
                    f"{_naming(group, p)} has {tuple(p.shape)}: it was saved for another model"
                )

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Re-evaluates the model and returns the loss.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: If a gradient is sparse, or ``fused=True`` cannot be honoured for a tensor.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for hook in list(self._update_pre_hooks.values()):
            hook(self)
        first, work = 0, []
        for group in self.param_groups:  # all are looked at before any is changed
            with _differentiable() if group["differentiable"] else torch.no_grad():
                work.append((group, self._batches(group, first)))
            first += len(group["params"])
        gradients = [g for _, batches in work for batch in batches for g in batch.grads]
        if gradients:
            with _differentiable() if any(group["differentiable"] for group, _ in work) else torch.no_grad():
                self.prepare(gradients)
        for group, batches in work:
            with _differentiable() if group["differentiable"] else torch.no_grad():
                for batch in batches:
                    self._step_batch(group, batch)
        return loss

    # --- one step --------------------------------------------------------------------------------------------------

    def init_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of a parameter before its first step: zeros."""
        state: dict[str, Tensor] = {}
        self._count_from_zero(p, state, group)
        for name in self.states_of(group):
            state[name] = torch.zeros_like(
                p, dtype=_state_dtype(p, group["state_dtype"], name), memory_format=torch.preserve_format
            )
        return state

    def _count_from_zero(self, p: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Start the count of steps where it is needed and has not begun."""
        if "step" not in state and (self.counts_steps or group["stochastic_rounding"]):
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if group["capturable"] else "cpu")

    def _batches(self, group: dict[str, Any], first: int) -> "list[_Batch]":
        """The tensors of a group with a gradient, by device and dtypes."""
        batch, entries = _Batch(), []
        for number, p in enumerate(group["params"], first):
            g = p.grad
            if g is None:
                continue
            if g.layout is not torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients"
                    f"{_naming(group, p)}: use torch.optim.SparseAdam for that parameter, or sparse=False in its layer"
                )
            state = self.state[p]
            if not state:
                state.update(self.init_state(p, group))
            batch.numbers.append(number)
            batch.params.append(p)
            batch.grads.append(g)
            entries.append(state)
        batch.states = {name: [state[name] for state in entries] for name in self.states_of(group)}
        batch.steps = [state["step"] for state in entries if "step" in state]
        return batch.by_kind()

    def _step_batch(self, group: dict[str, Any], batch: "_Batch") -> None:
        device = batch.params[0].device
        if batch.steps:  # with alpha, since the overload for numbers makes a tensor of the number for every step
            torch._foreach_add_(batch.steps, torch.ones((), device=batch.steps[0].device), alpha=1.0)
        if torch.is_complex(batch.params[0]):
            batch = batch.as_real()
        kernels = self._kernels(group, batch.params[0])
        if kernels is not None:
            self._step_fused(kernels, group, batch)
        elif group["differentiable"]:
            self._step_reference(group, batch, foreach=False)
        else:
            foreach = group["foreach"]
            self._step_reference(group, batch, foreach=device.type == "cuda" if foreach is None else foreach)

    def _kernels(self, group: dict[str, Any], p: Tensor) -> Any:
        """The package of fused kernels to use for tensors like this one, or None."""
        fused = group["fused"]
        if fused is False or group["differentiable"] or (fused is None and group["foreach"] is not None):
            return None
        package = {"cpu": cpu_kernels, "cuda": triton_kernels}.get(p.device.type)
        if self.fused_kernel(group) is None:
            reason = "these options have no fused kernel"
        elif torch.compiler.is_compiling():
            reason = "torch.compile cannot look into the fused kernels"
        elif type(p) not in (Tensor, nn.Parameter):  # such as DTensor, whose memory is not its own
            reason = f"there is no fused kernel for {type(p).__name__}"
        elif package is None:
            reason = f"there is no fused kernel for device {p.device}"
        else:
            reason = package.unsupported(p.real.dtype if p.is_complex() else p.dtype)
            if reason is None:
                return package
        if fused:
            raise RuntimeError(
                f"{type(self).__name__}(fused=True) cannot be honoured: {reason}; use fused=None or False"
            )
        return None

    def _step_fused(self, kernels: Any, group: dict[str, Any], batch: "_Batch") -> None:
        lr = group["lr"]
        if group["capturable"]:
            step: Any = torch.stack(batch.steps).double() if batch.steps else 0.0
            lr = lr.double() if isinstance(lr, Tensor) else lr
        else:
            steps = torch.stack(batch.steps).double() if batch.steps else torch.zeros(1, dtype=torch.float64)
            same = bool((steps == steps[0]).all())
            step, lr = (steps[0].item() if same else steps), float(lr)
        coefficients = {"step": step, **self.coefficients(step, lr, group)}
        kernels.launch(
            self.fused_kernel(group),
            batch.params,
            batch.grads,
            batch.states,
            coefficients,
            flags=self.flags(group),
            maximize=group["maximize"],
            stochastic_rounding=group["stochastic_rounding"],
            numbers=batch.numbers,
        )

    def _step_reference(self, group: dict[str, Any], batch: "_Batch", *, foreach: bool) -> None:
        flags = self.flags(group)
        lr = group["lr"]
        stays_on_device = group["capturable"] or group["differentiable"]
        if isinstance(lr, Tensor) and not stays_on_device:
            lr = lr.item()
        steps: list[Any] = [s.double() if stays_on_device else s.item() for s in batch.steps]
        steps = steps or [0.0] * len(batch.params)
        if foreach:
            for step, chosen in _by_step(steps).items():
                tensors = TensorList(steps) if step is None else step
                c = SimpleNamespace(**self.coefficients(tensors, lr, group))
                self._update_tensors(group, batch, chosen, steps, c, flags, TensorList)
            return
        computed: dict[Any, SimpleNamespace] = {}
        for i, step in enumerate(steps):
            key = id(step) if isinstance(step, Tensor) else step
            if key not in computed:
                computed[key] = SimpleNamespace(**self.coefficients(step, lr, group))
            self._update_tensors(group, batch, [i], steps, computed[key], flags, lambda tensors: tensors[0])

    def _update_tensors(
        self,
        group: dict[str, Any],
        batch: "_Batch",
        chosen: list[int],
        steps: list[Any],
        c: SimpleNamespace,
        flags: dict[str, Any],
        as_operand: Callable[[list[Tensor]], Any],
    ) -> None:
        """Run the reference on some tensors of a batch, low precision computed in float32 and rounded once."""
        params = [batch.params[i] for i in chosen]
        grads = [batch.grads[i] for i in chosen]
        dtype = torch.float32 if params[0].dtype in _LOW_PRECISION else params[0].dtype
        work = [p.to(dtype) for p in params]
        g = [(-x if group["maximize"] else x).to(dtype) for x in grads]
        states = {name: [tensors[i] for i in chosen] for name, tensors in batch.states.items()}
        worked = {name: [t.to(dtype) for t in tensors] for name, tensors in states.items()}
        self.update(
            as_operand(work),
            as_operand(g),
            SimpleNamespace(**{name: as_operand(tensors) for name, tensors in worked.items()}),
            c,
            **flags,
        )
        for slot, (tensors, results) in enumerate(
            [(params, work), *zip(states.values(), worked.values(), strict=True)]
        ):
            for i, target, value in zip(chosen, tensors, results, strict=True):
                if value is not target:
                    key = stream(steps[i], batch.numbers[i], slot) if group["stochastic_rounding"] else None
                    store(target, value, key)

    # --- helpers ---------------------------------------------------------------------------------------------------

    def _validate_options(self, group: dict[str, Any]) -> None:
        check_interval("lr", group["lr"], 0.0)
        for name in ("foreach", "fused"):
            check_choice(name, group[name], [None, True, False])
        own = {name: parameter.default for name, parameter in inspect.signature(type(self)).parameters.items()}
        for name, default in {**_OPTIONS, **own}.items():
            if isinstance(default, bool):
                check_choice(name, group[name], [True, False])
        for name in group.keys() - self.defaults.keys() - {"params", "param_names"}:
            near = difflib.get_close_matches(name, self.defaults, 1, cutoff=0.8)
            if near:
                raise ValueError(f"a group has an option {name!r}; did you mean {near[0]!r}?")
        if group["foreach"] and group["fused"]:
            raise ValueError("foreach=True and fused=True exclude each other: set one of them")
        if group["differentiable"] and (group["foreach"] or group["fused"]):
            raise ValueError(
                "differentiable=True needs foreach and fused unset: only the reference can be differentiated"
            )
        dtypes = group["state_dtype"]
        for name, dtype in dtypes.items() if isinstance(dtypes, Mapping) else [("", dtypes)]:
            if name:
                check_choice("a key of state_dtype", name, self.states_of(group))
            if dtype is not None:
                check_choice("state_dtype", dtype, ["float32", "bfloat16"])
        for p in group["params"]:
            if not (p.is_floating_point() or p.is_complex()):
                raise ValueError(
                    f"{type(self).__name__} needs floating-point parameters, got {p.dtype}{_naming(group, p)}"
                )
            if group["fused"]:
                self._kernels(group, p)

    def _group_of(self, parameter: Tensor) -> dict[str, Any]:
        return next(group for group in self.param_groups if any(p is parameter for p in group["params"]))


@dataclass
class _Batch:
    """Tensors of one group that are updated together: parallel lists."""

    numbers: list[int] = field(default_factory=list)  # of the parameter in the optimizer, keys the random bits
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: dict[str, list[Tensor]] = field(default_factory=dict)
    steps: list[Tensor] = field(default_factory=list)

    def by_kind(self) -> "list[_Batch]":
        """One batch for each combination of device and dtypes."""
        columns = [self.params, self.grads, *self.states.values()]
        kinds = zip(
            map(type, self.params), map(_DEVICE, self.params), *(map(_DTYPE, column) for column in columns), strict=True
        )
        chosen: dict[Any, list[int]] = {}
        for i, kind in enumerate(kinds):
            chosen.setdefault(kind, []).append(i)
        return [self] if len(chosen) == 1 else list(map(self._part, chosen.values()))

    def _part(self, chosen: list[int]) -> "_Batch":
        def pick(column: list[Any]) -> list[Any]:
            return [column[i] for i in chosen] if column else []

        states = {name: pick(column) for name, column in self.states.items()}
        return _Batch(pick(self.numbers), pick(self.params), pick(self.grads), states, pick(self.steps))

    def as_real(self) -> "_Batch":
        """The same tensors with complex numbers seen as pairs of real ones."""

        def real(column: list[Tensor]) -> list[Tensor]:
            return [torch.view_as_real(t) for t in column]

        grads = [g.resolve_conj() for g in self.grads]  # autograd conjugates lazily
        states = {name: real(column) for name, column in self.states.items()}
        return _Batch(self.numbers, real(self.params), real(grads), states, self.steps)


@contextmanager
def _differentiable() -> Iterator[None]:
    """Let autograd find the values that it needs as they were before the updates in place."""
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        yield


def _by_step(steps: list[Any]) -> dict[Any, list[int]]:
    """Positions by number of the step; under None where the numbers stay on the device."""
    chosen: dict[Any, list[int]] = {}
    for i, step in enumerate(steps):
        chosen.setdefault(None if isinstance(step, Tensor) else step, []).append(i)
    return chosen


def _state_dtype(p: Tensor, option: Any, name: str) -> torch.dtype:
    wanted = option.get(name) if isinstance(option, Mapping) else option
    if p.is_complex():
        return p.dtype
    if wanted is None:
        return torch.float32 if p.dtype in _LOW_PRECISION else p.dtype
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]


def _naming(group: dict[str, Any], parameter: Tensor) -> str:
    """`` (parameter 'name')`` where the group knows names."""
    names = group.get("param_names") or [None] * len(group["params"])
    name = next(n for n, p in zip(names, group["params"], strict=True) if p is parameter)
    return f" (parameter {name!r})" if name else ""
