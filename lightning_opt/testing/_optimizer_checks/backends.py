"""One update, several ways to run it: ``foreach``, ``fused``, ``capturable``, ``differentiable``."""

from typing import Any

import torch
from torch import Tensor

from ..contract import NotApplicable, require
from .subject import PARITY_SHAPES, Subject, check, gradients, refusal, require_near, run, tensors


@check
def default_backend_matches_the_loop(subject: Subject) -> None:
    """The backend that the optimizer picks itself is as exact as the loop over tensors."""
    if not subject.backend("loop"):
        raise NotApplicable(f"{subject.cls.__name__} takes neither 'foreach' nor 'fused'")
    _parity(subject, {})


@check
def foreach_matches_the_loop(subject: Subject) -> None:
    """``foreach=True`` is as exact as the loop over tensors."""
    subject.needs("foreach")
    _applies(subject, "foreach")
    _parity(subject, subject.backend("foreach"))


@check
def fused_matches_the_loop(subject: Subject) -> None:
    """``fused=True`` is as exact as the loop over tensors."""
    subject.needs("fused")
    _applies(subject, "fused")
    _parity(subject, subject.backend("fused"))


@check
def fused_and_foreach_exclude_each_other(subject: Subject) -> None:
    """``foreach=True`` together with ``fused=True`` is refused."""
    subject.needs("foreach", "fused")
    error = refusal(lambda: subject.build(tensors(), foreach=True, fused=True), "fused")
    require(error is not None, "accepted")


@check
def capturable_gives_the_same_numbers(subject: Subject) -> None:
    """``capturable=True`` trains as ``capturable=False`` does."""
    subject.needs("capturable")
    for name, backend in subject.backends.items():
        plain, captured = tensors(dtype=torch.float64), tensors(dtype=torch.float64)
        optimizer = subject.build(captured, **{**backend, "capturable": True})
        try:
            run(optimizer, captured, range(1))
        except (RuntimeError, AssertionError) as error:
            if "capturable" not in str(error):
                raise
            raise NotApplicable(f"refused on this device: {error}") from error
        run(optimizer, captured, range(1, 5))
        expected = run(subject.build(plain, **{**backend, "capturable": False}), plain)
        require_near(captured, expected, f"capturable against not, backend {name}")


@check
def differentiable_steps_have_the_right_derivative(subject: Subject) -> None:
    """With ``differentiable=True`` autograd gives the derivative of two steps in the weights and the gradients."""
    subject.needs("differentiable")
    start = [p.detach() for p in tensors(dtype=torch.float64)]
    inputs = [*start, *gradients(start, 0), *gradients(start, 1)]

    def two_steps(*inputs: Tensor) -> tuple[Tensor, ...]:
        params = [p.clone() for p in inputs[:2]]
        optimizer = _differentiable(subject, params)
        for grads in (inputs[2:4], inputs[4:]):
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            optimizer.step()
        return tuple(params)

    _gradcheck(two_steps, inputs)


@check
def differentiable_steps_have_the_right_derivative_in_lr(subject: Subject) -> None:
    """With ``differentiable=True`` autograd gives the derivative of a step in a tensor ``lr``."""
    subject.needs("differentiable")
    start = [p.detach() for p in tensors(dtype=torch.float64)]

    def one_step(lr: Tensor) -> tuple[Tensor, ...]:
        params = [p.clone().requires_grad_() * 1 for p in start]
        optimizer = _differentiable(subject, params, lr=lr)
        for p, g in zip(params, gradients(params, 0), strict=True):
            p.grad = g
        optimizer.step()
        return tuple(params)

    try:
        one_step(torch.tensor(subject.lr, dtype=torch.float64))
    except (TypeError, ValueError) as error:
        raise NotApplicable(f"a tensor lr is refused: {error}") from error
    _gradcheck(one_step, [torch.tensor(subject.lr, dtype=torch.float64)])


def _differentiable(subject: Subject, params: list[Tensor], **changes: Any) -> torch.optim.Optimizer:
    unset = {name: None for name in ("foreach", "fused") if name in subject.options}
    return subject.build(params, **unset, **changes, differentiable=True)


def _gradcheck(function: Any, inputs: list[Tensor]) -> None:
    inputs = [x.clone().requires_grad_() for x in inputs]
    # central differences of width 1e-6 in float64: errors of 1e-12 from curvature and 1e-10 from rounding
    torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-5, rtol=1e-3, fast_mode=True)


def _applies(subject: Subject, backend: str) -> None:
    reason = subject.why_not(backend)
    if reason:
        raise NotApplicable(reason)


def _parity(subject: Subject, backend: dict[str, Any]) -> None:
    """Norm-wise error to a float64 run at most 1.5 times that of the loop, per tensor, over 100 steps.

    The half unit in the last place of float32 that is added is the rounding of the result itself.
    """
    params = tensors(PARITY_SHAPES)
    run(subject.build(params, **backend), params, range(100))
    for i, (exact, loop, fast) in enumerate(zip(*subject.hundred_steps, params, strict=True)):
        allowed = 1.5 * (loop - exact).norm().item() + 2**-24 * exact.norm().item()
        error = (fast - exact).norm().item()
        require(error <= allowed, f"tensor {i} is {error:.3g} from the float64 run, above {allowed:.3g} allowed")
