"""The report against closed forms: linear models, whose curvature is known, and the dense matrices of a network."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_opt.curvature import NonFiniteCurvatureError, critical_lr, stability, stability_report


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def half_squared_error(net, batch):
    return (net(batch[0]) - batch[1]).square().sum() / 2 / len(batch[0])


def linear(inputs, outputs):
    net = nn.Linear(inputs, outputs, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(normal(outputs, inputs, seed=1))
    return net


@pytest.mark.parametrize("batch", [13, 4])  # 4: the last one is ragged
def test_squared_error_of_a_linear_model(batch):
    """G is X'X / n for each of two outputs."""
    x, net = normal(13, 3), linear(3, 2)
    y = net(x).detach() + 0.1
    loader = DataLoader(TensorDataset(x, y), batch)
    gram = torch.linalg.eigvalsh(x.T @ x / 13)
    options = {"momentum": 0.5, "dataset_size": 20, "loss_fn": half_squared_error}
    for trace in ("exact_mse", "hutchinson"):
        report = stability_report(net, loader, 0.3, 5, trace=trace, num_probes=400, **options)
        assert report.stability.lambda_max == pytest.approx(gram[-1].item(), rel=1e-10)
        assert report.loss == pytest.approx(2 * 0.1**2 / 2, rel=1e-10)
        assert report.samples == 13
        exact = 2 * gram.sum().item()
        if trace == "exact_mse":
            assert report.stability.trace == pytest.approx(exact, rel=1e-12)
            assert report.stability.trace_stderr == 0
            expected = stability(
                exact, report.stability.lambda_max, lr=0.3, batch_size=5, momentum=0.5, dataset_size=20
            )
            for name in ("rho_tr", "rho_top", "rho_mix", "lr_ceiling"):
                assert getattr(report.stability, name) == pytest.approx(getattr(expected, name), rel=1e-12)
        else:
            assert 0 < report.stability.trace_stderr < 0.1 * exact
            assert abs(report.stability.trace - exact) < 3 * report.stability.trace_stderr
        assert report.by_parameter == {"weight": pytest.approx(report.stability.trace, rel=1e-12)}


def test_the_factor_of_the_loss():
    """torch's mse_loss of two outputs is 2/2 of half the squared error summed over them, and 1/2 of twice that."""
    x, net = normal(8, 3), linear(3, 2)
    batch = (x, normal(8, 2, seed=2))
    exact = stability_report(
        net, [batch], 0.1, 1, trace="exact_mse", mse_factor=0.5, loss_fn=lambda n, b: half_squared_error(n, b) / 2
    )
    signs = stability_report(net, [batch], 0.1, 1, num_probes=400, loss_fn=lambda n, b: half_squared_error(n, b) / 2)
    assert exact.stability.lambda_max == pytest.approx(signs.stability.lambda_max, rel=1e-10)
    assert abs(exact.stability.trace - signs.stability.trace) < 3 * signs.stability.trace_stderr


def test_cross_entropy_of_a_linear_model():
    """G is the mean of (diag p - p p') x (x x')."""
    x, net = normal(12, 3), linear(3, 4)
    labels = net(x).argmax(dim=1)
    p = net(x).softmax(dim=1).detach()
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    exact = torch.einsum("nop,nq,nr->oqpr", middle, x, x).reshape(12, 12) / 12

    def loss_fn(net, batch):
        return functional.cross_entropy(net(batch[0]), batch[1])

    loader = DataLoader(TensorDataset(x, labels), 5)
    report = stability_report(
        net, loader, 0.1, trace="fisher_mc", num_probes=2000, lambda_max_steps=12, loss_fn=loss_fn
    )
    assert report.stability.batch_size == 5  # the loader's
    assert report.stability.lambda_max == pytest.approx(torch.linalg.eigvalsh(exact)[-1].item(), rel=1e-8)
    assert report.stability.trace_stderr < 0.05 * exact.trace()
    assert abs(report.stability.trace - exact.trace().item()) < 3 * report.stability.trace_stderr


@pytest.mark.parametrize("trace", ["hutchinson", "fisher_mc"])
def test_weights_that_are_no_numbers_are_named(trace):
    net, x = linear(3, 2), normal(4, 3)
    with torch.no_grad():
        net.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteCurvatureError):
        stability_report(
            net, [(x, normal(4, 2))], 0.1, 1, trace=trace, loss_fn=lambda n, b: n(b[0]).logsumexp(1).mean()
        )


def test_a_network_beside_its_dense_hessian(thousand, matrix):
    net, x, y = thousand

    def loss_fn(net, batch):
        return functional.cross_entropy(net(batch[0]), batch[1])

    loader = DataLoader(TensorDataset(x, y), 50)
    report = stability_report(net, loader, 0.1, num_probes=100, lambda_max_steps=40, loss_fn=loss_fn)
    assert report.stability.lambda_max == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item(), rel=1e-8)
    assert abs(report.stability.trace - matrix.trace().item()) < 3 * report.stability.trace_stderr
    assert sum(report.by_parameter.values()) == pytest.approx(report.stability.trace, rel=1e-10)
    assert list(report.by_parameter) == [name for name, _ in net.named_parameters()]


@pytest.mark.parametrize("batch_size", [1, 2, 8, 64])
def test_the_ceiling_is_near_the_exact_edge_where_gradients_have_one_norm(batch_size):
    """Below it, since rho_mix <= 1 suffices there, and within 12% (the sheet of arXiv:2305.17490)."""
    x = functional.normalize(normal(12, 6), dim=1)
    net = linear(6, 1)
    report = stability_report(
        *(net, [(x, net(x).detach())], 0.1, batch_size),
        trace="exact_mse",
        dataset_size="infinite",
        loss_fn=half_squared_error,
    )
    edge = critical_lr(x, batch_size)
    assert 0.88 * edge <= report.stability.lr_ceiling <= edge * (1 + 1e-9)


class Module(pl.LightningModule):
    """Counts, logs, draws, and keeps statistics."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
        self.accuracy = MulticlassAccuracy(3)
        self.calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        logits = self.net(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy)
        return functional.cross_entropy(logits, batch[1])


def test_it_needs_no_trainer_and_leaves_no_trace():
    module = Module().train()
    module.net[3].eval()
    x, y = normal(20, 4).float(), torch.arange(20) % 3
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random_state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # self.log without a Trainer would warn
        first = stability_report(module, DataLoader(TensorDataset(x, y), 10), 0.1, num_probes=4)
        again = stability_report(module, DataLoader(TensorDataset(x, y), 10), 0.1, num_probes=4)
    assert first == again
    assert module.calls == 0
    assert module.accuracy.update_count == 0
    assert [m.training for m in module.net] == [True, True, True, False]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in module.parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_cannot_be_measured_is_refused():
    net, batch = linear(3, 2), (normal(4, 3), normal(4, 2))

    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield batch

    endless = DataLoader(Endless(), None)
    options = {"loss_fn": half_squared_error}
    report = stability_report(net, endless, 0.1, 4, max_batches=2, **options)
    assert report.samples == 8
    assert report.stability.noise == 1 / 4  # nothing is known of the data's length
    cases = [
        ({"loader": endless, **options}, "batch_size must be given, since DataLoader has none"),
        ({"loader": [batch]}, "loss_fn must be given, since Linear has no training_step"),
        ({"loader": [], "batch_size": 1, **options}, "loader must hold at least one batch"),
        ({"loader": [batch], "batch_size": 1, "num_probes": 1, **options}, "num_probes must be >= 2"),
        ({"loader": [batch], "batch_size": 1, "trace": "xtrace", **options}, "trace must be one of"),
        ({"loader": [batch], "batch_size": 1, "dataset_size": "all", **options}, "dataset_size must be one of"),
        ({"loader": [batch], "batch_size": 1, "lr": -1.0, **options}, "lr must be >= 0"),
        ({"loader": [batch], "batch_size": 0, **options}, "batch_size must be >= 1"),
        ({"loader": [batch], "batch_size": 1, "momentum": 1.0, **options}, r"momentum must be in \[0, 1\)"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            stability_report(net, **{"lr": 0.1, **arguments})
    with pytest.raises(ValueError, match="parameters that require gradients, and Linear has none"):
        stability_report(linear(3, 2).requires_grad_(False), [batch], 0.1, 4, **options)
