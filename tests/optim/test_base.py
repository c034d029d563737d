import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lightning_opt.optim import AdaBelief, DiffGrad, ExponentiatedAdamW, ExponentiatedSGD, Lion, LionK
from lightning_opt.optim._base import Optimizer
from tests.reference.problems import noisy_quadratic, trajectory

METHODS = [
    (AdaBelief, {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.1}),
    (DiffGrad, {"lr": 1e-2, "weight_decay": 0.1, "friction": "relative"}),
    (Lion, {"lr": 1e-2, "weight_decay": 0.1}),
    (ExponentiatedSGD, {"lr": 1e-2, "momentum": 0.9}),
    (ExponentiatedAdamW, {"lr": 1e-2}),
]
methods = pytest.mark.parametrize(("method", "options"), METHODS, ids=lambda x: getattr(x, "__name__", ""))


class Recorder(Optimizer):
    """Keeps the sum of the gradients and what it was called with."""

    state_names = ("total",)

    def __init__(self, params, lr=0.1, **options):
        super().__init__(params, {"lr": lr}, **options)

    def coefficients(self, step, lr, group):
        return {"step": step, "lr": lr}

    @staticmethod
    def update(p, g, state, c):
        state.total.add_(g)
        p.sub_(c.lr * state.total)


def parameter(*values, dtype=torch.float32, **kwargs):
    return nn.Parameter(torch.tensor(values, dtype=dtype), **kwargs)


def steps(optimizer, grads):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for g in grads:
        for p in params:
            p.grad = g.to(p.dtype) if isinstance(g, torch.Tensor) else torch.full_like(p, g)
        optimizer.step()
    return optimizer


def noise(n, *shape, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


# --- the step ---


def test_closure_is_differentiated_and_its_loss_returned():
    p = parameter(3.0)
    optimizer = Recorder([p])

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 9.0
    assert p.item() == pytest.approx(3.0 - 0.1 * 6.0)
    assert Recorder([parameter(1.0)]).step() is None


def test_update_hook_sees_the_gradients_of_the_closure_and_can_be_removed():
    p = parameter(3.0)
    optimizer, seen = Recorder([p]), []

    def closure():
        p.grad = torch.tensor([5.0 + len(seen)])

    remove = optimizer.register_update_pre_hook(lambda o: seen.append((o is optimizer, p.grad.item(), p.item())))
    second = optimizer.register_update_pre_hook(lambda o: None)
    optimizer.step(closure)
    assert seen == [(True, 5.0, 3.0)]  # before the update
    clone = copy.deepcopy(optimizer)
    clone.step()
    remove()
    second()
    optimizer.step(closure)
    assert len(seen) == 1


def test_parameters_without_gradient_are_left_alone(backend):
    p = [parameter(1.0), parameter(1.0)]
    optimizer = AdaBelief(p, lr=0.1, weight_decay=0.5, **backend)
    p[0].grad = torch.ones(1)
    optimizer.step()
    assert p[1].item() == 1.0
    assert list(optimizer.state) == [p[0]]


@methods
def test_gradients_are_not_written(method, options, plain_backend):
    p = nn.Parameter(torch.ones(5))
    g = noise(1, 5)[0]
    p.grad = g.clone()
    method([p], **{**options, "weight_decay": 0.1}, maximize=True, **plain_backend).step()
    assert torch.equal(p.grad, g)


@methods
def test_maximize_is_minimize_with_the_opposite_gradient(method, options, plain_backend):
    start, gradient = noisy_quadratic(20)
    up = trajectory(
        lambda p: method(p, **options, maximize=True, **plain_backend), start, lambda w, t: -gradient(w, t), 20
    )
    down = trajectory(lambda p: method(p, **options, **plain_backend), start, gradient, 20)
    assert torch.equal(up, down)


@methods
def test_tensors_with_different_numbers_of_steps_do_not_mix(method, options, backend):
    grads = noise(12, 3, 4).double()
    skips = [lambda t: False, lambda t: t % 3 == 0, lambda t: t < 7]

    def run(which):
        p = [nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in which]
        optimizer = method(p, **options, **backend)
        for t in range(12):
            for x, i in zip(p, which, strict=True):
                x.grad = None if skips[i](t) else grads[t, i]
            optimizer.step()
        return [x.detach() for x in p]

    together = run([0, 1, 2])
    for i in range(3):
        torch.testing.assert_close(together[i], run([i])[0], rtol=1e-14, atol=0)


@pytest.mark.parametrize(("method", "options"), METHODS[:3], ids=lambda x: getattr(x, "__name__", ""))
def test_complex_parameters_are_pairs_of_real_ones(method, options, backend):
    real = noise(1, 4, 2)[0].double()
    grads = noise(10, 4, 2, seed=1).double()
    p, q = nn.Parameter(torch.view_as_complex(real.clone())), nn.Parameter(real.clone())
    a, b = method([p], **options, **backend), method([q], **options, **backend)
    for g in grads:
        p.grad, q.grad = torch.view_as_complex(g.clone()), g
        a.step()
        b.step()
    torch.testing.assert_close(torch.view_as_real(p.detach()), q.detach(), rtol=1e-14, atol=1e-15)
    assert a.state[p]["exp_avg"].dtype == torch.complex128


@methods
def test_layout_in_memory_does_not_matter(method, options, backend):
    start, grads = noise(1, 6, 4)[0].double(), noise(10, 6, 4, seed=1).double()

    def run(as_layout, gradient_layout):
        p = nn.Parameter(as_layout(start.clone()))
        optimizer = method([p], **options, **backend)
        for g in grads:
            p.grad = gradient_layout(g)
            optimizer.step()
        return p.detach()

    def transposed(x):
        return x.t().contiguous().t()

    def strided(x):
        return torch.stack([x, x], dim=-1)[..., 0]

    plain = run(torch.clone, torch.clone)
    for layout in (transposed, strided):
        torch.testing.assert_close(run(layout, torch.clone), plain, rtol=1e-14, atol=0)
        torch.testing.assert_close(run(torch.clone, layout), plain, rtol=1e-14, atol=0)
        torch.testing.assert_close(run(layout, layout), plain, rtol=1e-14, atol=0)


@methods
@pytest.mark.parametrize("capturable", [False, True])
def test_rate_may_be_a_tensor_that_changes(method, options, capturable, backend):
    start, gradient = noisy_quadratic(20)
    options = {**options, "capturable": capturable, **backend}

    def run(lr):
        p = nn.Parameter(start.clone())
        optimizer = method([p], **{**options, "lr": lr})
        for t in range(20):
            if t == 10:
                lr = lr.fill_(0.005) if isinstance(lr, torch.Tensor) else 0.005
                optimizer.param_groups[0]["lr"] = lr
            p.grad = gradient(p.detach(), t)
            optimizer.step()
        return p.detach()

    torch.testing.assert_close(run(torch.tensor(0.01, dtype=torch.float64)), run(0.01), rtol=1e-13, atol=0)


@methods
def test_capturable_changes_no_numbers(method, options, backend):
    start, gradient = noisy_quadratic(20)
    a = trajectory(lambda p: method(p, **options, capturable=True, **backend), start, gradient, 20)
    b = trajectory(lambda p: method(p, **options, **backend), start, gradient, 20)
    torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


@methods
def test_step_can_be_differentiated(method, options):
    """Through the parameter, the gradient and the state of two steps, against finite differences."""

    def two_steps(w, g, h):
        p = w.clone()
        optimizer = method([torch.zeros(0)], **options, differentiable=True)
        optimizer.param_groups[0]["params"] = [p]
        p.grad = g
        optimizer.step()
        p.grad = h
        optimizer.step()
        return p

    if method is Lion:  # the sign is flat
        method, options = LionK, {**options, "kernel": "relativistic", "kernel_args": {"e": 0.5}}
    inputs = [x.double().requires_grad_() for x in (noise(1, 3)[0] + 3, *(noise(2, 3, seed=1) + 2))]
    assert torch.autograd.gradcheck(two_steps, inputs, atol=1e-6)


# --- low precision ---


@methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32_and_rounded_once(method, options, dtype):
    if issubclass(method, (ExponentiatedSGD, ExponentiatedAdamW)):
        options = {**options, "min_abs": 1e-4}
    start, grads = noise(1, 50)[0].to(dtype), noise(10, 50, seed=1).to(dtype)
    low, high = nn.Parameter(start.clone()), nn.Parameter(start.float())
    a, b = method([low], **options, fused=False), method([high], **options, fused=False)
    for g in grads:
        high.data.copy_(low)  # so that the roundings of the parameter do not pile up
        low.grad, high.grad = g, g.float()
        a.step()
        b.step()
        assert torch.equal(low.detach(), high.detach().to(dtype))
    for name, value in a.state[low].items():
        assert value.dtype == torch.float32
        assert torch.equal(value, b.state[high][name])


@methods
def test_state_may_be_bfloat16(method, options, plain_backend):
    grads = noise(10, 40, seed=1)
    p, q = nn.Parameter(torch.ones(40)), nn.Parameter(torch.ones(40))
    a = steps(method([p], **options, state_dtype="bfloat16", **plain_backend), grads)
    b = steps(method([q], **options, **plain_backend), grads)
    for name, value in a.state[p].items():
        if name != "step":
            assert value.dtype == torch.bfloat16
            # ten roundings of 2^-9 of the largest value
            assert (value.float() - b.state[q][name]).abs().max() <= 10 * 2**-9 * b.state[q][name].abs().max()


def test_state_dtype_may_name_single_states_and_differ_between_groups():
    p = [parameter(1.0) for _ in range(3)]
    groups = [
        {"params": p[:1], "state_dtype": {"exp_avg": "bfloat16"}},
        {"params": p[1:2], "state_dtype": "bfloat16"},
        {"params": p[2:]},
    ]
    optimizer = steps(AdaBelief(groups, fused=False), [1.0])
    dtypes = [tuple(optimizer.state[x][name].dtype for name in ("exp_avg", "exp_avg_var")) for x in p]
    low, full = torch.bfloat16, torch.float32
    assert dtypes == [(low, full), (low, low), (full, full)]


# --- state ---


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["load_state_dict", "save and load", "pickle", "deepcopy"])
def test_copies_continue_bit_for_bit(method, options, dtype, way):
    """torch casts state to the parameter's dtype when it is loaded: float32 state of bfloat16 would be lost."""
    options = {**options, "state_dtype": {"exp_avg": "bfloat16"} if "momentum" not in options else None, "fused": False}
    start, grads = noise(1, 30)[0].to(dtype), noise(20, 30, seed=1)
    p = nn.Parameter(start.clone())
    original = steps(method([p], **options), grads[:10])
    if way == "pickle":
        clone = pickle.loads(pickle.dumps(original))
    elif way == "deepcopy":
        clone = copy.deepcopy(original)
    else:
        state_dict = original.state_dict()
        if way == "save and load":
            file = io.BytesIO()
            torch.save(state_dict, file)
            file.seek(0)
            state_dict = torch.load(file, weights_only=True)  # tensors and builtins only
        clone = method([nn.Parameter(p.detach().clone())], **{**options, "lr": 0.5})
        clone.load_state_dict(state_dict)
    (q,) = clone.param_groups[0]["params"]
    assert q is not p
    assert clone.param_groups[0]["lr"] == options["lr"]
    for name, value in original.state[p].items():
        assert clone.state[q][name].dtype == value.dtype
        assert torch.equal(clone.state[q][name], value)
        assert clone.state[q][name].data_ptr() != value.data_ptr()
    steps(original, grads[10:])
    steps(clone, grads[10:])
    assert torch.equal(p, q)
    for name, value in original.state[p].items():
        assert torch.equal(clone.state[q][name], value)


@methods
def test_state_loads_across_backends(method, options):
    start, gradient = noisy_quadratic(20)
    ends = []
    ways = [
        {"fused": False, "foreach": False},
        {"foreach": True},
        {"fused": True},
        {"capturable": True, "foreach": True},
    ]
    for first, second in zip(ways, ways[1:] + ways[:1], strict=True):
        p = nn.Parameter(start.clone())
        optimizer = method([p], **options, **first)
        for t in range(20):
            if t == 10:
                state_dict = optimizer.state_dict()
                optimizer = method([p], **options, **second)
                own = {name: optimizer.param_groups[0][name] for name in ("foreach", "fused", "capturable")}
                state_dict["param_groups"][0].update(own)  # a state dict carries the options that it was saved with
                optimizer.load_state_dict(state_dict)
            p.grad = gradient(p.detach(), t)
            optimizer.step()
        ends.append(p.detach())
        names = set(optimizer.states_of(optimizer.param_groups[0]))
        assert set(optimizer.state[p]) == names | ({"step"} if method is not Lion else set())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-13, atol=0)


def test_step_is_a_float_tensor_on_the_cpu_as_in_torch():
    p = parameter(1.0)
    step = steps(AdaBelief([p]), [1.0] * 3).state[p]["step"]
    assert (step.dtype, step.shape, step.device.type, step.item()) == (torch.float32, (), "cpu", 3.0)


def test_loading_keeps_options_that_the_saved_groups_lack():
    p = parameter(1.0)
    saved = torch.optim.SGD([p], lr=0.5).state_dict()
    optimizer = AdaBelief([p], eps=1e-12)
    optimizer.load_state_dict(saved)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["eps"]) == (0.5, 1e-12)
    steps(optimizer, [1.0])


@pytest.mark.parametrize("step", [None, 5])
def test_loading_state_without_our_count_of_steps_is_refused(step):
    p = parameter(1.0)
    saved = steps(AdaBelief([p]), [1.0]).state_dict()
    del saved["state"][0]["step"]
    if step is not None:
        saved["state"][0]["step"] = step
    with pytest.raises(ValueError, match=r"has no tensor 'step'.*from_peer_state_dict"):
        AdaBelief([p]).load_state_dict(saved)


def test_loaded_momentum_can_be_rounded_stochastically():
    """Lion counts steps only where the random bits need them; a checkpoint made without is one at step 0."""
    p = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    saved = steps(Lion([p], lr=1e-3), [1.0]).state_dict()
    optimizer = Lion([p], lr=1e-3, stochastic_rounding=True)
    saved["param_groups"] = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(saved)
    moved = []
    for _ in range(2):
        p.data.fill_(1.0)
        moved.append(steps(optimizer, [1.0]).param_groups[0]["params"][0].detach().clone())
    assert optimizer.state[p]["step"].item() == 2
    assert not torch.equal(*moved)  # other bits in each step


def test_wrong_number_of_groups_is_refused_as_in_torch():
    p, q = parameter(1.0), parameter(1.0)
    saved = AdaBelief([p]).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        AdaBelief([{"params": [p]}, {"params": [q]}]).load_state_dict(saved)
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        AdaBelief([p, q]).load_state_dict(saved)


# --- construction ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"lr": torch.tensor([0.1, 0.2])}, r"lr must be a number or a one-element tensor, got one of shape \(2,\)"),
        ({"lr": torch.tensor(-0.1)}, "lr must be >= 0.0 and finite, got -0.1"),
        ({"foreach": True, "fused": True}, "foreach=True and fused=True exclude each other"),
        ({"differentiable": True, "fused": True}, "differentiable=True needs foreach and fused unset"),
        ({"differentiable": True, "foreach": True}, "differentiable=True needs foreach and fused unset"),
        ({"state_dtype": "float64"}, "state_dtype must be one of 'float32', 'bfloat16'; got 'float64'"),
        ({"state_dtype": {"exp_avg": "half"}}, "state_dtype must be one of 'float32', 'bfloat16'; got 'half'"),
        ({"state_dtype": {"exp_av": "float32"}}, "a key of state_dtype must be one of .*Did you mean 'exp_avg'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AdaBelief([parameter(1.0)], **options)


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'stochastic_roundin'. Did you mean 'stoch"):
        AdaBelief([parameter(1.0)], stochastic_roundin=True)


def test_no_parameters_are_refused():
    with pytest.raises(ValueError, match="empty parameter list"):
        AdaBelief([])


def test_integer_parameters_are_refused_by_name():
    p = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    with pytest.raises(ValueError, match=r"needs floating-point parameters, got torch.int64 \(parameter 'counts'\)"):
        AdaBelief([("counts", p)])


def test_wrong_group_is_not_added():
    optimizer = AdaBelief([parameter(1.0)])
    with pytest.raises(ValueError, match="lr must be >= 0.0"):
        optimizer.add_param_group({"params": [parameter(2.0)], "lr": -1.0})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [parameter(2.0)], "lr": 1.0})
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1.0]


def test_fused_on_an_unsupported_dtype_is_refused_and_else_avoided():
    p = parameter(1.0, dtype=torch.float16)
    message = r"AdaBelief\(fused=True\) cannot be honoured: the CPU kernels support .* not float16"
    with pytest.raises(RuntimeError, match=message):
        AdaBelief([p], fused=True)
    optimizer = AdaBelief([p], lr=0.1)
    steps(optimizer, [1.0])
    assert p.item() == pytest.approx(1 - 0.1 / 0.9, rel=1e-3)


@methods
def test_sparse_gradients_are_refused_by_name(method, options, backend):
    layer = nn.Embedding(4, 2, sparse=True)
    optimizer = method(layer.named_parameters(), **options, **backend)
    layer(torch.tensor([1])).sum().backward()
    message = f"{method.__name__} does not support sparse gradients.*'weight'.*: use torch.optim.SparseAdam"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


def test_groups_for_a_module_decay_matrices_only():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    net[2].weight.requires_grad_(False)
    optimizer = AdaBelief(AdaBelief.param_groups_for(net), weight_decay=0.1)
    assert [(g["param_names"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (["0.weight"], 0.1),
        (["0.bias", "1.weight", "1.bias", "2.bias"], 0.0),
    ]
    assert len(AdaBelief.param_groups_for(nn.Linear(2, 2, bias=False))) == 1


def test_repr_shows_the_options():
    text = repr(LionK([parameter(1.0)], lr=0.25, kernel="huber", kernel_args={"e": 0.5}))
    assert text.startswith("LionK (")
    for line in ("lr: 0.25", "kernel: huber", "kernel_args: {'e': 0.5}", "fused: None"):
        assert line in text


class Wrapped(torch.Tensor):
    """A tensor subclass, as sharding libraries have."""


def test_tensor_subclasses_are_left_to_torch() -> None:
    parameter = torch.ones(3).as_subclass(Wrapped).requires_grad_()
    parameter.grad = torch.ones(3)
    plain = torch.nn.Parameter(torch.ones(3))
    plain.grad = torch.ones(3)
    AdaBelief([parameter, plain], lr=0.1).step()
    torch.testing.assert_close(parameter.detach().as_subclass(torch.Tensor), plain.detach(), rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="no fused kernel for Wrapped"):
        AdaBelief([parameter], fused=True)


def test_state_of_another_method_or_model_is_refused_before_anything_is_loaded() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    parameter.grad = torch.ones(2, 3)
    adam, ours = torch.optim.Adam([parameter]), AdaBelief([parameter], lr=0.5)
    adam.step()
    with pytest.raises(ValueError, match="no tensor 'exp_avg_var'.*from_peer_state_dict"):
        ours.load_state_dict(adam.state_dict())
    assert ours.param_groups[0]["lr"] == 0.5
    assert not ours.state
    ours.step()
    with pytest.raises(ValueError, match=r"'exp_avg' has shape \(2, 3\), but its parameter has \(3, 2\)"):
        AdaBelief([nn.Parameter(torch.ones(3, 2))]).load_state_dict(ours.state_dict())


def test_the_backend_is_not_part_of_the_state() -> None:
    fused, plain = (
        AdaBelief([nn.Parameter(torch.ones(2))], fused=True),
        AdaBelief([nn.Parameter(torch.ones(2))], fused=False),
    )
    plain.load_state_dict(fused.state_dict())
    assert plain.param_groups[0]["fused"] is False


@pytest.mark.parametrize("option", ["maximize", "decoupled"])
def test_truthy_words_are_no_flags(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be one of True, False; got 'False'"):
        AdaBelief([nn.Parameter(torch.ones(2))], **{option: "False"})


def test_a_misspelt_option_of_a_group_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="'weigth_decay'; did you mean 'weight_decay'"):
        AdaBelief([{"params": [parameter], "weigth_decay": 0.1}])
    AdaBelief([{"params": [parameter], "name": "head", "lr_scale": 0.1}])  # what other tools keep in groups


def test_a_refused_gradient_leaves_all_groups_as_they_were() -> None:
    dense, table = nn.Parameter(torch.ones(2)), nn.Embedding(3, 2, sparse=True)
    (dense.sum() + table(torch.tensor([1])).sum()).backward()
    with pytest.raises(RuntimeError, match="sparse"):
        AdaBelief([{"params": [dense]}, {"params": table.parameters()}], lr=0.1).step()
    assert torch.equal(dense, torch.ones(2))


def test_a_compiled_step_takes_the_reference() -> None:
    compiled, plain = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    compiled.grad = plain.grad = torch.tensor([1.0, -2.0, 0.5])
    optimizer = AdaBelief([compiled], lr=0.1)
    torch.compile(optimizer.step, backend="eager")()
    AdaBelief([plain], lr=0.1, fused=False, foreach=False).step()
    assert torch.equal(compiled, plain)
