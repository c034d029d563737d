import time
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_opt.callbacks import ScheduleCheck
from lightning_opt.schedules import LastIterateLR, LinearDecayLR, SampleBasedLR

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
]

settings = {"ScheduleCheck": {}}
INPUTS = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))


class Net(pl.LightningModule):
    def __init__(self, schedule, interval="step", frequency=1):
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.schedule, self.interval, self.frequency = schedule, interval, frequency

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = {"scheduler": self.schedule(optimizer), "interval": self.interval, "frequency": self.frequency}
        return [optimizer], [scheduler]


def fit(net, *callbacks, data=None, **options):
    """Three epochs of six steps; the warnings of the callback."""
    options = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False} | options
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(callbacks=[ScheduleCheck(), *callbacks], **quiet, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(net, DataLoader(TensorDataset(INPUTS), batch_size=4) if data is None else data)
    return [str(w.message) for w in caught if "schedule" in str(w.message)]


def cosine(length):
    return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length)


@pytest.mark.parametrize(
    "net",
    [
        Net(lambda o: LinearDecayLR(o, 18)),
        Net(lambda o: LinearDecayLR(o, 6), frequency=3),
        Net(cosine(18)),
        Net(cosine(3), "epoch"),
        Net(cosine(6)),  # of torch: it goes up again, which may be meant
        Net(lambda o: torch.optim.lr_scheduler.StepLR(o, 4)),
    ],
)
def test_no_word_where_all_is_well(net):
    assert fit(net) == []
    assert fit(net, fast_dev_run=True) == []


def test_a_schedule_longer_than_the_run():
    (text,) = fit(Net(lambda o: LinearDecayLR(o, 40)))
    assert "LinearDecayLR has total_steps=40 and is stepped every optimizer step, but the run will have 18" in text
    (text,) = fit(Net(cosine(18), "epoch"))
    assert "T_max=18 and is stepped every epoch, but the run will have 3" in text
    assert "is interval='step' meant" in text


def test_a_schedule_shorter_than_the_run():
    (text,) = fit(Net(lambda o: LinearDecayLR(o, 10, extend="hold")))
    assert "total_steps=10" in text
    assert "its schedule ends before the run does" in text


class Stops(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= 9


class SlowBatches(Callback):
    def on_train_batch_end(self, trainer, *_):
        time.sleep(0.6)


@pytest.mark.parametrize(
    ("callback", "steps", "left"),
    [(Stops(), 9, "50%"), (EarlyStopping("loss", patience=0, divergence_threshold=-1.0), 6, "67%")],
)
def test_a_run_that_is_stopped_early(callback, steps, left):
    (text,) = fit(Net(lambda o: LinearDecayLR(o, 18)), callback)
    assert f"the run ended behind {steps} optimizer steps" in text
    assert f"the learning rate is still {left} of its base value" in text


def test_max_steps_and_max_time():
    (text,) = fit(Net(lambda o: LinearDecayLR(o, 18)), max_steps=5)
    assert "total_steps=18 and is stepped every optimizer step, but the run will have 5" in text  # once, at the start
    (text,) = fit(Net(lambda o: LinearDecayLR(o, 18)), SlowBatches(), max_time={"seconds": 1})
    assert "the run ended behind 2 optimizer steps" in text


def test_a_run_whose_end_is_not_known():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(INPUTS.split(4)[:2])

    data = DataLoader(Stream(), batch_size=None)
    net = Net(lambda o: LinearDecayLR(o, 40))
    net.training_step = lambda batch, batch_idx: net.net(batch).square().mean()
    (text,) = fit(net, data=data)
    assert "the run ended behind 6 optimizer steps" in text


@pytest.mark.parametrize("schedule", [lambda o: SampleBasedLR(o, 4, 72), lambda o: LastIterateLR(o, "sqrt")])
def test_a_schedule_in_steps_without_an_end_that_is_stepped_every_epoch(schedule):
    (text,) = fit(Net(schedule, "epoch"))
    assert "counts optimizer steps and is stepped every epoch; is interval='step' meant" in text
    assert fit(Net(schedule)) == []


def test_schedulers_and_rates_that_nothing_is_known_of():
    class Own:
        """As the Trainer takes them where the module has a hook of its own for them."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    class Steps(Net):
        def lr_scheduler_step(self, scheduler, metric):
            pass

    assert fit(Steps(Own), Stops()) == []

    def from_zero(optimizer):
        optimizer.param_groups[0]["lr"] = 0.0
        return LinearDecayLR(optimizer, 18)

    assert fit(Net(from_zero), Stops()) == []  # there is no share of nothing
