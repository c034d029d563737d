import copy
import math
import os
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_opt.callbacks import LanczosLRLearner, ResumeState, RunReport
from lightning_opt.callbacks import lanczos_lr_learner as learner_module
from lightning_opt.callbacks._refresh_schedule import DENSE, RefreshSchedule, refreshes
from lightning_opt.curvature import step_rule
from lightning_opt.data import ResumableLoader
from lightning_opt.testing._ranks import on_two_ranks

settings = {
    "LanczosLRLearner": [
        {},
        {"decay": "linear", "refresh_every_n_steps": 3, "rule": "polyak", "mu": "min", "start": "optimizer"},
        {"rule": "ssgdmn", "refresh_every_n_epochs": 1, "curvature_samples": 3, "products": "finite_difference"},
    ]
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:LanczosLRLearner\\(rule='nesterov'\\) is for"),
]


def sgd(lr=0.05, **options):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, **{"momentum": 0.9, "nesterov": True, **options})


def data(n=32):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, 5, generator=generator)
    return inputs, (inputs @ torch.randn(5, 3, generator=generator)).argmax(dim=1)


class Net(pl.LightningModule):
    """A classifier whose loss is multiplied by ``scale``."""

    def __init__(self, make=None, scale=1.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        self.make, self.scale = make or sgd(), scale
        self.rates = []

    def training_step(self, batch, batch_idx):
        return self.scale * nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_before_optimizer_step(self, optimizer):
        self.rates.append([float(group["lr"]) for group in optimizer.param_groups])

    def configure_optimizers(self):
        return self.make(self.parameters())


class Quadratic(pl.LightningModule):
    """1/2 sum of h_i w_i^2, whatever the batch."""

    def __init__(self, curvature, lr=1e-3):
        super().__init__()
        self.register_buffer("curvature", torch.tensor(curvature, dtype=torch.float64))
        self.w = nn.Parameter(torch.ones(len(curvature), dtype=torch.float64))
        self.lr, self.sizes = lr, []

    def training_step(self, batch, batch_idx):
        return (self.curvature * self.w.square()).sum() / 2

    def on_train_batch_end(self, *_):
        self.sizes.append(self.w.detach().norm().item())

    def configure_optimizers(self):
        return torch.optim.SGD([self.w], lr=self.lr)


def fit(learner, module=None, *callbacks, loader=None, ckpt_path=None, **options):
    trainer = pl.Trainer(
        **{
            "max_epochs": 2,
            "logger": False,
            "accelerator": "cpu",
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        },
        callbacks=[learner, *callbacks],
    )
    module = module or Net()
    if loader is None:
        loader = ResumableLoader(TensorDataset(*data()), 4, shuffle=True, seed=0)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return module, trainer


def test_a_quadratic_is_known_exactly_and_polyak_contracts_as_it_should():
    learner = LanczosLRLearner(rule="polyak", mu="min", start="optimizer", growth=math.inf, num_steps=4)
    module, trainer = fit(learner, Quadratic([1.0, 4.0, 9.0, 100.0]), max_epochs=40)
    (sharpness, mu), weights = (max(learner._spectrum[0]), min(learner._spectrum[0])), learner._spectrum[1]
    assert sharpness == pytest.approx(100.0, rel=1e-6)
    assert mu == pytest.approx(1.0, rel=1e-6)
    assert sum(weights) == pytest.approx(1.0)
    expected = step_rule("polyak", 100.0, 1.0)
    group = trainer.optimizers[0].param_groups[0]
    assert group["lr"] == pytest.approx(expected.lr, rel=1e-6)
    assert group["momentum"] == pytest.approx(expected.momentum, rel=1e-6)
    # (sqrt k - 1) / (sqrt k + 1) = 9/11 a step, times a factor that grows like the step count at double roots
    observed = (module.sizes[-1] / module.sizes[100]) ** (1 / (len(module.sizes) - 101))
    assert observed == pytest.approx(9 / 11, abs=0.01)


def test_the_rate_that_the_optimizer_was_given_does_not_matter():
    small, _ = fit(LanczosLRLearner(), Net(sgd(lr=1e-6)))
    large, _ = fit(LanczosLRLearner(), Net(sgd(lr=1e6)))
    assert small.rates == large.rates
    for a, b in zip(small.parameters(), large.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", ["effective", "nesterov", "polyak", "gd"])
def test_the_scale_of_the_loss_does_not_matter(rule):
    """A power of two scales every number exactly, and one of four their roots, so bit for bit."""
    plain, _ = fit(LanczosLRLearner(rule=rule, refresh_every_n_steps=3))
    large, _ = fit(LanczosLRLearner(rule=rule, refresh_every_n_steps=3), Net(scale=16.0))
    assert large.rates == [[rate / 16 for rate in step] for step in plain.rates]
    for a, b in zip(plain.parameters(), large.parameters(), strict=True):
        assert torch.equal(a, b)


def test_growth_is_limited_by_doublings_of_the_steps():
    learner = LanczosLRLearner(refresh_every_n_steps=1)
    fit(learner)
    steps, values = learner._curves["lr"].points()
    betas = learner._curves["momentum"].points()[1]
    effective = [lr / (1 - beta) for lr, beta in zip(values, betas, strict=True)]
    for (s, e), (t, f) in zip(
        zip(steps, effective, strict=True), list(zip(steps, effective, strict=True))[1:], strict=False
    ):
        assert f <= e * (t + 1) / (s + 1) * (1 + 1e-9)
    assert "guards" in learner._curves


def test_linear_decay_multiplies_what_is_learned():
    plain, trainer = fit(LanczosLRLearner(rule="nesterov", refresh_every_n_steps=1000))
    decayed, _ = fit(LanczosLRLearner(rule="nesterov", refresh_every_n_steps=1000, decay="linear"))
    total = trainer.global_step
    assert total == 16
    for step, (a, b) in enumerate(zip(plain.rates, decayed.rates, strict=True)):
        assert b[0] == pytest.approx(a[0] * (1 - step / total), rel=1e-12)


def test_groups_keep_their_ratios():
    def make(parameters):
        first, *others = parameters
        return torch.optim.SGD([{"params": [first], "lr": 0.03}, {"params": others, "lr": 0.3}], momentum=0.9)

    module, _ = fit(LanczosLRLearner(), Net(make))
    for low, high in module.rates:
        assert low == pytest.approx(high / 10, rel=1e-12)


def test_a_schedule_is_refused_or_rebased():
    def make(parameters):
        optimizer = sgd(lr=123.0)(parameters)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    with pytest.raises(MisconfigurationException, match="LanczosLRLearner and the scheduler LambdaLR"):
        fit(LanczosLRLearner(), Net(make))
    plain, _ = fit(LanczosLRLearner(refresh_every_n_steps=1000))
    rebased, _ = fit(LanczosLRLearner(refresh_every_n_steps=1000, on_scheduler="rebase"), Net(make))
    for step, (a, b) in enumerate(zip(plain.rates, rebased.rates, strict=True)):
        assert b[0] == pytest.approx(a[0] / (1 + step), rel=1e-12)


def test_adam_is_told_the_preconditioned_curvature():
    learner = LanczosLRLearner(refresh_every_n_steps=1, start="optimizer", growth=math.inf, num_steps=20)
    module = Net(lambda parameters: torch.optim.Adam(parameters, lr=1e-3))
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        original = learner_module.lanczos
        patch.setattr(
            learner_module, "lanczos", lambda op, *a, **k: seen.append(op.to_dense()) or original(op, *a, **k)
        )
        loader = DataLoader(TensorDataset(*data(4)), 4)
        _, trainer = fit(learner, module, loader=loader, max_epochs=3)
    state = trainer.optimizers[0].state
    assert len(seen) == 2  # none before the first step
    assert all(s["step"] == 3 for s in state.values())
    sharpness = torch.linalg.eigvalsh(seen[-1].double())[-1].item()
    assert module.rates[0] == [1e-3]
    # 4 (1 - 0.9) / L of a heavy ball; Ritz values of 20 steps in 75 dimensions, in float32
    assert module.rates[-1][0] * 0.1 == pytest.approx(4 * 0.1 / sharpness, rel=1e-3)
    assert trainer.optimizers[0].param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("value", [math.nan, math.inf, None, 0.0])
def test_what_is_not_finite_or_flat_changes_nothing_and_is_said_once(value):
    """Also a skipped batch, which has no loss."""

    class Bad(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if 3 <= self.trainer.global_step < 6:
                return None if value is None else loss * value
            return loss

        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            if 3 <= self.trainer.global_step < 6:  # or it would be in the weights
                optimizer.zero_grad()

    learner = LanczosLRLearner(refresh_every_n_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module, trainer = fit(learner, Bad())
    assert learner._rejected == 3
    assert learner._curves["lr"].points()[0] == [0, 1, 2, *range(6, 16)]
    assert len([w for w in caught if "Said once" in str(w.message)]) == 1
    assert all(p.isfinite().all() for p in module.parameters())


def test_bad_input_is_refused_before_the_first_step():
    def two(parameters):
        first, *others = parameters
        return [sgd()([first]), sgd()(others)]

    class Manual(Net):
        def __init__(self, make=None):
            super().__init__(make)
            self.automatic_optimization = False

    class Endless(IterableDataset):
        def __iter__(self):
            return iter(zip(*data(), strict=True))

    cases = [
        ("one optimizer, this one has 2", {"module": Net(two)}),
        ("not for RMSprop", {"module": Net(torch.optim.RMSprop)}),
        ("dampening=0", {"module": Net(sgd(dampening=0.1, nesterov=False))}),
        ("optimizes by hand; give loss_fn", {"module": Manual()}),
        ("precision='bf16-true' is too coarse", {"precision": "bf16-true"}),
        ("must know how long", {"loader": DataLoader(Endless(), 4), "max_epochs": -1}),
    ]
    for message, options in cases:
        options.setdefault("module", Net())
        manual_pairs = message.startswith("one optimizer")
        if manual_pairs:
            options["module"].automatic_optimization = False
        learner = LanczosLRLearner(decay="linear", loss_fn=(lambda m, b: m.net(b[0]).mean()) if manual_pairs else None)
        with pytest.raises(MisconfigurationException, match=message):
            fit(learner, options.pop("module"), **options)


def test_manual_optimization_with_a_loss_function():
    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def loss_fn(module, batch):
        return nn.functional.cross_entropy(module.net(batch[0]), batch[1])

    manual, _ = fit(LanczosLRLearner(refresh_every_n_steps=3, loss_fn=loss_fn), Manual())
    automatic, _ = fit(LanczosLRLearner(refresh_every_n_steps=3))
    assert manual.rates == automatic.rates


@pytest.mark.filterwarnings("ignore:.*ResumeState")
def test_resumes_inside_an_accumulation_window(tmp_path):
    """At every batch, refreshing steps of three micro-batches included."""
    options = {"accumulate_grad_batches": 3, "max_epochs": 3}

    class SaveAll(ModelCheckpoint):
        def on_train_batch_end(self, trainer, module, *_):
            ready = trainer.fit_loop.epoch_loop.batch_progress.total.ready
            trainer.save_checkpoint(tmp_path / f"{ready}.ckpt")

    def learner():
        return LanczosLRLearner(refresh_every_n_steps=2)

    whole, _ = fit(learner(), Net(), ResumeState(), SaveAll(tmp_path), **options)
    for batch in (1, 2, 5, 8, 13, 20):
        again = learner()
        resumed, _ = fit(again, Net(), ResumeState(), ckpt_path=tmp_path / f"{batch}.ckpt", **options)
        assert resumed.rates == whole.rates[len(whole.rates) - len(resumed.rates) :]
        for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_chosen_interval_survives_a_kill_whatever_the_clock_says(tmp_path, monkeypatch):
    """The clock of the resumed run is a thousand times slower; its refreshes are where they would have been."""
    now = [0.0]

    def tick(device=None):
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(learner_module, "_now", tick)
    monkeypatch.setattr(learner_module.time, "perf_counter", tick)
    save = ModelCheckpoint(tmp_path, every_n_train_steps=20, save_top_k=-1, filename="{step}")
    whole = LanczosLRLearner(max_overhead=0.25)
    module, _ = fit(whole, Net(), ResumeState(), save, max_epochs=8)
    # a step and a refresh both take one tick, so every 4th step; 64 steps allow 16 refreshes with the 6 dense ones
    assert whole._schedule.interval == 5
    path = tmp_path / "step=20.ckpt"
    state = torch.load(path, weights_only=True)["callbacks"]["LanczosLRLearner"]
    assert state["schedule"]["interval"] == 5
    monkeypatch.setattr(learner_module, "_now", lambda device: 1000 * tick())
    resumed = LanczosLRLearner(max_overhead=0.25)
    again, _ = fit(resumed, Net(), ResumeState(), max_epochs=8, ckpt_path=path)
    assert again.rates == module.rates[20:]
    assert resumed._curves["lr"].points() == whole._curves["lr"].points()


def test_the_schedule_of_refreshes():
    schedule, steps = RefreshSchedule(None, 0.05), []
    for step in range(200):
        if step >= schedule.next:
            steps.append(step)
            schedule.refresh_seconds.append(10.0 if step == 0 else 2.0)  # the first warms up
            if schedule.is_timing and step >= DENSE:
                schedule.interval = schedule.chosen(math.inf)
            schedule.advance(step)
        schedule.step_seconds.append(1.0)
    assert schedule.interval == 40  # 2 / (0.05 * 1)
    assert steps == [0, 1, 2, 4, 8, 16, 32, 64, 104, 144, 184]
    for total in (500, 5000):
        interval = schedule.chosen(total)
        assert interval > 40
        assert 2.0 * refreshes(interval, total) <= 0.05 * total * 1.0
        assert 2.0 * refreshes(int(interval / 1.06), total) > 0.05 * total  # no longer than it must be
    assert schedule.chosen(10) <= 40 * 1.05  # too short to afford even the dense ones


def test_paper_preset_and_epochs():
    learner = LanczosLRLearner.paper()
    fit(learner, Net(sgd(nesterov=False)), max_epochs=3)
    assert learner._curves["lr"].points()[0] == [0, 8, 16]
    assert learner._products == 60
    values, weights = (torch.tensor(x) for x in learner._spectrum)
    sharpness = values.abs().max().item()
    mu = values.abs()[weights <= 0.5].min().item()
    expected = step_rule("ssgdmn", sharpness, max(mu, 1e-8 * sharpness))
    assert learner._lr == pytest.approx(expected.lr)
    assert "guards" not in learner._curves


def test_the_report_shows_it(tmp_path):
    learner = LanczosLRLearner(refresh_every_n_steps=2)
    report = RunReport()
    fit(learner, Net(), report, default_root_dir=tmp_path)
    page = report.path.read_text()
    for title in ("Learned rate", "Learned momentum", "Ritz values at the last refresh"):
        assert title in page
    assert "Error" not in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "nesterow"}, "rule must be one of .* Did you mean 'nesterov'"),
        ({"num_steps": 1}, "num_steps must be >= 2"),
        ({"growth": 1.0}, "growth must be > 1"),
        ({"refresh_every_n_steps": 0}, "refresh_every_n_steps must be >= 1"),
        ({"refresh_every_n_steps": 1, "refresh_every_n_epochs": 1}, "not both"),
        ({"max_overhead": 0.0}, "max_overhead must be > 0"),
        ({"momentum_max": 1.1}, r"momentum_max must be in \[0, 1\]"),
        ({"start": "given"}, "start must be one of"),
        ({"initial": 0.0}, r"initial must be in \(0, 1\]"),
        ({"lr_min": 2.0, "lr_max": 1.0}, "lr_max must be >= 2.0"),
        ({"decay": "cosine"}, "decay must be one of"),
        ({"on_scheduler": "ignore"}, "on_scheduler must be one of"),
        ({"products": "jvp"}, "products must be one of"),
    ],
)
def test_wrong_values(options, message):
    with pytest.raises(ValueError, match=message):
        LanczosLRLearner(**options)


def _on_a_rank(devices):
    learner = LanczosLRLearner(refresh_every_n_steps=2)
    inputs, labels = data(32)
    if devices > 1:  # every second sample, so that both together have the samples of one
        rank = int(os.environ["LOCAL_RANK"])
        inputs, labels = inputs[rank::2], labels[rank::2]
    module = Net()
    trainer = pl.Trainer(
        max_epochs=1,
        logger=False,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        precision="64-true",
        use_distributed_sampler=False,
        callbacks=[learner],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(TensorDataset(inputs.double(), labels), 8 // devices))
    return {"rates": copy.deepcopy(module.rates), "ritz": learner._spectrum[0]}


def test_two_ranks_learn_what_one_learns_from_the_joined_batch():
    first, second = on_two_ranks(_on_a_rank, 2)
    alone = _on_a_rank(1)
    assert first == second
    assert len(first["rates"]) == 4
    for ours, theirs in zip(first["rates"], alone["rates"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
    assert first["ritz"] == pytest.approx(alone["ritz"], rel=1e-6, abs=1e-9)
