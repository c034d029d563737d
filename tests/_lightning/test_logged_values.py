import pickle

import lightning.pytorch as pl
import pytest
import torch
from torchmetrics import MeanMetric

from lightning_opt._lightning.logged_values import load_logged_values, logged_values_state

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
]


class Logs(pl.LightningModule):
    """Logs in every way; between two batches, what was gathered may be taken through a pickle into an empty store."""

    def __init__(self, swap_after=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.mean = MeanMetric()
        self.swap_after, self.seen = swap_after, []

    def training_step(self, batch, batch_idx):
        value = batch.sum() + 0.5
        for reduce_fx in ("mean", "sum", max, torch.min, sum):
            name = reduce_fx if isinstance(reduce_fx, str) else f"{reduce_fx.__module__}.{reduce_fx.__name__}"
            self.log(name, value, on_step=False, on_epoch=True, reduce_fx=reduce_fx)
        self.log("both", value, on_step=True, on_epoch=True, prog_bar=True, batch_size=3)
        self.log("step", value.double())
        self.mean(value)
        self.log("metric", self.mean, on_step=True, on_epoch=True)
        if batch_idx % 2:
            self.log("sometimes", value, on_step=False, on_epoch=True)
        return self.weight * 0

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx - 1 == self.swap_after:
            state = pickle.loads(pickle.dumps(logged_values_state(self.trainer)))
            before = dict(self.trainer.callback_metrics)
            self.trainer.fit_loop.epoch_loop._results.clear()
            self.trainer._logger_connector.reset_metrics()
            load_logged_values(self.trainer, state, epoch_ended=False)
            assert self.trainer.callback_metrics == before

    def on_train_batch_end(self, *_):
        self.seen.append({k: v.item() for k, v in self.trainer.callback_metrics.items()})

    def on_train_end(self):
        self.seen.append({k: v.item() for k, v in self.trainer.callback_metrics.items()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(folder, swap_after):
    trainer = pl.Trainer(
        max_epochs=2,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
    module = Logs(swap_after)
    trainer.fit(module, torch.utils.data.DataLoader(torch.arange(8.0), batch_size=2))
    return module.seen


@pytest.mark.parametrize("swap_after", [0, 2])
def test_values_go_on_as_if_nothing_had_been(tmp_path, swap_after):
    expected = run(tmp_path, None)
    assert len(expected[-1]) == 13
    assert expected[-1]["both_epoch"] == 7.5  # mean of 1.5, 5.5, 9.5, 13.5
    assert run(tmp_path, swap_after) == expected
