import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_opt.callbacks import RunReport, StabilityBooster
from lightning_opt.curvature.stability import Stability

settings = {
    "StabilityBooster": [{"every_n_steps": 2}, {"every_n_steps": 1, "quantity": "rho_top", "trace": "fisher_mc"}]
}

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Line(pl.LightningModule):
    """The loss h/2 w^2 + c(step), so that sharpness and loss are what the test says."""

    def __init__(self, sharpness, lr, losses=None):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
        self.sharpness, self.lr, self.losses = sharpness, lr, losses
        self.rates = []

    def training_step(self, batch, batch_idx):
        step = self.trainer.global_step
        loss = self.sharpness * self.w.square().sum() / 2
        return loss if self.losses is None else loss - loss.detach() + self.losses[step]

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def fit(booster, module, *callbacks, steps=8, **options):
    trainer = pl.Trainer(
        **{
            "max_epochs": 1,
            "logger": False,
            "accelerator": "cpu",
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        },
        callbacks=[booster, *callbacks],
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.zeros(steps, 1)), 1))
    return module.rates


def test_the_rate_grows_while_the_loss_falls_and_stops_at_the_target():
    booster = StabilityBooster(every_n_steps=1, quantity="rho_top", growth=1.5, target=0.8)
    rates = fit(booster, Line(sharpness=2.0, lr=0.2, losses=[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]))
    # the first loss to compare is there in front of the third step; 0.675 is beyond... 0.2 * 1.5^4 > 0.8
    assert rates == pytest.approx(
        [0.2, 0.2, 0.3, 0.45, 0.675, 1.0125 * 1.0, 0.7 * 1.0125, 0.7 * 1.0125 * 1.5], rel=1e-5
    )


def test_the_rate_stays_while_the_loss_does_not_fall():
    booster = StabilityBooster(every_n_steps=1, quantity="rho_top", growth=1.5)
    rates = fit(booster, Line(2.0, 0.2, losses=[1.0, 2.0, 2.0, 3.0, 2.5, 2.5, 9.0, 9.0]))
    assert rates == pytest.approx([0.2] * 5 + [0.3] * 3)


def test_the_rate_shrinks_beyond_the_edge_and_growth_has_a_limit():
    assert fit(StabilityBooster(every_n_steps=4, quantity="rho_top"), Line(2.0, 1.5)) == pytest.approx(
        [1.05] * 4 + [1.05 * 0.7] * 4
    )
    falling = [float(9 - i) for i in range(8)]
    booster = StabilityBooster(every_n_steps=1, quantity="rho_top", growth=2.0, lr_max=0.5)
    assert max(fit(booster, Line(1.0, 0.2, falling))) == pytest.approx(0.5)
    assert max(fit(StabilityBooster(every_n_steps=1, lr_max=0.01), Line(1.0, 0.2, falling))) == pytest.approx(0.2)


def test_a_rate_of_zero_stays():
    falling = [float(9 - i) for i in range(8)]
    assert fit(StabilityBooster(every_n_steps=1, lr_max=0.01), Line(1.0, 0.0, falling)) == [0.0] * 8


def test_the_quantity_counts_the_noise_of_batches():
    """One sample of a stream: the trace counts in full, so the edge of rho_mix is where that of rho_top is."""
    booster = StabilityBooster(every_n_steps=1, dataset_size="infinite")
    assert fit(booster, Line(2.0, 1.5))[0] == pytest.approx(1.05)


@pytest.mark.parametrize("beyond", ["rho_mix", "rho_tr", "rho_top"])
@pytest.mark.parametrize("quantity", ["rho_mix", "rho_tr", "rho_top"])
def test_the_quantity_is_the_one_that_was_asked_for(quantity, beyond, monkeypatch):
    """On a line all three are one number: here one of them alone is beyond the edge."""
    for name in ("rho_mix", "rho_tr", "rho_top"):
        value = 1.2 if name == beyond else 0.9
        monkeypatch.setattr(Stability, name, property(lambda self, value=value: value))
    rates = fit(StabilityBooster(every_n_steps=1, quantity=quantity, target=0.8), Line(2.0, 0.5), steps=1)
    assert rates == pytest.approx([0.35 if quantity == beyond else 0.5])


def test_the_report_shows_the_edge(tmp_path):
    report = RunReport()
    fit(StabilityBooster(every_n_steps=1), Line(1.0, 0.2), report, default_root_dir=tmp_path)
    assert "Sharpness and the edge of stability" in report.path.read_text()


def test_bad_input_is_refused():
    class Manual(Line):
        automatic_optimization = False

        def __init__(self, *args):
            super().__init__(*args)
            self.automatic_optimization = False

    class Scheduled(Line):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    with pytest.raises(MisconfigurationException, match="needs automatic optimization"):
        fit(StabilityBooster(), Manual(1.0, 0.1))
    with pytest.raises(MisconfigurationException, match="StabilityBooster and the scheduler StepLR"):
        fit(StabilityBooster(), Scheduled(1.0, 0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1.5}, r"target must be in \(0, 1\]"),
        ({"growth": 1.0}, "growth must be > 1"),
        ({"shrink": 1.0}, r"shrink must be in \(0, 1\)"),
        ({"quantity": "rho"}, "quantity must be one of"),
        ({"lr_max": 0.0}, "lr_max must be > 0"),
        ({"num_probes": 1}, "num_probes must be >= 2"),
    ],
)
def test_wrong_values(options, message):
    with pytest.raises(ValueError, match=message):
        StabilityBooster(**options)
