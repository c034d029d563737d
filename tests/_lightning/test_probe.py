"""A probe of the loss leaves nothing behind in a module that writes to everything it can reach."""

import collections
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassPrecision, MulticlassRecall

from lightning_opt._lightning.probe import check_can_probe, probing

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def data():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(24, 4, generator=generator)
    return inputs, (inputs[:, 0] > 0).long()


class Rows(pl.loggers.logger.Logger):
    name, version = "rows", 0

    def __init__(self):
        super().__init__()
        self.rows, self.shown = [], []

    @property
    def experiment(self):
        return self

    def show(self, text):
        self.shown.append(text)

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass


class Writes(pl.LightningModule):
    """Writes to whatever a training step can write to."""

    def __init__(self, compiled=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            body = nn.Sequential(
                nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)),
                nn.BatchNorm1d(6),
                nn.Dropout(0.2),
                nn.Tanh(),
                nn.Linear(6, 2),
            )
        self.net = torch.compile(body, backend="eager") if compiled else body
        self.accuracy = MulticlassAccuracy(2)
        self.auroc = MulticlassAUROC(2)  # gathers lists
        self.mean = MeanMetric()
        self.group = MetricCollection([MulticlassPrecision(2), MulticlassRecall(2)])  # shares states
        self.register_buffer("seen", torch.zeros(()))
        self.count, self.losses, self.nested = 0, [], {"a": [], "n": collections.Counter()}
        self.moving = torch.zeros(2)
        self.generator = torch.Generator().manual_seed(1)
        self.numpy = np.random.default_rng(2)

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        inputs = inputs + 0.01 * torch.randn(inputs.shape, generator=self.generator)
        inputs = inputs * (1 + 0.01 * float(self.numpy.normal() + np.random.normal() + random.gauss(0, 1)))
        logits = self.net(inputs)
        loss = nn.functional.cross_entropy(logits, labels)
        self.seen += 1
        self.count += 1
        self.losses.append(float(loss.detach()))
        self.nested["a"].append(batch_idx)
        self.nested["n"]["steps"] += 1
        self.moving.mul_(0.9).add_(logits.detach().mean(0))
        self.mean.update(loss.detach())
        self.auroc.update(logits.detach(), labels)
        self.group.update(logits.detach(), labels)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"accuracy": self.accuracy}, on_step=True, on_epoch=True)
        self.accuracy(logits.detach(), labels)
        self.logger.experiment.show(f"{self.global_step}")
        return {"loss": loss, "logits": logits.detach()}

    def on_train_epoch_end(self):
        self.log("mean", self.mean.compute())
        self.log("auroc", self.auroc.compute())
        self.log_dict(self.group.compute())
        for metric in (self.mean, self.auroc, self.group):
            metric.reset()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Probes(pl.Callback):
    def __init__(self):
        self.norms = []

    def setup(self, trainer, module, stage):
        check_can_probe(trainer, module, "Probes")

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        parameters = [p for p in module.parameters() if p.requires_grad]
        with probing(trainer, module, batch_idx=batch_idx) as loss:
            for _ in range(2):
                gradients = torch.autograd.grad(loss(batch), parameters, create_graph=True)
                total = sum(g.square().sum() for g in gradients)
                second = torch.autograd.grad(total, parameters, allow_unused=True)
        self.norms.append(float(sum(g.norm() for g in second if g is not None)))


def fit(*callbacks, model=None, **options):
    model = model or Writes()
    logger = Rows()
    trainer = pl.Trainer(
        **{
            "max_epochs": 2,
            "log_every_n_steps": 1,
            "logger": logger,
            "accelerator": "cpu",
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        },
        callbacks=list(callbacks),
    )
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    trainer.fit(model, DataLoader(TensorDataset(*data()), 8))
    return model, logger, trainer


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_everything_is_as_without_it(accumulate, compiled):
    without, rows, plain = fit(model=Writes(compiled), accumulate_grad_batches=accumulate)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    probe = Probes()
    with_, probed_rows, trainer = fit(probe, model=Writes(compiled), accumulate_grad_batches=accumulate)
    assert len(probe.norms) == 6
    assert all(np.isfinite(probe.norms))
    assert min(probe.norms) > 0
    assert_equal(with_.state_dict(), without.state_dict())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    assert probed_rows.rows == rows.rows
    assert probed_rows.shown == rows.shown
    for name in ("count", "losses", "nested"):
        assert getattr(with_, name) == getattr(without, name), name
    assert torch.equal(with_.moving, without.moving)
    assert torch.equal(with_.generator.get_state(), without.generator.get_state())
    assert with_.numpy.bit_generator.state == without.numpy.bit_generator.state
    assert trainer.global_step == plain.global_step
    assert "log" not in vars(with_)
    momentum = [s["momentum_buffer"] for s in trainer.optimizers[0].state.values()]
    assert all(
        torch.equal(m, s["momentum_buffer"]) for m, s in zip(momentum, plain.optimizers[0].state.values(), strict=True)
    )


def test_an_error_inside_is_cleaned_up_too():
    class Fails(Probes):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.module = module
            before = module.moving
            try:
                with probing(trainer, module) as loss:
                    loss(batch)
                    raise KeyError("inside")
            except KeyError:
                assert module.moving is before
                assert module.count == batch_idx + 3 * trainer.current_epoch
                assert "log" not in vars(module)
                assert isinstance(trainer.logger, Rows)

    fit(Fails())


def test_a_loss_function_of_the_users_own_and_manual_optimization():
    class Manual(Writes):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = self.net(batch[0]).square().mean()
            self.manual_backward(loss)
            optimizer.step()

        def on_train_epoch_end(self):
            pass

    seen = []

    class Asks(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            check_can_probe(trainer, module, "Asks", loss_fn)
            with probing(trainer, module, loss_fn) as loss:
                seen.append(loss(batch))

    def loss_fn(module, batch):
        return module.net(batch[0]).square().mean()

    fit(Asks(), model=Manual())
    assert all(loss.requires_grad for loss in seen)
    with pytest.raises(MisconfigurationException, match="optimizes by hand; give loss_fn"):
        fit(Probes(), model=Manual())


def test_a_skipped_batch_gives_nan_with_a_gradient():
    class Skips(Writes):
        def training_step(self, batch, batch_idx):
            return None if self.count == 0 else super().training_step(batch, batch_idx)

    module = Skips()

    class Asks(pl.Callback):
        def on_train_start(self, trainer, module):
            with probing(trainer, module) as loss:
                value = loss(data())
                (gradient, *_) = torch.autograd.grad(value, [next(module.parameters())])
            assert value.isnan()
            assert gradient.isnan().all()
            module.count = 1

    fit(Asks(), model=module)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_what_cannot_be_probed_is_refused():
    class Iterates(Writes):
        def training_step(self, dataloader_iter):
            raise AssertionError("must not be reached")

    with pytest.raises(MisconfigurationException, match="Probes has no batch to give"):
        fit(Probes(), model=Iterates())
