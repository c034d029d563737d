"""The optimizer under test, the tensors it is tested on, and how results are compared."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contract import ContractError, NotApplicable, require

SHAPES = ((4, 3), (2, 5))  # matrices, since some methods take nothing else
PARITY_SHAPES = ((8, 8), (8, 8))


@dataclasses.dataclass(frozen=True)
class Subject:
    """An optimizer class and the arguments it is built with."""

    cls: type[Optimizer]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.cls.__name__}({', '.join(f'{name}={value!r}' for name, value in self.kwargs.items())})"

    def build(self, params: Any, **changes: Any) -> Optimizer:
        """A new optimizer, with some arguments changed."""
        return self.cls(params, **{**self.kwargs, **changes})

    @cached_property
    def options(self) -> dict[str, Any]:
        """Every named argument of the constructor but ``params``, with its type."""
        return {name: hint for name, hint in _options(self.cls).items() if name != "params"}

    def needs(self, *names: str) -> None:
        """Raise NotApplicable unless the constructor takes these options."""
        for name in names:
            if name not in self.options:
                raise NotApplicable(f"{self.cls.__name__} takes no option {name!r}")

    @cached_property
    def lr(self) -> float:
        """The learning rate under test."""
        return float(self.build(tensors()).param_groups[0]["lr"])

    def backend(self, name: str) -> dict[str, Any]:
        """The arguments that select ``"loop"``, ``"foreach"`` or ``"fused"``, as far as the constructor takes them."""
        options = {"foreach": name == "foreach", "fused": name == "fused"}
        return {option: value for option, value in options.items() if option in self.options}

    @cached_property
    def backends(self) -> dict[str, dict[str, Any]]:
        """The arguments of each backend that this optimizer has, and of its own choice under ``"default"``."""
        names = ["loop", *(name for name in ("foreach", "fused") if not self.why_not(name))]
        return {"default": {}, **{name: self.backend(name) for name in names}}

    def with_backend(self, name: str) -> "Subject":
        """The same optimizer with that backend, as far as it has one."""
        return Subject(self.cls, {**self.kwargs, **self.backend(name)})

    def why_not(self, backend: str) -> str:
        """Why it has no such backend (``"foreach"`` or ``"fused"``), or nothing."""
        if backend not in self.options:
            return f"{self.cls.__name__} takes no option {backend!r}"
        try:
            self.build(tensors(), **self.backend(backend))
        except (RuntimeError, ValueError) as error:
            if backend not in str(error):
                raise
            return f"{backend}=True is refused: {error}"
        return ""

    @cached_property
    def hundred_steps(self) -> tuple[list[Tensor], list[Tensor]]:
        """Where 100 steps of the loop lead in float64, and in float32 from the same numbers."""
        wide, narrow = tensors(PARITY_SHAPES, torch.float64), tensors(PARITY_SHAPES)
        for p, q in zip(wide, narrow, strict=True):
            p.data.copy_(q.data)
        optimizer, loop = (self.build(params, **self.backend("loop")) for params in (wide, narrow))
        for t in range(100):
            for p, q, g in zip(wide, narrow, gradients(narrow, t), strict=True):
                p.grad, q.grad = g.double(), g
            optimizer.step()
            loop.step()
        return values(wide), values(narrow)

    @cached_property
    def coupling(self) -> tuple[bool, bool]:
        """Whether a gradient moves other coordinates of its own tensor, and other tensors; measured."""
        plain, changed = tensors(dtype=torch.float64), tensors(dtype=torch.float64)
        run(self.build(plain), plain)
        factors = (-2.0, 100.0, 0.0, -50.0, 1.0)  # signs, sizes and zeros: what a norm, a rank or a count depends on
        run(self.build(changed), changed, edit=lambda grads, t: grads[0].view(-1)[0].mul_(factors[t]))
        moved = (changed[0] != plain[0]).view(-1)
        return bool(moved[1:].any()), bool((changed[1] != plain[1]).any())


class Edit(Protocol):
    """Changes the gradients of one step, in place."""

    def __call__(self, grads: list[Tensor], t: int) -> Any: ...


CHECKS: dict[str, Callable[[Subject], None]] = {}


def check(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
    """Enter a check into the kit under the function's name; the first line of its docstring is the promise."""
    CHECKS[function.__name__] = function
    return function


def tensors(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[nn.Parameter]:
    """Parameters with entries of both signs, of size 0.5 to 1.5: no entry is near zero."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in shapes:
        size = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
        sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        params.append(nn.Parameter((size * sign).to(dtype)))
    return params


def gradients(params: Iterable[Tensor], t: int) -> list[Tensor]:
    """Standard normal gradients for step t."""
    generator = torch.Generator().manual_seed(1000 + t)
    drawn = []
    for p in params:
        wide = torch.complex128 if p.is_complex() else torch.float64
        drawn.append(torch.randn(p.shape, generator=generator, dtype=wide).to(p.dtype))
    return drawn


def run(
    optimizer: Optimizer, params: Sequence[Tensor], steps: Iterable[int] = range(5), edit: Edit | None = None
) -> list[Tensor]:
    """Take steps with the gradients of those numbers; returns copies of the parameters."""
    for t in steps:
        grads = gradients(params, t)
        if edit is not None:
            edit(grads, t)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
    return values(params)


def values(params: Iterable[Tensor]) -> list[Tensor]:
    """Copies of the parameters."""
    return [p.detach().clone() for p in params]


def require_equal(actual: Iterable[Tensor], expected: Iterable[Tensor], what: str) -> None:
    """Require the same bits."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        require(a.dtype == b.dtype, f"{what}: tensor {i} is {a.dtype}, not {b.dtype}")
        a, b = a.detach(), b.detach()
        same = bool(((a == b) | (a.isnan() & b.isnan())).all())
        require(same, f"{what}: tensor {i} differs by {_largest(a, b):.3g}, not bit for bit equal")


def require_near(actual: Iterable[Tensor], expected: Iterable[Tensor], what: str, tolerance: float = 1e-9) -> None:
    """Require a largest difference of ``tolerance``; the default is for float64 entries of size 1."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        difference = _largest(a.detach(), b.detach())
        require(difference <= tolerance, f"{what}: tensor {i} differs by {difference:.3g}, more than {tolerance:g}")


def distance(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """Largest difference."""
    return max(_largest(x.detach(), y.detach()) for x, y in zip(a, b, strict=True))


def refusal(function: Callable[[], Any], *words: str) -> Exception | None:
    """The error that a function raises, or None; its message must hold one of the words.

    Raises:
        ContractError: If the error names nothing of what is wrong.
    """
    try:
        function()
    except Exception as error:
        if isinstance(error, ContractError) or not any(word in str(error).lower() for word in words):
            raise ContractError(
                f"{type(error).__name__} does not say what is wrong (none of {', '.join(words)}): {error}"
            ) from error
        return error
    return None


def _largest(a: Tensor, b: Tensor) -> float:
    difference = (a.to(torch.complex128) - b.to(torch.complex128)).abs()
    if bool(difference.isnan().any()):
        return float("nan")
    return difference.max().item() if difference.numel() else 0.0


def _options(cls: type) -> dict[str, Any]:
    """Arguments of the constructor with their types, those behind ``**kwargs`` included where they can be known."""
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
    if owner in (Optimizer, object):
        return {}
    init = owner.__init__  # type: ignore[misc]
    try:
        hints = typing.get_type_hints(init)
    except (NameError, TypeError):
        hints = {}
    options: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(init).parameters.items())[1:]:
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            if parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
                options[name] = hints.get(name, parameter.annotation)
            continue
        unpacked = [arg for arg in typing.get_args(hints.get(name)) if hasattr(arg, "__total__")]
        if unpacked:  # **options: Unpack[TypedDict]
            options.update(typing.get_type_hints(unpacked[0]))
        else:  # passed on to the class above
            above = cls.__mro__[cls.__mro__.index(owner) + 1]
            options = {**{k: v for k, v in _options(above).items() if k != "defaults"}, **options}
    return options
