"""State: what it is made of, and that saving, loading, copying and pickling change nothing."""

import copy
import io
import pickle
from collections import Counter, OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contract import NotApplicable, require
from .subject import Subject, check, require_equal, require_near, run, tensors

_BUILTINS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_LOW = (torch.bfloat16, torch.float16)
_NEWER = ("foreach", "fused", "maximize", "capturable", "differentiable")


@check
def state_is_tensors_and_builtins(subject: Subject) -> None:
    """``state_dict`` has torch's layout, holds tensors and Python builtins only, and loads with ``weights_only``."""
    params = tensors()
    optimizer = subject.build(params)
    run(optimizer, params)
    saved = optimizer.state_dict()
    require(set(saved) >= {"state", "param_groups"}, f"keys of state_dict: {list(saved)}")
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    require(numbers == [0, 1], f"parameters are numbered {numbers}")
    require(set(saved["state"]) <= {0, 1}, f"keys of the state: {list(saved['state'])}")
    foreign = list(dict.fromkeys(_foreign(saved)))
    require(not foreign, f"neither tensors nor builtins: {', '.join(foreign)}")
    _through_a_file(saved)


@check
def saved_state_continues_exactly(subject: Subject) -> None:
    """Saved, read and loaded into a new optimizer, training continues bit for bit."""
    for name, backend in subject.backends.items():
        straight, resumed = tensors(), tensors(seed=1)
        original = subject.build(straight, **backend)
        halfway = run(original, straight)
        saved = _through_a_file(original.state_dict())
        run(original, straight, range(5, 10))
        for p, value in zip(resumed, halfway, strict=True):
            p.data.copy_(value)
        fresh = subject.build(resumed, **backend)
        fresh.load_state_dict(saved)
        run(fresh, resumed, range(5, 10))
        require_equal(resumed, straight, f"resumed against uninterrupted, backend {name}")
        require_equal_state(fresh, original, f"state after resuming, backend {name}")


@check
def state_loads_into_every_backend(subject: Subject) -> None:
    """State saved with one backend (``fused``, ``foreach``, loop) continues with another."""
    if len(subject.backends) < 3:
        raise NotApplicable(f"{subject.cls.__name__} has one backend")
    names = [name for name in subject.backends if name != "default"]
    for first, second in zip(names, [*names[1:], names[0]], strict=True):
        straight, moved = tensors(dtype=torch.float64), tensors(dtype=torch.float64)
        original = subject.build(straight, **subject.backends[first])
        for p, value in zip(moved, run(original, straight), strict=True):
            p.data.copy_(value)
        saved = _through_a_file(original.state_dict())
        for group in saved["param_groups"]:
            group.update(subject.backends[second])
        other = subject.build(moved, **subject.backends[second])
        other.load_state_dict(saved)
        run(original, straight, range(5, 10))
        run(other, moved, range(5, 10))
        require_near(moved, straight, f"saved with {first} and continued with {second}")


@check
def state_of_older_versions_loads(subject: Subject) -> None:
    """A state dict loads whose groups lack ``foreach``, ``fused``, ``maximize``, ``capturable``, ``differentiable``."""
    straight, resumed = tensors(), tensors()
    original = subject.build(straight)
    for p, value in zip(resumed, run(original, straight), strict=True):
        p.data.copy_(value)
    saved = _through_a_file(original.state_dict())
    for group in saved["param_groups"]:
        for name in _NEWER:
            group.pop(name, None)
    fresh = subject.build(resumed)
    fresh.load_state_dict(saved)
    run(original, straight, range(5, 8))
    run(fresh, resumed, range(5, 8))
    require_near(resumed, straight, "resumed from the older state", 1e-5)


@check
def pickled_optimizer_continues_exactly(subject: Subject) -> None:
    """A pickled optimizer continues bit for bit."""
    _continues(subject, lambda pair: pickle.loads(pickle.dumps(pair)))


@check
def copied_optimizer_continues_exactly(subject: Subject) -> None:
    """A deep copy continues bit for bit and shares nothing with the original."""
    _continues(subject, copy.deepcopy)


@check
def state_of_bfloat16_parameters_is_float32(subject: Subject) -> None:
    """The state of a bfloat16 parameter is float32, unless ``state_dtype`` asks for another."""
    if subject.kwargs.get("state_dtype") is not None:
        raise NotApplicable(f"state_dtype={subject.kwargs['state_dtype']!r} is asked for")
    _, optimizer = _bfloat16(subject)
    states = [item for state in optimizer.state.values() for item in state.items()]
    low = {f"{name} is {value.dtype}" for name, value in states if isinstance(value, Tensor) and value.dtype in _LOW}
    require(not low, ", ".join(sorted(low)))


@check
def state_of_bfloat16_parameters_survives(subject: Subject) -> None:
    """Loading, pickling and deep copying, in any order, keep the state of bfloat16 parameters bit for bit."""
    params, optimizer = _bfloat16(subject)

    def load(pair: Any) -> Any:
        fresh = subject.build(pair[0])
        fresh.load_state_dict(_through_a_file(pair[1].state_dict()))
        return pair[0], fresh

    ways = {"loading": load, "pickling": lambda pair: pickle.loads(pickle.dumps(pair)), "copying": copy.deepcopy}
    for first, one in ways.items():
        for second, other in ways.items():
            _, again = other(one((params, optimizer)))
            require_equal_state(again, optimizer, f"state after {first} and {second}")
    run(optimizer, params, range(5, 8))
    resumed_params, resumed = load(_bfloat16(subject))
    run(resumed, resumed_params, range(5, 8))
    require_equal(resumed_params, params, "bfloat16 parameters after loading")


def _bfloat16(subject: Subject) -> tuple[list[nn.Parameter], Optimizer]:
    params = tensors(dtype=torch.bfloat16)
    optimizer = subject.build(params)
    run(optimizer, params)
    return params, optimizer


def _continues(subject: Subject, duplicate: Any) -> None:
    params = tensors()
    optimizer = subject.build(params)
    run(optimizer, params)
    other_params, other = duplicate((params, optimizer))
    require(all(p is not q for p, q in zip(params, other_params, strict=True)), "the parameters are shared")
    straight = run(optimizer, params, range(5, 10))
    run(other, other_params, range(5, 10))
    require_equal(other_params, straight, "the copy against the original")
    require_equal_state(other, optimizer, "state of the copy")


def require_equal_state(actual: Optimizer, expected: Optimizer, what: str) -> None:
    """Require the same state, bit for bit."""
    actual_state, expected_state = (list(_leaves(o.state_dict()["state"])) for o in (actual, expected))
    names = [name for name, _ in expected_state]
    require([name for name, _ in actual_state] == names, f"{what}: {[name for name, _ in actual_state]}, not {names}")
    for (name, a), (_, b) in zip(actual_state, expected_state, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            require_equal([a], [b], f"{what}, {name}")
        else:
            require(type(a) is type(b) and a == b, f"{what}, {name}: {a!r}, not {b!r}")


def _leaves(value: Any, name: str = "state") -> Any:
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from _leaves(value[key], f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, entry in enumerate(value):
            yield from _leaves(entry, f"{name}[{i}]")
    else:
        yield name, value


def _foreign(value: Any) -> Any:
    """Names of types that a checkpoint read with ``weights_only`` may not hold."""
    if type(value) in (dict, OrderedDict, Counter):
        for key, entry in value.items():
            yield from _foreign(key)
            yield from _foreign(entry)
    elif type(value) in (list, tuple, set):
        for entry in value:
            yield from _foreign(entry)
    elif not isinstance(value, Tensor) and type(value) not in _BUILTINS:
        yield type(value).__qualname__


def _through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
