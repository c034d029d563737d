"""What a step does: descent, groups, closures, gradients, the learning rate."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..contract import NotApplicable, require
from .subject import Subject, check, distance, gradients, require_equal, require_near, run, tensors, values


@check
def decreases_a_quadratic(subject: Subject) -> None:
    """500 steps at least halve a quadratic of curvature 1 to 5, from weights 10% off the solution."""
    target = tensors(dtype=torch.float64)

    def slope(params: list[Tensor]) -> list[Tensor]:
        return [torch.linspace(1, 5, p.numel()).view_as(p) * (p - t) for p, t in zip(params, target, strict=True)]

    def loss(params: list[Tensor]) -> float:
        return sum(((p - t) * g).sum().item() for p, t, g in zip(params, target, slope(params), strict=True)) / 2

    _descends(subject, [nn.Parameter(t.detach() * 1.1) for t in target], loss, slope)


@check
def decreases_rosenbrock(subject: Subject) -> None:
    """500 steps at least halve a Rosenbrock function, from weights about 10% off the solution."""

    def slope(params: list[Tensor]) -> list[Tensor]:
        (x,) = (p.view(-1) for p in params)
        bend = x[1:] - x[:-1] ** 2
        g = torch.zeros_like(x)
        g[:-1] += (x[:-1] - 1) / 2 - x[:-1] * bend
        g[1:] += bend / 2
        return [g.view_as(params[0])]

    def loss(params: list[Tensor]) -> float:
        (x,) = (p.view(-1) for p in params)
        return (((1 - x[:-1]) ** 2 + (x[1:] - x[:-1] ** 2) ** 2) / 4).sum().item()

    (noise,) = tensors([(2, 5)], torch.float64)
    _descends(subject, [nn.Parameter(1 + 0.1 * noise.detach())], loss, slope)


def _descends(
    subject: Subject,
    params: list[nn.Parameter],
    loss: Callable[[list[Tensor]], float],
    slope: Callable[[list[Tensor]], list[Tensor]],
) -> None:
    optimizer = subject.build(params)
    before = loss(values(params))
    for _ in range(500):
        for p, g in zip(params, slope(values(params)), strict=True):
            p.grad = g
        optimizer.step()
    after = loss(values(params))
    require(after < before / 2, f"the loss went from {before:.4g} to {after:.4g}")


@check
def groups_have_their_own_options(subject: Subject) -> None:
    """Each parameter group trains with its own ``lr`` and ``weight_decay``, as it would alone."""
    if subject.coupling[1]:
        raise NotApplicable("tensors influence each other")
    own: dict[str, Any] = {"lr": subject.lr / 2}
    if "weight_decay" in subject.options:
        own["weight_decay"] = 0.02
    together, alone, default = (tensors(dtype=torch.float64) for _ in range(3))
    run(subject.build([{"params": [together[0]]}, {"params": [together[1]], **own}]), together)
    run(subject.build(default), default)
    optimizers = [subject.build([alone[0]]), subject.build([alone[1]], **own)]
    for t in range(5):
        for p, g, optimizer in zip(alone, gradients(alone, t), optimizers, strict=True):
            p.grad = g
            optimizer.step()
    require_near(together, alone, "groups against optimizers of their own")
    require(distance(together[1:], default[1:]) > 0, f"the group's own {own} changes nothing")


@check
def groups_can_be_added_while_training(subject: Subject) -> None:
    """A group added after some steps trains as with a new optimizer, and leaves the others' training as it was."""
    if subject.coupling[1]:
        raise NotApplicable("tensors influence each other")
    late, alone = tensors(dtype=torch.float64), tensors(dtype=torch.float64)
    optimizer = subject.build(late[:1])
    run(optimizer, late[:1], range(3))
    optimizer.add_param_group({"params": late[1:]})
    first, second = subject.build(alone[:1]), subject.build(alone[1:])
    run(first, alone[:1], range(3))
    for t in range(3, 6):
        for params in (late, alone):
            for p, g in zip(params, gradients(params, t), strict=True):
                p.grad = g
        optimizer.step()
        first.step()
        second.step()
    require_near(late, alone, "an added group against an optimizer of its own")


@check
def missing_gradients_are_skipped(subject: Subject) -> None:
    """A parameter without gradient keeps its value and its state, and its step count does not advance."""
    if subject.coupling[1]:
        raise NotApplicable("tensors influence each other")
    params, alone = tensors(dtype=torch.float64), tensors(dtype=torch.float64)
    optimizer = subject.build(params)
    optimizer.step()  # no gradient at all
    require_equal(params, alone, "after a step without any gradient")
    for t in range(6):
        grads = gradients(params, t)
        params[0].grad, params[1].grad = (grads[0], grads[1] if t in (1, 4) else None)
        before = values(params[1:])
        optimizer.step()
        if t not in (1, 4):
            require_equal(params[1:], before, "a parameter without gradient")
    reference = subject.build(alone[1:])
    for t in (1, 4):
        alone[1].grad = gradients(alone, t)[1]
        reference.step()
    require_near(params[1:], alone[1:], "a parameter with some gradients missing against one given only the others")


@check
def frozen_parameters_stay(subject: Subject) -> None:
    """Parameters that do not require gradients never move, whether frozen from the start or later."""
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    for layer, weight in zip(net, tensors([(4, 3), (4, 4), (2, 4)]), strict=True):
        layer.weight = weight
    net[0].weight.requires_grad_(False)
    optimizer = subject.build(net.parameters())
    start = values(net.parameters())

    def train() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.ones(5, 3)).square().mean().backward()
            optimizer.step()

    train()
    net[1].weight.requires_grad_(False)
    halfway = values(net.parameters())
    train()
    end = values(net.parameters())
    require_equal([end[0], end[1]], [start[0], halfway[1]], "a frozen parameter")
    require(bool((end[2] != halfway[2]).any()), "the parameter that is not frozen does not move")


@check
def closure_runs_with_gradients_and_its_loss_is_returned(subject: Subject) -> None:
    """``step(closure)`` enables gradients for the closure and returns its loss; ``step()`` returns None."""
    params = tensors()
    optimizer = subject.build(params)
    seen = []

    def closure() -> Any:
        seen.append(torch.is_grad_enabled())
        loss = sum((p.square().sum() for p in params), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        return loss

    expected = sum(p.square().sum().item() for p in values(params))
    with torch.no_grad():
        loss = optimizer.step(closure)
        require(not torch.is_grad_enabled(), "gradients stay enabled after the step")
    require(all(seen), "gradients are disabled in the closure")
    require(isinstance(loss, Tensor) and abs(loss.item() - expected) < 1e-4, f"returned {loss!r}, not the loss")
    require(optimizer.step() is None, "step() without closure returns something")


@check
def closure_is_called_once(subject: Subject) -> None:
    """The closure runs exactly once a step, unless the class says ``calls_closure_repeatedly = True``."""
    if getattr(subject.cls, "calls_closure_repeatedly", False):
        raise NotApplicable(f"{subject.cls.__name__}.calls_closure_repeatedly is True")
    params = tensors()
    optimizer = subject.build(params)
    calls: list[int] = []

    def closure() -> float:
        calls.append(len(calls))
        for p, g in zip(params, gradients(params, 0), strict=True):
            p.grad = g
        return 0.0

    for _ in range(3):
        optimizer.step(closure)
    require(len(calls) == 3, f"3 steps called the closure {len(calls)} times")


@check
def closure_comes_before_the_gradients_are_read(subject: Subject) -> None:
    """The step uses the gradients that the closure has computed."""
    with_closure, without = tensors(), tensors()
    optimizer = subject.build(with_closure)
    for t in range(4):

        def closure(t: int = t) -> float:
            for p, g in zip(with_closure, gradients(with_closure, t), strict=True):
                p.grad = g
            return 0.0

        optimizer.step(closure)
    require_equal(with_closure, run(subject.build(without), without, range(4)), "with closure against without")


@check
def step_hooks_fire_once(subject: Subject) -> None:
    """The pre and post hooks of ``step`` that torch offers fire once a step."""
    params = tensors()
    optimizer = subject.build(params)
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    run(optimizer, params, range(2))
    require(fired == ["pre", "post"] * 2, f"two steps fired {fired}")


@check
def gradients_are_left_alone(subject: Subject) -> None:
    """A step changes no gradient, with weight decay and ``maximize`` neither."""
    changes: dict[str, Any] = {"maximize": True, "weight_decay": 0.1}
    for backend in subject.backends.values():
        for change in ({}, *({name: value} for name, value in changes.items() if name in subject.options)):
            params = tensors()
            optimizer = subject.build(params, **{**backend, **change})
            for t in range(2):
                grads = gradients(params, t)
                for p, g in zip(params, grads, strict=True):
                    p.grad = g
                optimizer.step()
                for i, (p, g) in enumerate(zip(params, grads, strict=True)):
                    require(p.grad is g, f"tensor {i}: p.grad is another tensor after the step")
                require_equal(
                    grads, gradients(params, t), f"the gradients after a step with { ({**backend, **change}) }"
                )


@check
def gradient_buffers_may_be_reused(subject: Subject) -> None:
    """Gradients written into the same memory every step train as new tensors do (``set_to_none`` or not)."""
    for backend in subject.backends.values():
        fresh, reused = tensors(), tensors()
        run(subject.build(fresh, **backend), fresh)
        optimizer = subject.build(reused, **backend)
        for p in reused:
            p.grad = torch.zeros_like(p)
        for t in range(5):
            optimizer.zero_grad(set_to_none=False)
            for p, g in zip(reused, gradients(reused, t), strict=True):
                p.grad.add_(g)  # type: ignore[union-attr]
            optimizer.step()
        require_equal(reused, fresh, f"gradients in reused memory against new ones ({backend or 'default'})")


@check
def global_random_state_is_left_alone(subject: Subject) -> None:
    """Steps neither read nor change the global random state of python, numpy and torch."""
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
        params = tensors()
        results.append(run(subject.build(params), params))
        require(bool((torch.get_rng_state() == before[0]).all()), "torch's random state changed")
        require(np.random.get_state()[1].tolist() == before[1], "numpy's random state changed")  # type: ignore[index]
        require(random.getstate() == before[2], "python's random state changed")
    require_equal(results[0], results[1], "with another seed")


@check
def maximize_is_minimize_of_the_negative(subject: Subject) -> None:
    """``maximize=True`` steps as minimising the negated objective does."""
    subject.needs("maximize")
    for name, backend in subject.backends.items():
        up, down = tensors(), tensors()
        run(subject.build(up, **{**backend, "maximize": True}), up)
        run(subject.build(down, **{**backend, "maximize": False}), down, edit=lambda gs, t: [g.neg_() for g in gs])
        require_equal(up, down, f"maximize against negated gradients, backend {name}")


@check
def scheduled_lr_acts(subject: Subject) -> None:
    """A scheduler that divides the learning rate by ten shrinks the steps that follow."""
    scheduled, constant = tensors(dtype=torch.float64), tensors(dtype=torch.float64)
    optimizer, reference = subject.build(scheduled), subject.build(constant)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 3 else 0.1)
    for t in range(3):
        run(optimizer, scheduled, [t])
        scheduler.step()
    start = run(reference, constant, range(3))
    require_near(scheduled, start, "a schedule that has not changed the rate yet")
    small = distance(run(optimizer, scheduled, range(3, 5)), start)
    large = distance(run(reference, constant, range(3, 5)), start)
    require(small < large / 2, f"two steps move {large:.3g} at lr and {small:.3g} at lr / 10")


@check
def tensor_lr_equals_float_lr(subject: Subject) -> None:
    """A 0-dim tensor as ``lr`` trains as the same number does, and acts when changed in place."""
    subject.needs("lr")
    if not _takes_tensor(subject.options["lr"]):
        raise NotApplicable(f"the type of lr, {subject.options['lr']}, has no Tensor")
    lr = torch.tensor(subject.lr, dtype=torch.float64)
    with_tensor, with_float = tensors(dtype=torch.float64), tensors(dtype=torch.float64)
    optimizer, reference = subject.build(with_tensor, lr=lr.clone()), subject.build(with_float, lr=lr.item())
    run(optimizer, with_tensor, range(3))
    optimizer.param_groups[0]["lr"].mul_(0.5)
    run(reference, with_float, range(3))
    reference.param_groups[0]["lr"] *= 0.5
    require_near(run(optimizer, with_tensor), run(reference, with_float), "tensor lr against float lr")


def _takes_tensor(hint: Any) -> bool:
    return hint is Tensor or Tensor in getattr(hint, "__args__", ())
