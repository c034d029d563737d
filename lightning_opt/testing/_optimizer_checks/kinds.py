"""Kinds of tensors: sparse, complex, strided, tiny, many, low precision; and numbers that are not finite."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..contract import ContractError, NotApplicable, require
from .subject import Edit, Subject, check, gradients, refusal, require_equal, require_near, run, tensors, values


@check
def sparse_gradients_work_or_are_refused(subject: Subject) -> None:
    """A sparse gradient trains as the dense one does, or raises an error that says so and changes nothing."""
    params, dense = tensors(), tensors()
    optimizer = subject.build(params)

    def sparse_steps() -> None:
        for t in range(2):
            for p, g in zip(params, gradients(params, t), strict=True):
                p.grad = g.to_sparse()
            optimizer.step()

    if refusal(sparse_steps, "sparse") is None:
        run(subject.build(dense), dense, range(2))
        require_near(params, dense, "sparse gradients against dense ones", 1e-5)
    else:
        require_equal(params, dense, "after the refusal")


@check
def complex_parameters_work_or_are_refused(subject: Subject) -> None:
    """A complex parameter trains, coordinate by coordinate as the pair of real ones, or is refused with a message."""
    real = tensors([(4, 3, 2), (2, 5, 2)], torch.float64)
    params = [nn.Parameter(torch.view_as_complex(p.detach().clone())) for p in real]

    def complex_steps() -> None:
        run(subject.build(params), params)

    start = values(params)
    if refusal(complex_steps, "complex") is not None:
        require_equal(params, start, "after the refusal")
        return
    require(all(bool(p.isfinite().all()) and bool((p != s).any()) for p, s in zip(params, start, strict=True)), "stuck")
    if subject.coupling != (False, False):
        return  # what a norm or a matrix method makes of complex numbers is its own affair
    optimizer = subject.build(real)
    for t in range(5):
        for p, g in zip(real, gradients(params, t), strict=True):
            p.grad = torch.view_as_real(g).clone()
        optimizer.step()
    require_near([torch.view_as_real(p.detach()) for p in params], real, "complex against the pair of real parameters")


@check
def layout_in_memory_does_not_matter(subject: Subject) -> None:
    """Transposed and strided parameters, and gradients of another layout, train as contiguous ones."""
    for name, backend in subject.backends.items():
        plain, strided = tensors(dtype=torch.float64), tensors(dtype=torch.float64)
        strided[0].data = strided[0].data.t().contiguous().t()
        strided[1].data = torch.stack([strided[1].data, torch.zeros_like(strided[1].data)], -1)[..., 0]
        optimizer = subject.build(strided, **backend)
        for t in range(5):
            first, second = gradients(strided, t)
            strided[0].grad, strided[1].grad = first, second.t().contiguous().t()
            optimizer.step()
        run(subject.build(plain, **backend), plain)
        require_near(strided, plain, f"strided against contiguous, backend {name}")


@check
def expanded_gradients_work(subject: Subject) -> None:
    """A gradient that is one number expanded to the parameter's shape, as ``sum().backward()`` makes it, works."""
    for name, backend in subject.backends.items():
        plain, expanded = tensors(dtype=torch.float64), tensors(dtype=torch.float64)
        pair = [(subject.build(plain, **backend), plain), (subject.build(expanded, **backend), expanded)]
        for t in range(3):
            for optimizer, params in pair:
                for p in params:
                    g = torch.tensor(0.3 * (-1) ** t, dtype=p.dtype).expand_as(p)
                    p.grad = g.clone() if params is plain else g
                optimizer.step()
        require_near(expanded, plain, f"expanded against written-out gradients, backend {name}")


@check
def scalars_and_empty_tensors_work_or_are_refused(subject: Subject) -> None:
    """A parameter without dimensions trains as a vector of one entry does, one without entries stays as it is."""
    for name, backend in subject.backends.items():
        scalar, vector = tensors([()], torch.float64), tensors([(1,)], torch.float64)
        params = [scalar[0], *(nn.Parameter(torch.empty(shape, dtype=torch.float64)) for shape in ((0, 3), (0,)))]
        error = refusal(partial(subject.build, params, **backend), "shape", "dimension", "[1, 0]")
        if error is not None:
            require(isinstance(error, ValueError), f"refused with {type(error).__name__}, not ValueError: {error}")
            continue
        run(subject.build(params, **backend), params)
        run(subject.build(vector, **backend), vector)
        require_near([scalar[0].view(1)], vector, f"a scalar against a vector of one entry, backend {name}")


@check
def many_small_tensors_work(subject: Subject) -> None:
    """Two thousand small tensors train as each does alone."""
    if subject.coupling[1]:
        raise NotApplicable("tensors influence each other")
    count = 2000
    name = next(name for name in ("fused", "foreach", "default") if name in subject.backends)
    (together,) = tensors([(count, 3, 3)], torch.float64)
    grads = [gradients([together], t)[0] for t in range(2)]
    params = [nn.Parameter(p.clone()) for p in together.detach()]
    _train_on(subject.build(params, **subject.backends[name]), params, grads)
    for i in (0, 1, 777, count - 1):
        alone = [nn.Parameter(together.detach()[i].clone())]
        _train_on(subject.build(alone, **subject.backends[name]), alone, [g[i : i + 1] for g in grads])
        require_near([params[i]], alone, f"tensor {i} of {count} against one alone, backend {name}")


def _train_on(optimizer: Optimizer, params: list[nn.Parameter], grads: list[Tensor]) -> None:
    for row in grads:
        for p, g in zip(params, row, strict=True):
            p.grad = g
        optimizer.step()


@check
def dtypes_may_be_mixed(subject: Subject) -> None:
    """Float64, float32 and bfloat16 parameters in one group train as each does alone."""
    if subject.coupling[1]:
        raise NotApplicable("tensors influence each other")
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float32)

    def make() -> list[nn.Parameter]:
        return [tensors([(4, 3)], dtype, seed=i)[0] for i, dtype in enumerate(dtypes)]

    together, alone = make(), make()
    run(subject.build(together), together)
    optimizers = [subject.build([p]) for p in alone]
    for t in range(5):
        for p, g, optimizer in zip(alone, gradients(alone, t), optimizers, strict=True):
            p.grad = g
            optimizer.step()
    for a, b, dtype in zip(together, alone, dtypes, strict=True):
        require(a.dtype == dtype, f"a {dtype} parameter became {a.dtype}")
        require_near([a], [b], f"{dtype} among others against alone", 4 * torch.finfo(dtype).eps)


@check
def float64_parameters_are_computed_in_float64(subject: Subject) -> None:
    """A float64 run agrees with the float32 run to float32's precision, and is not rounded to float32 itself."""
    wide, narrow = tensors(dtype=torch.float64), tensors()
    for p, q in zip(wide, narrow, strict=True):
        p.data.copy_(q.data)
    for name, backend in subject.backends.items():
        a, b = [nn.Parameter(p.detach().clone()) for p in wide], [nn.Parameter(p.detach().clone()) for p in narrow]
        run(subject.build(a, **backend), a)
        run(subject.build(b, **backend), b)
        require(all(bool((p != p.float().double()).any()) for p in a), f"rounded to float32, backend {name}")
        require_near([p.float() for p in a], b, f"float64 against float32, backend {name}", 1e-4)


@check
def bfloat16_parameters_train(subject: Subject) -> None:
    """Bfloat16 parameters stay bfloat16 and go the way of the float32 run."""
    # steps well above the spacing of 0.008 of the weights
    changes = {"lr": max(0.05, subject.kwargs.get("lr", 0.0))} if "lr" in subject.options else {}
    for name, backend in subject.backends.items():
        low = tensors(dtype=torch.bfloat16)
        high = [nn.Parameter(p.detach().float()) for p in low]
        optimizer, reference = (subject.build(params, **backend, **changes) for params in (low, high))
        start = values(high)
        for t in range(5):
            for p, q, g in zip(low, high, gradients(low, t), strict=True):
                p.grad, q.grad = g, g.float()
            optimizer.step()
            reference.step()
        require(all(p.dtype == torch.bfloat16 for p in low), f"the dtype changed, backend {name}")
        for i, (p, q, s) in enumerate(zip(low, high, start, strict=True)):
            off, way = (p.float() - q).norm().item(), (q - s).norm().item()
            # five roundings by half a spacing are 0.02 at most, a fifth of a way of 0.1
            require(off <= way / 4, f"tensor {i} ends {off:.3g} from the float32 run, which moved {way:.3g} ({name})")


@check
def nan_gradients_show_and_stay_where_they_are(subject: Subject) -> None:
    """A NaN in a gradient makes that coordinate of the parameter NaN and no other tensor, or the step is refused."""
    for name, backend in subject.backends.items():
        clean, spoiled = tensors(), tensors()
        run(subject.build(clean, **backend), clean, range(3))
        optimizer = subject.build(spoiled, **backend)
        before = run(optimizer, spoiled, range(2))
        if refusal(partial(run, optimizer, spoiled, [2], _spoiler(float("nan"))), "finite", "nan", "inf") is not None:
            continue
        if all(map(torch.equal, spoiled, before)):
            continue  # the step was skipped
        first, second = (p.detach().view(-1) for p in spoiled)
        require(bool(first[5].isnan()), f"the coordinate is {first[5]}, as if nothing had happened (backend {name})")
        if not subject.coupling[0]:
            others = torch.arange(first.numel()) != 5
            expected = clean[0].detach().view(-1)[others]
            require_near([first[others]], [expected], f"other coordinates of the tensor, backend {name}", 1e-6)
        if not subject.coupling[1]:
            require_near([second], [clean[1].view(-1)], f"the other tensor, backend {name}", 1e-6)
        elif not bool(second.isfinite().all()):
            raise ContractError(f"NaN spread to other tensors: the step must be skipped or refused (backend {name})")


@check
def infinite_gradients_do_not_hide_in_the_state(subject: Subject) -> None:
    """Where an infinite gradient leaves a state that is not finite, the parameter shows it."""
    for name, backend in subject.backends.items():
        params = tensors()
        optimizer = subject.build(params, **backend)
        if (
            refusal(partial(run, optimizer, params, range(4), _spoiler(float("inf"))), "finite", "nan", "inf")
            is not None
        ):
            continue
        state = [v for v in optimizer.state[params[0]].values() if isinstance(v, Tensor) and v.shape == params[0].shape]
        hidden = [v.view(-1)[5].item() for v in state if not v.view(-1)[5].isfinite()]
        shown = not params[0].detach().view(-1)[5].isfinite()
        require(shown or not hidden, f"the state is {hidden}, the parameter finite (backend {name})")


def _spoiler(value: float) -> Edit:
    def spoil(grads: list[Tensor], t: int) -> None:
        if t == 2:
            grads[0].view(-1)[5] = value

    return spoil
