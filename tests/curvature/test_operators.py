import contextlib
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_opt.curvature import (
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
    MatrixOperator,
    NotTwiceDifferentiableError,
    probe_mode,
)
from tests.reference.curvature import dense_fisher, dense_ggn, dense_hessian

F64 = torch.float64
ROUNDING = {"rtol": 1e-10, "atol": 1e-13}  # of float64 entries of size 1e-3 to 1, sums of some thousand terms
FINITE_DIFFERENCE = 1e-4  # relative in float32: a step of 5e-3, squared, times the fourth derivative


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Shared(nn.Module):
    """Two layers with one weight, a frozen layer, and a parameter without influence."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.frozen(torch.tanh(self.first(x)))))))


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 3, 3), nn.SiLU(), nn.Flatten(), nn.Linear(12, 3))

    def forward(self, x):
        return self.layers(x.view(-1, 1, 4, 4))


class Transformer(nn.Module):
    """Sequences of 4 tokens of width 4, with fused attention, checkpointed or not."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.checkpointed = checkpointed
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def attend(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return functional.scaled_dot_product_attention(q, k, v)

    def forward(self, x):
        x = x.view(-1, 1, 4, 4)
        x = checkpoint(self.attend, x, use_reentrant=False) if self.checkpointed else self.attend(x)
        return self.head(x.mean(dim=2).squeeze(1))


def make(kind, dtype=F64):
    torch.manual_seed(0)
    nets = {
        "mlp": lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
        "shared": Shared,
        "convolutional": Convolutional,
        "transformer": Transformer,
    }
    net = nets[kind]().to(dtype)
    x = draw(12, 4 if kind in ("mlp", "shared") else 16, dtype=dtype)
    return net, x, torch.arange(12) % 3


def half_squared_error(z, y):
    return ((z - functional.one_hot(y, 3)) ** 2).sum(dim=1).mean() / 2


def smoothed_cross_entropy(z, y):
    return functional.cross_entropy(z, y, label_smoothing=0.1)


OPERATORS = {
    "hessian": (HessianOperator, dense_hessian),
    "ggn": (GGNOperator, dense_ggn),
    "fisher": (EmpiricalFisherOperator, dense_fisher),
}


def build(name, net, loss, batches, **options):
    if name == "hessian":
        return HessianOperator(lambda b: loss(net(b[0]), b[1]), net.parameters(), batches, **options)
    return OPERATORS[name][0](lambda b: (net(b[0]), b[1]), loss, net.parameters(), batches, **options)


@pytest.mark.parametrize("loss", [functional.cross_entropy, smoothed_cross_entropy, half_squared_error])
@pytest.mark.parametrize("kind", ["mlp", "shared", "convolutional", "transformer"])
@pytest.mark.parametrize("name", OPERATORS)
def test_dense_matrices(name, kind, loss):
    net, x, y = make(kind)
    # the unused parameter has no gradient, so the references leave it out
    trainable = [p for p in net.parameters() if p.requires_grad]
    unused = kind == "shared"
    operator = build(name, net, loss, [(x, y)])
    dense = operator.to_dense()
    assert operator.size == sum(p.numel() for p in trainable)
    assert operator.products == operator.size
    if unused:
        rows = operator.unflatten(torch.arange(operator.size))
        where = next(r for r, p in zip(rows, operator.params, strict=True) if p is net.unused)
        assert not dense[where].any()
        assert not dense[:, where].any()
        keep = torch.ones(operator.size, dtype=torch.bool)
        keep[where] = False
        dense = dense[keep][:, keep]
        del net.unused
    torch.testing.assert_close(dense, OPERATORS[name][1](net, loss, x, y), **ROUNDING)
    torch.testing.assert_close(dense, dense.T, **ROUNDING)


@pytest.mark.parametrize("method", ["autograd", "finite_difference"])
@pytest.mark.parametrize("name", OPERATORS)
def test_micro_batches_are_one_batch(name, method):
    """Of different sizes, also where the data are fetched at each access."""
    net, x, y = make("mlp")

    class Fetched:
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return x[[slice(5), slice(5, 6), slice(6, 12)][i]], y[[slice(5), slice(5, 6), slice(6, 12)][i]]

    whole = build(name, net, functional.cross_entropy, [(x, y)]).to_dense()
    parts = build(name, net, functional.cross_entropy, Fetched(), weights=[5, 1, 6], method=method).to_dense()
    # central differences in float64: a step of 6e-6, squared, and rounding of 2e-16 over it
    tolerance = ROUNDING if method == "autograd" else {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(parts, whole, **tolerance)
    equal = build(name, net, functional.cross_entropy, [(x[:6], y[:6]), (x[6:], y[6:])]).to_dense()
    torch.testing.assert_close(equal, whole, **ROUNDING)


@pytest.mark.parametrize("retain_graph", [True, False])
@pytest.mark.parametrize("name", OPERATORS)
def test_columns_are_vectors(name, retain_graph):
    net, x, y = make("mlp")
    operator = build(name, net, functional.cross_entropy, [(x, y)], retain_graph=retain_graph)
    columns = draw(operator.size, 3)
    product = operator @ columns
    assert operator.products == 3
    for i in range(3):
        assert torch.equal(operator @ columns[:, i], product[:, i])
    assert operator.products == 6
    assert not product.requires_grad


@pytest.mark.parametrize("retain_graph", [True, False])
@pytest.mark.parametrize("name", OPERATORS)
def test_products_follow_the_parameters(name, retain_graph):
    net, x, y = make("mlp")
    operator = build(name, net, functional.cross_entropy, [(x, y)], retain_graph=retain_graph)
    v = draw(operator.size)
    before = operator @ v
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    after = operator @ v
    assert (after - before).norm() > 0.01 * before.norm()
    assert torch.equal(after, build(name, net, functional.cross_entropy, [(x, y)]) @ v)


@pytest.mark.parametrize("name", OPERATORS)
def test_finite_differences_in_float32(name):
    net, x, y = make("mlp", torch.float32)
    autograd = build(name, net, functional.cross_entropy, [(x, y)])
    difference = build(name, net, functional.cross_entropy, [(x, y)], method="finite_difference")
    v = draw(autograd.size, dtype=torch.float32)
    # also for vectors of any length
    for scale in (1e-12, 1.0, 1e12):
        expected = scale * (autograd @ v)
        assert (difference @ (scale * v) - expected).norm() < FINITE_DIFFERENCE * expected.norm()
    assert not (difference @ torch.zeros_like(v)).any()


@pytest.mark.parametrize("method", ["autograd", "finite_difference"])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_product_leaves_no_trace(name, method):
    """Parameters and their version, gradients, graphs of the caller, random state."""
    net, x, y = make("mlp", torch.float32)
    net.insert(1, nn.Dropout(0.5))
    held = functional.cross_entropy(net(x), y)  # a graph across the product
    params = [p.detach().clone() for p in net.parameters()]
    versions = [p._version for p in net.parameters()]
    state = torch.get_rng_state()
    operator = build(name, net, functional.cross_entropy, [(x[:6], y[:6]), (x[6:], y[6:])], method=method)
    operator @ draw(operator.size, dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), params, strict=True))
    assert versions == [p._version for p in net.parameters()]
    held.backward()


@pytest.mark.parametrize("options", [{}, {"retain_graph": False}, {"method": "finite_difference"}])
@pytest.mark.parametrize("name", OPERATORS)
def test_dropout_draws_the_same_in_every_product(name, options):
    net, x, y = make("mlp")
    net.insert(1, nn.Dropout(0.5))
    batches = [(x[:6], y[:6]), (x[6:], y[6:])] if options else [(x, y)]
    operator = build(name, net, functional.cross_entropy, batches, **options)
    v = draw(operator.size)
    first = operator @ v
    torch.rand(7)
    assert torch.equal(operator @ v, first)
    dense = operator.to_dense()
    tolerance = ROUNDING if "method" not in options else {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(dense, dense.T, **tolerance)  # one network, not one a row
    other = build(name, net, functional.cross_entropy, batches, seed=1, **options)
    assert not torch.allclose(other @ v, first, rtol=1e-3)


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_around_changes_nothing(name):
    net, x, y = make("mlp", torch.float32)
    operator = build(name, net, functional.cross_entropy, [(x, y)])
    v = draw(operator.size, dtype=torch.float32)
    expected = operator @ v
    for retain_graph in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            again = build(name, net, functional.cross_entropy, [(x, y)], retain_graph=retain_graph)
            assert torch.equal(again @ v, expected)
            assert torch.equal(again @ v, expected)
    assert expected.dtype == torch.float32


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", OPERATORS)
def test_inside_evaluation(name, context):
    net, x, y = make("mlp")
    operator = build(name, net, functional.cross_entropy, [(x, y)])
    v = draw(operator.size)
    expected = operator @ v
    with context():
        again = build(name, net, functional.cross_entropy, [(x, y)])
        assert torch.equal(again @ v.clone(), expected)
        assert torch.equal(again @ v.clone(), expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_low_precision_parameters(name):
    """Vectors are float32 and products as exact as the network's arithmetic: 8 bits."""
    net, x, y = make("mlp", torch.bfloat16)
    operator = build(name, net, functional.cross_entropy, [(x, y)])
    assert operator.dtype == torch.float32
    v = draw(operator.size, dtype=torch.float32)
    product = operator @ v
    exact = build(name, net.double(), functional.cross_entropy, [(x.double(), y)]) @ v.double()
    assert (product - exact).norm() < 0.03 * exact.norm()


def test_vectors_may_be_wider_than_the_parameters():
    net, x, y = make("mlp", torch.float32)
    operator = build("hessian", net, functional.cross_entropy, [(x, y)], dtype=F64)
    assert (operator @ draw(operator.size)).dtype == F64


def test_ggn_is_the_hessian_of_a_linear_model_and_fisher_at_interpolation():
    torch.manual_seed(0)
    net = nn.Linear(4, 3, dtype=F64)
    x, y = draw(9, 4), torch.arange(9) % 3
    hessian = build("hessian", net, functional.cross_entropy, [(x, y)]).to_dense()
    torch.testing.assert_close(build("ggn", net, functional.cross_entropy, [(x, y)]).to_dense(), hessian, **ROUNDING)
    # one output and residuals of one: the empirical Fisher is the Gauss-Newton matrix
    net = nn.Linear(4, 1, dtype=F64)
    targets = net(x).detach() + 1
    loss = lambda z, t: ((z - t) ** 2).mean() / 2  # noqa: E731
    fisher = build("fisher", net, loss, [(x, targets)]).to_dense()
    torch.testing.assert_close(fisher, build("ggn", net, loss, [(x, targets)]).to_dense(), **ROUNDING)


def test_trace_of_the_fisher_is_the_mean_squared_gradient():
    net, x, y = make("mlp")
    squares = []
    for i in range(len(x)):
        gradient = torch.autograd.grad(functional.cross_entropy(net(x[i : i + 1]), y[i : i + 1]), net.parameters())
        squares.append(sum(float((g**2).sum()) for g in gradient))
    fisher = build("fisher", net, functional.cross_entropy, [(x, y)])
    assert float(fisher.to_dense().trace()) == pytest.approx(sum(squares) / len(squares), rel=1e-12)


@pytest.mark.parametrize("name", ["hessian", "ggn"])
def test_a_loss_without_curvature_has_a_zero_matrix(name):
    net = nn.Linear(4, 3, dtype=F64)
    operator = build(name, net, lambda z, y: z.abs().sum(), [(draw(5, 4), None)])
    assert not operator.to_dense().any()


@pytest.mark.parametrize("method", ["autograd", "finite_difference"])
@pytest.mark.parametrize("name", OPERATORS)
def test_some_of_the_parameters(name, method):
    """A block of the matrix; and zeros for parameters without influence."""
    net, x, y = make("mlp")
    whole = build(name, net, functional.cross_entropy, [(x, y)]).to_dense()
    operator, _ = OPERATORS[name]
    loss = (lambda b: functional.cross_entropy(net(b[0]), b[1]),)
    if name != "hessian":
        loss = (lambda b: (net(b[0]), b[1]), functional.cross_entropy)
    block = operator(*loss, net[2].parameters(), [(x, y)], method=method).to_dense()
    torch.testing.assert_close(block, whole[30:, 30:], rtol=0, atol=1e-13 if method == "autograd" else 1e-9)
    other = torch.ones(2, dtype=F64, requires_grad=True)
    assert not operator(*loss, [other], [(x, y)], method=method).to_dense().any()


@pytest.mark.parametrize("retain_graph", [True, False])
@pytest.mark.parametrize("name", OPERATORS)
def test_checkpointed_attention(name, retain_graph):
    """Its forward pass runs again in every backward pass."""
    net, x, y = make("transformer")
    v = draw(75)
    expected = build(name, net, functional.cross_entropy, [(x, y)]) @ v
    net.checkpointed = True
    operator = build(name, net, functional.cross_entropy, [(x, y)], retain_graph=retain_graph)
    for _ in range(2):
        torch.testing.assert_close(operator @ v, expected, **ROUNDING)


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


def test_a_loss_that_is_differentiable_once():
    w = draw(5).requires_grad_()
    loss = lambda b: OnceDifferentiable.apply(w).sum()  # noqa: E731
    below = lambda b: (OnceDifferentiable.apply(w**2) ** 2).sum()  # noqa: E731
    operators = [HessianOperator(loss, [w], [None]), HessianOperator(below, [w], [None])]
    operators += [GGNOperator(lambda b: (OnceDifferentiable.apply(w), b), lambda z, y: (z**2).sum(), [w], [None])]
    for operator in 2 * operators:
        with pytest.raises(NotTwiceDifferentiableError, match="finite_difference"):
            operator @ torch.ones(5, dtype=F64)
    difference = HessianOperator(loss, [w], [None], method="finite_difference") @ torch.ones(5, dtype=F64)
    torch.testing.assert_close(difference, 6 * w.detach(), rtol=1e-8, atol=1e-8)


def test_a_compiled_module():
    net, x, y = make("mlp", torch.float32)
    compiled = torch.compile(net, backend="aot_eager")
    loss = lambda b: functional.cross_entropy(compiled(b[0]), b[1])  # noqa: E731
    v = draw(51, dtype=torch.float32)
    with pytest.raises(NotTwiceDifferentiableError, match=r"torch\.compile"):
        HessianOperator(loss, net.parameters(), [(x, y)]) @ v
    expected = build("hessian", net, functional.cross_entropy, [(x, y)]) @ v
    difference = HessianOperator(loss, net.parameters(), [(x, y)], method="finite_difference") @ v
    assert (difference - expected).norm() < FINITE_DIFFERENCE * expected.norm()
    torch._dynamo.reset()


@pytest.mark.parametrize("batch_norm", ["batch", "running"])
@pytest.mark.parametrize("options", [{}, {"retain_graph": False}, {"method": "finite_difference"}])
def test_batch_norm(batch_norm, options):
    """Curvature of the network that normalizes by the batch, or by its running statistics; neither moves."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = draw(12, 4), torch.arange(12) % 3
    net(draw(12, 4, seed=3))  # running statistics of other data
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    with probe_mode(net, batch_norm=batch_norm):
        dense = build("hessian", net, functional.cross_entropy, [(x, y)], **options).to_dense()
    assert net.training
    assert net[1].training
    assert all(torch.equal(b, buffers[name]) for name, b in net.named_buffers())

    class Normalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            z = net[0](x)
            mean, var = (
                (z.mean(0), z.var(0, correction=0))
                if batch_norm == "batch"
                else (net[1].running_mean, net[1].running_var)
            )
            z = (z - mean) / (var + net[1].eps).sqrt() * net[1].weight + net[1].bias
            return net[3](net[2](z))

    expected = dense_hessian(Normalized(), functional.cross_entropy, x, y)
    torch.testing.assert_close(dense, expected, **({"rtol": 0, "atol": 1e-7} if "method" in options else ROUNDING))


def test_matrix_operator_and_shapes():
    a = MatrixOperator(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
    assert torch.equal(a.to_dense(), torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
    for shape in [(3,), (3, 2), (2, 2, 2), ()]:
        with pytest.raises(ValueError, match="expected a vector"):
            a @ torch.ones(shape)
    with pytest.raises(ValueError, match="square"):
        MatrixOperator(torch.ones(2, 3))
    with pytest.raises(ValueError, match="too large"):
        HessianOperator(torch.sum, [torch.ones(20_001, requires_grad=True)], [None]).to_dense()
    with pytest.raises(ValueError, match="expected a vector"):
        a.unflatten(torch.ones(3))


def test_flatten_and_unflatten():
    net, x, y = make("mlp")
    operator = build("hessian", net, functional.cross_entropy, [(x, y)])
    v = draw(operator.size)
    parts = operator.unflatten(v)
    assert [p.shape for p in parts] == [p.shape for p in net.parameters()]
    assert torch.equal(operator.flatten(parts), v)
    assert not operator.flatten([None, *parts[1:]])[: parts[0].numel()].any()


W = torch.ones(2, requires_grad=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"params": []}, "params holds no tensor that requires a gradient"),
        ({"params": [torch.ones(2)]}, "params holds no tensor"),
        ({"params": [torch.ones(2, dtype=torch.complex64, requires_grad=True)]}, "must be real floating point"),
        ({"params": [W, torch.ones(2, device="meta", requires_grad=True)]}, "must be on one device, got cpu and meta"),
        ({"batches": iter([1])}, "batches must be a sequence, .* got list_iterator"),
        ({"batches": torch.ones(3)}, r"got a tensor; for a single batch give \[batch\]"),
        ({"batches": []}, "at least one micro-batch"),
        ({"weights": [1, 2]}, "weights must be as many as batches, 1, got 2"),
        ({"weights": [0]}, "weights must be > 0 and finite, got 0"),
        ({"weights": [math.nan]}, "weights must be > 0 and finite, got nan"),
        ({"method": "autograds"}, "method must be one of 'autograd', 'finite_difference'.*Did you mean 'autograd'"),
    ],
)
def test_wrong_arguments(arguments, message):
    given = {"params": [W], "batches": [None], **arguments}
    params, batches = given.pop("params"), given.pop("batches")
    with pytest.raises(ValueError, match=message):
        HessianOperator(lambda b: W.sum(), params, batches, **given)
    with pytest.raises(ValueError, match=message):
        GGNOperator(lambda b: (W, b), lambda z, y: z.sum(), params, batches, **given)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda b: W**2, r"loss must return a scalar tensor, got \[2\]"),
        (lambda b: 1.0, "loss must return a scalar tensor, got float"),
        (lambda b: (W**2).sum().detach(), "must depend on params"),
    ],
)
def test_wrong_losses(loss, message):
    with pytest.raises(ValueError, match=message):
        HessianOperator(loss, [W], [None]) @ torch.ones(2)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda b: W, r"must return \(outputs, targets\)"),
        (lambda b: (1.0, 2.0), r"must return \(outputs, targets\)"),
        (lambda b: (W.detach(), None), "must depend on params"),
    ],
)
def test_wrong_forwards(forward, message):
    with pytest.raises(ValueError, match=message):
        GGNOperator(forward, lambda z, y: z.sum(), [W], [None]) @ torch.ones(2)
    with pytest.raises(ValueError, match="first dimension"):
        EmpiricalFisherOperator(lambda b: (W.sum(), None), lambda z, y: z**2, [W], [None]) @ torch.ones(2)


def test_other_errors_pass_through():
    def fail(batch):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"), contextlib.suppress(NotTwiceDifferentiableError):
        HessianOperator(fail, [W], [None]) @ torch.ones(2)
