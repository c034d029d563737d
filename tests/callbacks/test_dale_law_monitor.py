import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_opt.callbacks import DaleLawMonitor, RunReport
from lightning_opt.callbacks._report_render import render_svg
from lightning_opt.callbacks.dale_law_monitor import weight_statistics

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
]
settings = {"DaleLawMonitor": {}}

INPUTS = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))


class Rows(Logger):
    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None):
        self.rows += [(step + 1, metrics)] if "dale/sign_flips" in metrics else []

    def log_hyperparams(self, *args, **kwargs):
        pass


class Multiplicative(torch.optim.SGD):
    """Keeps signs in groups that are not additive, as the exponentiated optimizers do."""

    def __init__(self, params, lr, additive=False, min_abs=1e-3):
        super().__init__(params, lr)
        for group in self.param_groups:
            group.setdefault("additive", additive)
            group.setdefault("min_abs", min_abs)

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if group["additive"]:
                    p -= group["lr"] * p.grad
                else:
                    p *= torch.exp(-group["lr"] * p.sign() * p.grad)
                    p.copy_(p.sign() * p.abs().clamp_min(group["min_abs"]))
        return loss


class Net(pl.LightningModule):
    def __init__(self, make) -> None:
        super().__init__()
        self.first, self.second, self.frozen = nn.Linear(6, 40), nn.Linear(40, 40), nn.Linear(6, 40)
        self.frozen.requires_grad_(False)
        self.make = make

    def training_step(self, batch, batch_idx):
        return (self.second(self.first(batch[0]).relu()) - self.frozen(batch[0])).square().mean()

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return self.make(self)


def sgd(net, lr=0.5):
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr)


def multiplicative(net, lr=0.5):
    return Multiplicative(
        [
            {"params": [net.first.weight]},
            {"params": [net.second.weight, net.first.bias, net.second.bias], "additive": True},
        ],
        lr,
    )


def fit(callbacks, model, ckpt_path=None, **options):
    defaults = {
        "max_epochs": 1,
        "log_every_n_steps": 4,
        "logger": Rows(),
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    trainer = pl.Trainer(**{**defaults, **options}, callbacks=callbacks)
    trainer.fit(model, DataLoader(TensorDataset(INPUTS), batch_size=4), ckpt_path=ckpt_path)
    return trainer


def test_values_of_the_logged_step_against_brute_force():
    model = Net(sgd)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = fit([DaleLawMonitor()], model)
    assert [step for step, _ in trainer.logger.rows] == [4, 8, 12]
    row = trainer.logger.rows[-1][1]
    assert row.keys() == {
        f"dale/{name}" for name in ("sign_flips", "frozen_fraction", "log_abs_mean", "log_abs_std", "ks_lognormal")
    } | {"epoch"}
    weights = {name: p.detach() for name, p in model.named_parameters() if name in ("first.weight", "second.weight")}
    flips = sum(int((p * before[name] < 0).sum()) for name, p in weights.items())
    assert row["dale/sign_flips"] == flips > 10
    logs = torch.cat([p.abs().double().log().flatten() for p in weights.values()])
    # means of 1840 float32 logarithms of size up to 10: 1840 half ulps of 5e-7, far less in a tree sum
    assert row["dale/log_abs_mean"] == pytest.approx(logs.mean().item(), abs=1e-5)
    assert row["dale/log_abs_std"] == pytest.approx(logs.std(correction=0).item(), abs=1e-5)
    assert row["dale/frozen_fraction"] == 0


def test_the_distance_is_scipys():
    generator = torch.Generator().manual_seed(1)
    for w in (torch.randn(30, 40, generator=generator), torch.randn(100, generator=generator).exp()):
        values = weight_statistics({"w": (w, w.sign().to(torch.int8), 0.0)})
        x = w.abs().log().double()
        z = ((x - x.mean()) / x.std(correction=0)).flatten().numpy()
        assert values["ks_lognormal"].item() == pytest.approx(stats.kstest(z, "norm").statistic, abs=1e-5)
    assert (
        values["ks_lognormal"] < 0.103
    )  # the second is log-normal: the 1% point of the Lilliefors test for 100 numbers


def test_tensors_count_by_their_size_and_frozen_weights_do_not():
    e = torch.e
    weights = {
        "a": (torch.tensor([e, -1 / e, 1e-9, 0.0]), torch.tensor([1, 1, 1, 1], dtype=torch.int8), 1e-8),
        "b": (torch.tensor([e**2] * 6), torch.tensor([1, -1, -1, 0, 1, 1], dtype=torch.int8), 0.0),
    }
    values = weight_statistics(weights)
    assert values["sign_flips"] == 1 + 2
    assert values["frozen_fraction"] == pytest.approx(2 / 10)
    assert values["log_abs_mean"] == pytest.approx((1 - 1 + 6 * 2) / 8)
    assert values["log_abs_std"] == pytest.approx(((0.5**2 + 2.5**2 + 6 * 0.5**2) / 8) ** 0.5)
    # a: two points at -1 and 1 standard deviations, distance 1/2 - Phi(-1); b: all at the mean, distance 1/2
    assert values["ks_lognormal"] == pytest.approx((2 * 0.34134 + 6 * 0.5) / 8, abs=1e-5)


@pytest.mark.parametrize("dead", [0.0, 1e-9])
def test_a_net_of_dead_weights_gives_numbers(dead):
    values = weight_statistics({"w": (torch.full((3, 3), dead), torch.ones(3, 3, dtype=torch.int8), 1e-8)})
    assert values["frozen_fraction"] == 1
    assert all(torch.isfinite(value) for value in values.values())


def test_exponentiated_groups_are_watched_and_keep_their_signs():
    model = Net(multiplicative)
    before = model.first.weight.detach().clone()
    trainer = fit([DaleLawMonitor()], model, max_epochs=8)
    assert not torch.equal(before, model.first.weight)
    assert all(row["dale/sign_flips"] == 0 for _, row in trainer.logger.rows)
    logs = model.first.weight.detach().abs()
    frozen = logs <= torch.tensor(1e-3)
    assert trainer.logger.rows[-1][1]["dale/frozen_fraction"] == pytest.approx(frozen.float().mean().item())
    assert trainer.logger.rows[-1][1]["dale/log_abs_mean"] == pytest.approx(logs[~frozen].log().mean().item(), abs=1e-5)


def test_signs_are_those_of_the_beginning_after_a_resume_and_a_test(tmp_path):
    monitor, model = DaleLawMonitor(), Net(sgd)
    start = model.first.weight.detach().sign()
    whole = fit([monitor, ModelCheckpoint(tmp_path, every_n_train_steps=12, save_top_k=-1)], model, max_epochs=2)
    resumed_monitor = DaleLawMonitor()
    (path,) = tmp_path.glob("*step=12.ckpt")
    with pytest.warns(match="callbacks used to create"):
        resumed = fit([resumed_monitor], Net(sgd), path, max_epochs=2)
    assert resumed.logger.rows == whole.logger.rows[3:]
    assert torch.equal(resumed_monitor._signs["first.weight"], start.to(torch.int8))
    with pytest.warns(match="callbacks used to create"):
        resumed.test(resumed.lightning_module, DataLoader(INPUTS), ckpt_path=path, verbose=False)
    again = Net(sgd)
    beginning = again.first.weight.detach().sign().to(torch.int8)
    fit([monitor], again)  # another run has a beginning of its own
    assert torch.equal(monitor._signs["first.weight"], beginning)


def test_the_report_shows_the_weights(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("lightning_opt.callbacks.run_report.render_png", lambda panels, *_: shown.extend(panels))
    fit([RunReport(), DaleLawMonitor()], Net(sgd), logger=False, default_root_dir=tmp_path)
    (panel,) = [panel for panel in shown if "|w|" in panel.title]
    assert sum(panel.draw.counts) * (panel.draw.edges[1] - panel.draw.edges[0]) == pytest.approx(1, abs=1e-5)
    assert "normal<" in render_svg(panel)[0]
    assert DaleLawMonitor().report_panels() == []


def test_no_weights_to_watch_is_said():
    with pytest.warns(match="DaleLawMonitor finds no weights"):
        fit([DaleLawMonitor()], Net(lambda net: Multiplicative(net.second.parameters(), 0.1, additive=True)))
