import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_opt.callbacks import RunReport, StabilityMonitor
from lightning_opt.curvature import HessianOperator

settings = {
    "StabilityMonitor": [
        {"every_n_steps": 2},
        {"every_n_steps": 2, "trace": "fisher_mc", "per_layer": True, "num_probes": 3},
        {"every_n_steps": 4, "trace": "exact_mse", "dataset_size": "infinite", "on_violation": "warn"},
        {"every_n_steps": 2, "on_violation": "scale_lr", "ceiling": 0.01, "patience": 1},
    ]
}

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Rows(Logger):
    name, version = "rows", 0

    def __init__(self):
        super().__init__()
        self.values = {}

    def log_metrics(self, metrics, step=None):
        self.values.update({(name, step): value for name, value in metrics.items()})

    def log_hyperparams(self, *args, **kwargs):
        pass


def data():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(24, 4, generator=generator)
    return inputs, torch.randn(24, 2, generator=generator), (inputs[:, 0] > 0).long()


class Net(pl.LightningModule):
    """Regression by half the squared error, or classification."""

    def __init__(self, kind="mse", lr=0.05, momentum=0.0, schedule=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        self.kind, self.lr, self.momentum, self.schedule = kind, lr, momentum, schedule
        self.rates, self.before = [], []

    def forward(self, inputs):
        return self.net(inputs)

    def loss(self, batch):
        inputs, targets, labels = batch
        if self.kind == "mse":
            return (self(inputs) - targets).square().sum() / 2 / len(inputs)
        return nn.functional.cross_entropy(self(inputs), labels)

    def on_train_batch_start(self, batch, batch_idx):
        self.before.append([p.detach().clone() for p in self.parameters()])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)
        if self.schedule:
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)]
        return optimizer


def fit(monitor, module=None, *callbacks, batch_size=6, dataset=None, **options):
    trainer = pl.Trainer(
        **{
            "max_epochs": 1,
            "logger": Rows(),
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        },
        callbacks=[monitor, *callbacks],
    )
    module = module or Net()
    trainer.fit(module, DataLoader(dataset or TensorDataset(*data()), batch_size))
    return module, trainer, getattr(trainer.logger, "values", {})


def at(module, step, function):
    """A function of the module as it was before a step."""
    now = [p.detach().clone() for p in module.parameters()]
    with torch.no_grad():
        for p, old in zip(module.parameters(), module.before[step], strict=True):
            p.copy_(old)
    value = function(module)
    with torch.no_grad():
        for p, new in zip(module.parameters(), now, strict=True):
            p.copy_(new)
    return value


def batch_of(step, size=6):
    return tuple(part[step * size : (step + 1) * size] for part in data())


def hessian(module, batch):
    return HessianOperator(module.loss, module.parameters(), [batch], dtype=torch.float64).to_dense()


def jacobian(module, batch):
    """[samples, outputs, parameters]."""
    rows = []
    for sample in module(batch[0]):
        entries = [torch.autograd.grad(z, list(module.parameters()), retain_graph=True) for z in sample]
        rows.append(torch.stack([torch.cat([g.flatten() for g in entry]) for entry in entries]))
    return torch.stack(rows).double()


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_what_is_logged_is_what_the_dense_hessian_says(momentum):
    monitor = StabilityMonitor(every_n_steps=2, lambda_max_steps=40, num_probes=400)
    module, _, rows = fit(monitor, Net(momentum=momentum))
    for step in (0, 2):
        values = {name: value for (name, s), value in rows.items() if s == step}
        exact = at(module, step, lambda m, step=step: hessian(m, batch_of(step)))
        top, trace = torch.linalg.eigvalsh(exact)[-1].item(), exact.trace().item()
        assert values["stability/lambda_max"] == pytest.approx(top, rel=1e-4)
        assert 0 < values["stability/trace_stderr"] < 0.1 * trace
        assert abs(values["stability/trace"] - trace) < 4 * values["stability/trace_stderr"]
        noise = (24 - 6) / (6 * 23)  # 6 of 24 without replacement
        rho_tr = 0.05 / (1 - momentum) / 2 * noise * values["stability/trace"]
        rho_top = 0.05 / (2 * (1 + momentum)) * values["stability/lambda_max"]
        assert values["stability/rho_tr"] == pytest.approx(rho_tr)
        assert values["stability/rho_top"] == pytest.approx(rho_top)
        assert values["stability/rho_mix"] == pytest.approx(rho_tr + (1 - noise) * rho_top)
        assert values["stability/lr_ceiling"] == pytest.approx(0.05 / values["stability/rho_mix"])
    assert {s for name, s in rows if name == "stability/trace"} == {0, 2}


def test_the_exact_trace_is_that_of_the_jacobian():
    for factor in (1.0, 0.5):
        monitor = StabilityMonitor(
            every_n_steps=1, trace="exact_mse", mse_factor=factor, per_layer=True, lambda_max_steps=40
        )
        module, _, rows = fit(
            monitor, precision="64-true", dataset=TensorDataset(*(d.double() for d in data()[:2]), data()[2])
        )
        for step in range(3):
            batch = tuple(part.double() if part.is_floating_point() else part for part in batch_of(step))
            flat = at(module, step, lambda m, batch=batch: jacobian(m, batch)).flatten(0, 1)
            expected = factor * flat.square().sum().item() / 6
            assert rows["stability/trace", step] == pytest.approx(expected, rel=1e-10)
            assert rows["stability/trace_stderr", step] == 0
            by_layer = [value for (name, s), value in rows.items() if "trace/net." in name and s == step]
            assert len(by_layer) == 4
            assert sum(by_layer) == pytest.approx(expected, rel=1e-10)
            top = torch.linalg.eigvalsh(factor * flat.T @ flat / 6)[-1].item()
            assert rows["stability/lambda_max", step] == pytest.approx(top, rel=1e-6)


def test_the_fisher_trace_is_that_of_the_gauss_newton_matrix():
    """J' (diag p - p p') J, also of a step of two micro-batches."""
    for accumulate in (1, 2):
        monitor = StabilityMonitor(every_n_steps=2, trace="fisher_mc", num_probes=1000, lambda_max_steps=40)
        module, _, rows = fit(monitor, Net("ce"), batch_size=6 // accumulate, accumulate_grad_batches=accumulate)

        def exact(m):
            p = m(batch_of(2)[0]).softmax(dim=1).double().detach()
            J = jacobian(m, batch_of(2))
            middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
            return torch.einsum("nop,noq,nqr->pr", J, middle, J) / 6

        G = at(module, 2 * accumulate, exact)
        trace, stderr = rows["stability/trace", 2], rows["stability/trace_stderr", 2]
        assert abs(trace - G.trace().item()) < 4 * stderr
        assert stderr < 0.1 * trace
        assert rows["stability/lambda_max", 2] == pytest.approx(torch.linalg.eigvalsh(G)[-1].item(), rel=1e-4)


def test_the_batch_size_is_that_of_the_step():
    rows = fit(StabilityMonitor(dataset_size="infinite"), accumulate_grad_batches=2)[2]
    given = fit(StabilityMonitor(dataset_size="infinite", batch_size=12), accumulate_grad_batches=2)[2]
    trace = rows["stability/trace", 0]
    assert rows["stability/rho_tr", 0] == pytest.approx(0.05 * trace / 2 / 12)
    assert rows == given


def test_full_batches_have_no_noise():
    rows = fit(StabilityMonitor(), batch_size=24)[2]
    assert rows["stability/rho_tr", 0] == 0
    assert rows["stability/rho_mix", 0] == rows["stability/rho_top", 0]


def test_a_violation_lowers_the_rate_to_the_ceiling_after_some_patience():
    monitor = StabilityMonitor(every_n_steps=1, on_violation="scale_lr", patience=2, ceiling=0.5)
    module, _, rows = fit(monitor, Net(lr=1.5), batch_size=24, max_epochs=2)
    assert rows["stability/rho_mix", 0] > 0.5
    assert module.rates[0] == 1.5
    assert module.rates[1] == pytest.approx(1.5 * 0.5 / rows["stability/rho_mix", 1])
    with pytest.raises(MisconfigurationException, match="StabilityMonitor and the scheduler StepLR"):
        fit(monitor, Net(schedule=True))
    fit(StabilityMonitor(on_violation="scale_lr", on_scheduler="rebase"), Net(schedule=True))


def test_a_violation_is_warned_about_once():
    with pytest.warns(UserWarning, match="rho_mix is .* at step 1, above 0.001 for the 2. time") as caught:
        fit(StabilityMonitor(every_n_steps=1, on_violation="warn", patience=2, ceiling=0.001))
    assert len([w for w in caught if "rho_mix" in str(w.message)]) == 1


def test_what_is_not_finite_is_left_out_and_said_once():
    class Bad(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (math.nan if batch_idx in (1, 2) else 1.0)

        def on_before_optimizer_step(self, optimizer):
            if not self.net[0].weight.grad.isfinite().all():
                optimizer.zero_grad()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = fit(StabilityMonitor(every_n_steps=1), Bad())[2]
    assert {s for name, s in rows if name == "stability/trace"} == {0, 3}
    assert rows["stability/rejected", 3] == 2
    assert len([w for w in caught if "Said once" in str(w.message)]) == 1


def test_nothing_is_measured_where_nobody_looks(monkeypatch):
    def never(*_, **__):
        raise AssertionError("measured")

    monkeypatch.setattr("lightning_opt.callbacks._stability_meter.read_stability", never)
    fit(StabilityMonitor(), logger=False)
    with pytest.raises(AssertionError, match="measured"):
        fit(StabilityMonitor())


def test_the_report_shows_the_edge(tmp_path):
    report = RunReport()
    fit(StabilityMonitor(every_n_steps=1), None, report, logger=False, default_root_dir=tmp_path)
    page = report.path.read_text()
    assert "Sharpness and the edge of stability" in page
    assert "Shares of the edge" in page
    assert "Error" not in page


def test_outputs_are_needed():
    class Plain(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 2)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[2])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match="needs the outputs of the network"):
        fit(StabilityMonitor(trace="fisher_mc"), Plain())
    rows = fit(StabilityMonitor(trace="fisher_mc", forward_fn=lambda module, batch: module.net(batch[0])), Plain())[2]
    assert rows["stability/trace", 0] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be >= 1"),
        ({"num_probes": 1}, "num_probes must be >= 2"),
        ({"trace": "xtrace"}, "trace must be one of"),
        ({"ceiling": 0.0}, "ceiling must be > 0"),
        ({"patience": 0}, "patience must be >= 1"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"dataset_size": "some"}, "dataset_size must be one of"),
        ({"mse_factor": 0.0}, "mse_factor must be > 0"),
        ({"on_violation": "stop"}, "on_violation must be one of"),
        ({"lambda_max_steps": 1}, "lambda_max_steps must be >= 2"),
    ],
)
def test_wrong_values(options, message):
    with pytest.raises(ValueError, match=message):
        StabilityMonitor(**options)


@pytest.mark.parametrize(("lr", "momentum"), [(math.inf, 0.0), (0.0, 1.0)])
def test_a_rate_or_a_momentum_without_an_edge_is_left_out(lr, momentum):
    """A rule or a scheduler may set them in the middle of a run, which a callback that only watches must not end."""

    class Sets(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 1:
                trainer.optimizers[0].param_groups[0].update(lr=lr, momentum=momentum)

    with pytest.warns(UserWarning, match=f"at step 2: the learning rate is {lr} and the momentum {momentum}"):
        _, trainer, rows = fit(StabilityMonitor(every_n_steps=1), Net(), Sets())
    assert trainer.global_step == 4
    assert [step for name, step in rows if name == "stability/trace"] == [0, 1]
