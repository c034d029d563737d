import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_opt import optim
from lightning_opt.callbacks import OptimizerMonitor, RunReport

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
]

settings = {"OptimizerMonitor": [{}, {"every_n_steps": 4}]}

INPUTS = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))


class Rows(Logger):
    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step + 1, metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass

    def series(self, name):
        return {step: row[name] for step, row in self.rows if name in row}


class Net(pl.LightningModule):
    def __init__(self, make=lambda p: torch.optim.SGD(p, lr=0.1)) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.make = make

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).square().mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return self.make(self.parameters())


class Telling(torch.optim.SGD):
    """An optimizer of this package in miniature."""

    def __init__(self, params, **kwargs):
        super().__init__(params, **kwargs)
        self.hooks, self.losses, self.calls = [], [], 0

    def register_update_pre_hook(self, hook):
        self.hooks.append(hook)
        return lambda: self.hooks.remove(hook)

    def statistics(self, loss=None):
        self.calls += 1
        self.losses.append(loss.item())
        return {"first_weight": self.param_groups[0]["params"][0].detach()[0, 0].clone()}

    def diagnose(self, statistics, step):
        assert statistics.keys() == {"first_weight", "grad_norm", "nonfinite_gradients", "update_ratio"}
        return "odd step" if step % 2 else "even step"

    def check_clipping(self, algorithm):
        return f"{algorithm} clipping is bad" if algorithm == "value" else None

    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for hook in list(self.hooks):
            hook(self)
        super().step()
        return loss


class Recorder(Callback):
    """Weights and clipped gradients of every step, read by brute force."""

    def __init__(self):
        self.weights, self.norms, self.losses = [], [], []

    def on_train_batch_start(self, trainer, module, *_):
        self.weights.append([p.detach().clone() for p in module.parameters()])

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.norms.append(nn.utils.get_total_norm([p.grad for p in module.parameters()]).item())

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.losses.append(outputs["loss"].item())

    def ratio(self, step, after):
        old, new = self.weights[step - 1], after
        change = math.sqrt(sum((n - o).square().sum().item() for o, n in zip(old, new, strict=True)))
        return change / math.sqrt(sum(o.square().sum().item() for o in old))


def fit(callbacks, model, logger=None, **options):
    defaults = {
        "max_epochs": 1,
        "log_every_n_steps": 5,
        "logger": Rows() if logger is None else logger,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    trainer = pl.Trainer(**{**defaults, **options}, callbacks=callbacks)
    trainer.fit(model, DataLoader(TensorDataset(INPUTS), batch_size=4))
    return trainer


def test_values_of_any_optimizer_against_brute_force():
    recorder, model = Recorder(), Net()
    trainer = fit([OptimizerMonitor(), recorder], model)
    for step in (5, 10):
        (row,) = [row for s, row in trainer.logger.rows if s == step and "opt/grad_norm" in row]
        assert row.keys() == {"opt/grad_norm", "opt/nonfinite_gradients", "opt/update_ratio", "epoch"}
        # sums of 15 float32 products in another order: 15 half ulps of 6e-8 at most
        assert row["opt/grad_norm"] == pytest.approx(recorder.norms[step - 1], rel=1e-6)
        assert row["opt/update_ratio"] == pytest.approx(recorder.ratio(step, recorder.weights[step]), rel=1e-5)
        assert row["opt/nonfinite_gradients"] == 0
    assert trainer.logger.series("opt/grad_norm").keys() == {5, 10}
    assert trainer.callback_metrics["opt/grad_norm"] == trainer.logger.series("opt/grad_norm")[10]
    assert trainer.optimizers[0]._optimizer_step_post_hooks == {}


@pytest.mark.filterwarnings("ignore:(odd|even) step")
def test_gradients_are_those_of_the_update_where_the_optimizer_shows_them():
    clipped, unclipped = Recorder(), Recorder()
    ours = fit([OptimizerMonitor(), clipped], Net(lambda p: Telling(p, lr=0.1)), gradient_clip_val=0.01)
    torch_ = fit([OptimizerMonitor(), unclipped], Net(), gradient_clip_val=0.01)
    assert ours.logger.series("opt/grad_norm")[5] == pytest.approx(0.01, rel=1e-3)  # clipping adds 1e-6 to the norm
    assert torch_.logger.series("opt/grad_norm")[5] == pytest.approx(unclipped.norms[4], rel=1e-6)
    assert unclipped.norms[4] > 0.02


@pytest.mark.parametrize("accumulate", [1, 3])
def test_statistics_are_asked_on_logged_steps_only_with_the_loss_of_the_step(accumulate):
    recorder, model = Recorder(), Net(lambda p: Telling(p, lr=0.1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(
            [OptimizerMonitor(every_n_steps=3), recorder],
            model,
            accumulate_grad_batches=accumulate,
            log_every_n_steps=2,
        )
    steps = [3, 6, 9, 12] if accumulate == 1 else [3]
    optimizer = trainer.optimizers[0]
    assert optimizer.calls == len(steps)
    assert optimizer.hooks == []
    firsts = trainer.logger.series("opt/first_weight")
    assert list(firsts) == steps
    for step in steps:  # before the update, and not the value of another step
        assert firsts[step] == recorder.weights[(step - 1) * accumulate][0][0, 0].item()
    means = [sum(recorder.losses[(s - 1) * accumulate : s * accumulate]) for s in steps]
    assert optimizer.losses == pytest.approx(means, rel=1e-6)
    texts = [str(w.message) for w in caught]
    assert texts.count("odd step") == 1
    assert texts.count("even step") == (accumulate == 1)


def test_nothing_is_computed_where_nobody_looks():
    model = Net(lambda p: Telling(p, lr=0.1))
    assert fit([OptimizerMonitor()], model, logger=False).optimizers[0].calls == 0


@pytest.mark.filterwarnings("ignore:(odd|even) step")
def test_a_run_report_looks_without_a_logger(tmp_path):
    report = RunReport()
    trainer = fit(
        [OptimizerMonitor(), report], Net(lambda p: Telling(p, lr=0.1)), logger=False, default_root_dir=tmp_path
    )
    assert trainer.optimizers[0].calls == 2
    assert report._metrics["opt/first_weight"].points()[0] == [5, 10]


def test_several_optimizers_have_names():
    class Two(Net):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.other = nn.Linear(4, 3)

        def training_step(self, batch, batch_idx):
            for optimizer, net in zip(self.optimizers(), (self.net, self.other, self.other), strict=True):
                optimizer.zero_grad()
                self.manual_backward(net(batch[0]).square().mean())
                optimizer.step()

        def configure_optimizers(self):
            return [
                torch.optim.SGD(self.net.parameters(), lr=0.1),
                torch.optim.Adam(self.other.parameters()),
                torch.optim.SGD([self.other.weight], lr=0.0),
            ]

    trainer = fit([OptimizerMonitor()], Two())
    row = next(row for step, row in trainer.logger.rows if step == 5)
    assert {name.rpartition("/")[0] for name in row} == {"opt/SGD", "opt/Adam", "opt/SGD-1", ""}
    assert row["opt/SGD/update_ratio"] > 0
    assert row["opt/SGD-1/update_ratio"] == 0


def test_gradients_that_are_not_finite_are_counted_and_told_once():
    class Broken(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("nan") if self.global_step >= 4 else 1.0)

    with pytest.warns(UserWarning, match="15 gradient elements of SGD are not finite at step 5") as caught:
        trainer = fit([OptimizerMonitor()], Broken())
    assert len([w for w in caught if "not finite" in str(w.message)]) == 1
    assert trainer.logger.series("opt/nonfinite_gradients") == {5: 15, 10: 15}


def test_an_early_stop_logs_no_value_of_another_step():
    stop = EarlyStopping("train/loss", patience=0, mode="max", check_on_train_epoch_end=True)
    recorder = Recorder()
    trainer = fit([OptimizerMonitor(every_n_steps=1), recorder, stop], Net(), max_epochs=9)
    norms = trainer.logger.series("opt/grad_norm")
    assert list(norms.values()) == pytest.approx(recorder.norms, rel=1e-6)


def test_a_skipped_step_leaves_nothing_behind():
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            return None if self.global_step == 4 else super().training_step(batch, batch_idx)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = fit([OptimizerMonitor()], Skips())
    assert trainer.logger.series("opt/grad_norm").keys() == {10}


def test_an_error_removes_the_hooks():
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if self.global_step == 4:
                raise ValueError("stop")
            return super().training_step(batch, batch_idx)

    made = []
    model = Fails(lambda p: made.append(Telling(p, lr=0.1)) or made[0])
    with pytest.raises(ValueError, match="stop"):
        fit([OptimizerMonitor()], model)
    assert made[0].hooks == []
    assert made[0]._optimizer_step_post_hooks == {}


def test_clipping_by_value_is_warned_about_where_it_harms():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(
            [OptimizerMonitor()],
            Net(lambda p: Telling(p, lr=0.1)),
            fast_dev_run=1,
            gradient_clip_val=1.0,
            gradient_clip_algorithm="value",
        )
    assert "value clipping is bad" in [str(w.message) for w in caught]


@pytest.mark.parametrize("value", [0, -3])
def test_wrong_values(value):
    with pytest.raises(ValueError, match=f"every_n_steps must be >= 1 and finite, got {value}"):
        OptimizerMonitor(every_n_steps=value)


def test_statistics_of_our_optimizers_arrive():
    expected = {
        optim.AdaBelief: {"floor_fraction", "median_step"},
        optim.DiffGrad: {"xi_mean", "xi_p95"},
        optim.Lion: {"phase1_dist", "at_bound_fraction", "stationarity", "lyapunov"},
    }
    for cls, names in expected.items():
        options = {"weight_decay": 0.1} if cls is optim.Lion else {}
        model = Net(lambda p, cls=cls, options=options: cls(p, lr=1e-3, **options))
        trainer = fit([OptimizerMonitor(every_n_steps=4)], model)
        for name in names:
            series = trainer.logger.series(f"opt/{name}")
            assert series.keys() == {4, 8, 12}, name
            assert all(math.isfinite(value) for value in series.values()), name
    assert model.net.weight.abs().max() < 10  # Lion with weight decay 0.1 stays in its box, so lyapunov is finite


def test_diffgrad_says_that_its_friction_is_saturated():
    class Flat(Net):
        def training_step(self, batch, batch_idx):
            return 1e-3 * super().training_step(batch, batch_idx)  # gradients, and so their differences, are small

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = Flat(lambda p: optim.DiffGrad(p, lr=1e-4))
        trainer = fit([OptimizerMonitor()], model, max_epochs=10, log_every_n_steps=1)
    assert max(trainer.logger.series("opt/xi_mean").values()) < 0.51
    assert len([w for w in caught if "friction" in str(w.message)]) == 1
