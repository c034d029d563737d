import copy
import itertools
import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, GradientAccumulationScheduler, RichProgressBar, TQDMProgressBar
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    WeightedRandomSampler,
)

from lightning_opt.callbacks import AdaptiveBatchSize, OptimizerMonitor, ResumeState, RunReport
from lightning_opt.data import ResumableLoader
from lightning_opt.gradient_noise import GradientStatistics, required_batch_size
from lightning_opt.schedules import SampleBasedLR
from lightning_opt.testing._callback_checks.subject import Rows
from lightning_opt.testing._ranks import on_two_ranks

# thresholds that no test of the contract's runs exceeds: it counts their steps
settings = {
    "AdaptiveBatchSize": [
        {"eta": 1e3, "test_interval": 2},
        {"test": "augmented_inner_product", "theta": 1e6, "nu": 1e6, "test_interval": 1, "ema": 0.5},
        {"test": "coordinate", "eta": 1e9, "test_interval": 1, "b0": 8, "max_micro": 4},
    ]
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:.*No device id is provided"),
]


class Points(Dataset):
    """Noisy samples of a linear function; each knows its number."""

    def __init__(self, size=100, dtype=torch.float64):
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(size, 3, dtype=dtype, generator=generator)
        self.y = self.x @ torch.tensor([1.0, -2.0, 0.5], dtype=dtype) + 3 * torch.randn(
            size, dtype=dtype, generator=generator
        )

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index], index


class Line(pl.LightningModule):
    """Least squares; keeps which samples it saw in which step, and the gradients of the steps."""

    def __init__(self, lr=0.02, momentum=0.9, optimizer=torch.optim.SGD, schedule=None, dropout=0.0):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.lr, self.momentum, self.optimizer, self.schedule = lr, momentum, optimizer, schedule
        self.dropout = nn.Dropout(dropout)
        self.seen, self.gradients, self.validated, self.totals = [], [], [], []
        self.fits = math.inf  # samples that fit into memory

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        if len(x) > self.fits:
            raise torch.OutOfMemoryError("planted")
        if not torch._C._functorch.is_functorch_wrapped_tensor(index):
            self.seen.append((self.trainer.current_epoch, self.global_step, index.tolist()))
        loss = (self.dropout(x) @ self.w + self.bias - y).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.validated.append((self.trainer.current_epoch, len(self.seen)))

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(torch.cat([self.w.grad, self.bias.grad.reshape(1)]).clone())

    def on_train_batch_start(self, batch, batch_idx):
        self.totals.append((self.trainer.num_training_batches, self.trainer.is_last_batch))

    def configure_optimizers(self):
        kwargs = {"momentum": self.momentum} if self.optimizer is torch.optim.SGD else {}
        optimizer = self.optimizer(self.parameters(), lr=self.lr, **kwargs)
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


def fit(callbacks=(), module=None, size=100, batch_size=8, loader=None, val=None, ckpt_path=None, seed=0, **options):
    torch.manual_seed(seed)
    module = module or Line()
    if loader is None:
        loader = ResumableLoader(Points(size), batch_size, shuffle=True, seed=3)
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **options,
        },
        callbacks=list(callbacks),
    )
    trainer.fit(module, loader, val, ckpt_path=ckpt_path)
    return module, trainer


def steps_of(module):
    """The samples of every optimizer step."""
    return [
        [i for _, _, index in group for i in index] for _, group in itertools.groupby(module.seen, key=lambda s: s[1])
    ]


def parameters(module):
    return torch.cat([module.w.detach(), module.bias.detach().reshape(1)])


GROWING = {"eta": 0.5, "test_interval": 1, "growth_cap": 1.5}


# --- samples ---


@pytest.mark.parametrize("max_micro", [None, 10])
@pytest.mark.parametrize("workers", [{}, {"num_workers": 2}, {"num_workers": 1, "persistent_workers": True}])
def test_every_sample_of_an_epoch_once_while_the_batch_grows(workers, max_micro):
    callback = AdaptiveBatchSize(**GROWING, b0=4, max_micro=max_micro)
    loader = ResumableLoader(Points(101), 8, shuffle=True, seed=3, **workers)
    module, trainer = fit([callback], loader=loader, max_epochs=2 if workers else 3)
    for epoch in range(trainer.max_epochs):
        seen = [i for e, _, index in module.seen if e == epoch for i in index]
        assert sorted(seen) == list(range(101))
    lengths = [len(step) for step in steps_of(module)]
    assert len(set(lengths)) > 4  # it grew several times
    assert trainer.global_step == len(lengths)
    assert callback.samples == sum(lengths) == 101 * trainer.max_epochs
    if max_micro:
        pieces = [len(index) for _, _, index in module.seen]
        assert max(pieces) <= max_micro < max(lengths)


def test_growth_is_monotone_and_as_the_logged_tests_ask():
    logger = Rows()
    callback = AdaptiveBatchSize(eta=0.7, test_interval=2, growth_cap=1.5, b0=6)
    module, trainer = fit([callback], logger=logger, log_every_n_steps=1, max_epochs=3)
    used = [logger.values["batch_size/global", step] for step in range(trainer.global_step)]
    assert used == sorted(used)
    assert used[0] == 6
    since = math.inf
    for step in range(trainer.global_step - 1):
        requested = logger.values.get(("batch_size/requested", step))
        assert (requested is None) == (since < 2 * 6 or used[step] >= 100)  # two steps of the first size
        since = used[step] + (since if requested is None else 0)
        if requested is not None:
            assert used[step + 1] == max(used[step], min(requested, math.ceil(1.5 * used[step]), 100))
    lengths = [len(step) for step in steps_of(module)]
    samples = [logger.values["batch_size/samples", step] for step in range(trainer.global_step)]
    assert samples == list(itertools.accumulate(lengths))


# --- gradients ---


@pytest.mark.parametrize("max_micro", [None, 7])
@pytest.mark.parametrize("size", [100, 99])
def test_gradient_of_a_split_step_is_that_of_its_batch(size, max_micro):
    """In groups, in micro-batches, and with a ragged last one: to rounding of float64 sums of 100 terms."""
    callback = AdaptiveBatchSize(**GROWING, max_micro=max_micro)
    module, _ = fit([callback], size=size, max_epochs=3)
    steps = steps_of(module)
    assert any(len(step) < 8 or len(step) < len(steps[i - 1]) for i, step in enumerate(steps) if i)  # a ragged one
    gradients, w = replay(module, size)
    torch.testing.assert_close(torch.stack(module.gradients), gradients, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(parameters(module), w, rtol=1e-10, atol=1e-12)


def replay(module, size):
    """The gradients of the same steps, each from its whole batch at once, and where they lead."""
    data, w, out = Points(size), torch.zeros(4, dtype=torch.float64), []
    buffer = torch.zeros_like(w)
    for samples in steps_of(module):
        x = torch.cat([data.x[samples], torch.ones(len(samples), 1)], dim=1)
        out.append(2 * x.T @ (x @ w - data.y[samples]) / len(samples))
        buffer = module.momentum * buffer + out[-1]
        w = w - module.lr * buffer
    return torch.stack(out), w


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_infinite_threshold_is_the_constant_run_bit_for_bit(dropout):
    logs, ends = [], []
    for callbacks in ([], [AdaptiveBatchSize(eta=math.inf)]):
        logger = Rows()
        module, trainer = fit(callbacks, module=Line(dropout=dropout), size=99, logger=logger, log_every_n_steps=1)
        ends.append((parameters(module).tolist(), trainer.global_step, trainer.num_training_batches))
        logs.append({key: value for key, value in logger.values.items() if "batch_size" not in key[0]})
    assert ends[0] == ends[1]
    assert logs[0] == logs[1]


def test_accumulation_is_lightnings_bit_for_bit_where_that_is_right():
    """96 samples in windows of 3 x 8: no window is cut short."""
    ours, a = fit([AdaptiveBatchSize(eta=math.inf, b0=24, max_micro=8)], size=96)
    theirs, b = fit(size=96, accumulate_grad_batches=3)
    assert a.global_step == b.global_step == 8
    assert torch.equal(parameters(ours), parameters(theirs))


def test_logged_values_of_a_step_in_pieces_are_those_of_the_batch():
    """The model is the same while a step is tested, so its first loss and the epoch's mean can be compared."""
    values = []
    for callbacks in ([], [AdaptiveBatchSize(eta=1e6, test_interval=1)]):
        logger = Rows()
        module, trainer = fit(callbacks, size=99, logger=logger, log_every_n_steps=1)
        values.append({key: value for key, value in logger.values.items() if "loss" in key[0]})
    assert values[0].keys() == values[1].keys()
    assert any("epoch" in name for name, _ in values[0])
    for key, value in values[0].items():
        assert values[1][key] == pytest.approx(value, rel=1e-6), key  # logged in float32


# --- estimators ---


def first_test(test, size=100, batch_size=24, **kwargs):
    """The first test's log, and the per-sample gradients at the start of the run, in the order of the batch."""
    logger = Rows()
    kwargs = {"eta": 0.4, "test_interval": 1, **kwargs}
    module, _ = fit(
        [AdaptiveBatchSize(test, **kwargs)],
        size=size,
        batch_size=batch_size,
        logger=logger,
        log_every_n_steps=1,
        max_steps=1,
    )
    samples, data = steps_of(module)[0], Points(size)
    x = torch.cat([data.x[samples], torch.ones(len(samples), 1)], dim=1)
    gradients = -2 * data.y[samples].unsqueeze(1) * x
    logged = {name[11:]: value for (name, step), value in logger.values.items() if name.startswith("batch_size/")}
    return logged, gradients


@pytest.mark.parametrize("test", ["norm", "inner_product", "augmented_inner_product", "coordinate"])
@pytest.mark.parametrize(
    ("estimator", "max_micro", "pieces"),
    [
        ("micro", None, [3] * 8),  # of the one micro-batch
        ("micro", 2, [2] * 12),  # more micro-batches than groups
        ("micro", 8, [3, 3, 2] * 3),  # three micro-batches in three pieces each
        ("per_sample", None, [1] * 24),
        ("per_sample", 8, [1] * 24),
    ],
)
def test_statistics_are_those_of_the_groups(test, estimator, max_micro, pieces):
    logged, g = first_test(test, estimator=estimator, max_micro=max_micro, chunk_size=5)
    sizes = put_together(pieces, 8) if estimator == "micro" else pieces
    expected = GradientStatistics.from_groups(torch.stack([part.mean(0) for part in g.split(sizes)]), sizes)
    assert logged["var_trace"] == pytest.approx(expected.var_trace, rel=1e-6)  # kept in float32
    assert logged["grad_norm_sq"] == pytest.approx(expected.grad_norm_sq, rel=1e-6)
    assert logged["requested"] == pytest.approx(required_batch_size(expected, test, eta=0.4), abs=1)
    assert logged["ratio"] == pytest.approx(logged["requested"] / 24, rel=1e-6)


def put_together(pieces, groups):
    """Consecutive pieces in as many groups, as evenly as can be: group k ends with the first piece at k / groups."""
    ends = [math.ceil(k * len(pieces) / groups) for k in range(groups + 1)]
    return [sum(pieces[a:b]) for a, b in itertools.pairwise(ends)]


def test_averages_over_tests():
    logger = Rows()
    fit([AdaptiveBatchSize(eta=1e6, test_interval=1, ema=0.75)], logger=logger, log_every_n_steps=1, max_epochs=1)
    plain = Rows()
    fit([AdaptiveBatchSize(eta=1e6, test_interval=1)], logger=plain, log_every_n_steps=1, max_epochs=1)
    mean = weight = 0.0
    for step in range(12):
        mean = 0.75 * mean + 0.25 * plain.values["batch_size/var_trace", step]
        weight = 0.75 * weight + 0.25
        assert logger.values["batch_size/var_trace", step] == pytest.approx(mean / weight, rel=1e-5)


# --- exact resume ---


class Save(Checkpoint):
    """A checkpoint after every batch, wherever in a window."""

    def __init__(self, folder):
        self.folder, self.paths = folder, []

    def on_train_batch_end(self, trainer, *_):
        self.paths.append(Path(self.folder, f"{len(self.paths)}.ckpt"))
        trainer.save_checkpoint(self.paths[-1])


RESUMED = [
    {"max_micro": None},
    {"max_micro": 5},
    {"max_micro": 5, "test": "augmented_inner_product", "theta": 0.5, "ema": 0.5},
    {"max_micro": 5, "test": "coordinate", "estimator": "per_sample"},
]


@pytest.mark.parametrize("kwargs", RESUMED, ids=str)
def test_resumes_exactly_from_every_batch(tmp_path, kwargs):
    """Within windows, tests and growth: parameters, logs, state, and which samples are read."""
    kwargs = {**GROWING, "b0": 4, **kwargs}

    def run(*callbacks, ckpt_path=None, seed=0):
        logger, callback = Rows(), AdaptiveBatchSize(**kwargs)
        options = {"logger": logger, "log_every_n_steps": 1, "val": DataLoader(Points(4), 4), "val_check_interval": 0.5}
        module, trainer = fit([callback, ResumeState(), *callbacks], size=50, ckpt_path=ckpt_path, seed=seed, **options)
        return module, trainer, callback, logger.values

    saver = Save(tmp_path)
    whole, trainer, callback, rows = run(saver)
    assert callback.batch_size > 8
    for path in saver.paths[:: 1 if kwargs["max_micro"] is None else 3]:
        module, resumed, again, later = run(ckpt_path=path, seed=99)
        assert torch.equal(parameters(module), parameters(whole)), path
        assert resumed.global_step == trainer.global_step
        assert str(again.state_dict()) == str(callback.state_dict())
        assert later.items() <= rows.items()
        count = len(module.seen)
        assert [s[2] for s in module.seen] == [s[2] for s in whole.seen[len(whole.seen) - count :]]


@pytest.mark.parametrize("workers", [1, 2])
def test_resumes_exactly_with_workers(tmp_path, workers):
    """A change is drawn behind what the workers have fetched; the position knows."""

    def run(*callbacks, ckpt_path=None):
        callback = AdaptiveBatchSize(**GROWING, b0=4)
        loader = ResumableLoader(Points(60), 8, shuffle=True, seed=3, num_workers=workers)
        return fit([callback, ResumeState(), *callbacks], loader=loader, ckpt_path=ckpt_path, max_epochs=1)

    saver = Save(tmp_path)
    whole, _ = run(saver)
    for path in saver.paths[1::4]:
        module, _ = run(ckpt_path=path)
        assert torch.equal(parameters(module), parameters(whole))


# --- what the Trainer counts ---


class Shown(pl.Callback):
    """What the progress bar shows of every batch, and at the end of every epoch."""

    def __init__(self):
        self.totals, self.ends = [], []

    def on_train_batch_end(self, trainer, *_):
        self.totals.append((trainer.current_epoch, trainer.progress_bar_callback.train_progress_bar.total))

    def on_train_epoch_end(self, trainer, *_):
        bar = trainer.progress_bar_callback.train_progress_bar
        self.ends.append((bar.n if hasattr(bar, "n") else bar.completed, bar.total))


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
@pytest.mark.parametrize("max_micro", [None, 6])
def test_batches_are_counted_truly(max_micro, bar):
    shown = Shown()
    module, trainer = fit([AdaptiveBatchSize(**GROWING, max_micro=max_micro), bar(), shown], enable_progress_bar=True)
    batches = [sum(epoch == e for epoch, _ in shown.totals) for e in range(2)]
    assert len({total for epoch, total in shown.totals if epoch == 0}) > 1  # it changed on the way
    assert [(int(n), int(total)) for n, total in shown.ends] == [(n, n) for n in batches]
    assert trainer.num_training_batches == batches[-1]
    last = {batches[0] - 1, sum(batches) - 1}
    assert [is_last for _, is_last in module.totals] == [i in last for i in range(len(module.totals))]


@pytest.mark.parametrize(("interval", "by_epoch"), [(0.25, 1), (0.5, 1), (1.0, 1), (5, 1), (5, None), (30, None)])
def test_validates_as_often_as_the_constant_run(interval, by_epoch):
    """By samples: batches of the size at the start."""
    val, options = DataLoader(Points(4), 4), {"val_check_interval": interval, "check_val_every_n_epoch": by_epoch}
    constant, _ = fit(val=val, **options, max_epochs=3)
    infinite, _ = fit([AdaptiveBatchSize(eta=math.inf)], val=val, **options, max_epochs=3)
    assert infinite.validated == constant.validated
    growing, _ = fit([AdaptiveBatchSize(**{**GROWING, "growth_cap": 1.1}, b_max=16)], val=val, **options, max_epochs=3)
    assert [epoch for epoch, _ in growing.validated] == [epoch for epoch, _ in constant.validated]


def test_limits_count_samples():
    module, trainer = fit([AdaptiveBatchSize(**GROWING)], limit_train_batches=5)
    for epoch in range(2):
        assert sum(len(index) for e, _, index in module.seen if e == epoch) == 40
    module, _ = fit([AdaptiveBatchSize(**GROWING)], limit_train_batches=0.5)
    assert sum(len(index) for _, _, index in module.seen) == 2 * 6 * 8
    module, trainer = fit([AdaptiveBatchSize(**GROWING)], max_steps=7, max_epochs=-1)
    assert trainer.global_step == 7


def test_epochs_are_reloaded():
    class Reloads(Line):
        def train_dataloader(self):
            return ResumableLoader(Points(100), 8, shuffle=True, seed=3)

    one, _ = fit([AdaptiveBatchSize(**GROWING)], max_epochs=3)
    torch.manual_seed(0)
    module = Reloads()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[AdaptiveBatchSize(**GROWING)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    assert module.seen == one.seen


# --- learning rate ---


@pytest.mark.parametrize(("rule", "power"), [("none", 0), ("sqrt", 0.5), ("linear", 1)])
def test_learning_rate_follows_the_batch(rule, power):
    callback = AdaptiveBatchSize(**GROWING, lr_scale=rule)
    _, trainer = fit([callback])
    assert callback.batch_size > 8
    expected = 0.02 * (callback.batch_size / 8) ** power
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12)


def test_schedule_by_samples_hears_of_the_batch():

    def schedule(optimizer):
        return SampleBasedLR(optimizer, 8, lr_decay_samples=300, decay="linear")

    module, trainer = fit([AdaptiveBatchSize(**GROWING)], module=Line(schedule=schedule), size=99, max_epochs=3)
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert scheduler.samples == 297
    assert scheduler.get_last_lr()[0] == pytest.approx(0.02 * (1 - 297 / 300), rel=1e-12)


def test_a_schedule_by_samples_within_torchs_sequence_counts_all_of_them():
    def schedule(optimizer):
        parts = [SampleBasedLR(optimizer, 8, lr_decay_samples=300), torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)]
        return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [1000])

    _, trainer = fit([AdaptiveBatchSize(**GROWING)], module=Line(schedule=schedule), size=99, max_epochs=3)
    assert trainer.lr_scheduler_configs[0].scheduler.state_dict()["_schedulers"][0]["samples"] == 297


# --- memory ---


def test_a_batch_that_does_not_fit_is_halved():
    module, callback = Line(), AdaptiveBatchSize(**GROWING)
    module.fits = 13
    with pytest.warns(
        UserWarning, match=r"samples did not fit into memory; micro-batches have at most \d+ from now on"
    ):
        fit([callback], module=module, size=99, max_epochs=3)
    for epoch in range(3):
        assert sorted(i for e, _, index in module.seen if e == epoch for i in index) == list(range(99))
    assert callback.state_dict()["limit_micro"] <= 13
    assert callback.batch_size > 13
    torch.testing.assert_close(parameters(module), replay(module, 99)[1], rtol=1e-10, atol=1e-12)


def test_memory_that_runs_out_in_the_backward_pass_of_a_window():
    """The gradients of the window may be spoilt then: the step is made of what follows, and says so."""

    class Spoils(Line):
        planted = False

        def on_after_backward(self):
            if not self.planted and len(self.seen) == 2:
                self.planted = True
                raise torch.OutOfMemoryError("planted")

    module = Spoils()
    with pytest.warns(UserWarning, match="gradients of 8 samples of this step were lost"):
        fit([AdaptiveBatchSize(eta=math.inf, b0=24, max_micro=8)], module=module, size=96, max_epochs=1)
    data, step = Points(96), [i for _, s, index in module.seen[2:] if s == 0 for i in index]
    x = torch.cat([data.x[step], torch.ones(len(step), 1)], dim=1)
    torch.testing.assert_close(module.gradients[0], -2 * x.T @ data.y[step] / len(step), rtol=1e-10, atol=1e-12)


def test_one_sample_that_does_not_fit_is_the_users():
    module = Line()
    module.fits = 0
    with pytest.warns(UserWarning, match="did not fit"), pytest.raises(torch.OutOfMemoryError, match="planted"):
        fit([AdaptiveBatchSize(eta=math.inf)], module=module)


# --- numbers that are not finite ---


def test_a_gradient_that_is_not_finite_decides_nothing():
    class Breaks(Line):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.inf if self.global_step in (2, 4) else loss

        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            for p in self.parameters():
                p.grad.nan_to_num_(0.0, 0.0, 0.0)

    logger, callback = Rows(), AdaptiveBatchSize(**GROWING)
    with pytest.warns(UserWarning, match="not finite") as caught:
        fit([callback], module=Breaks(), logger=logger, log_every_n_steps=1)
    assert sum("not finite" in str(w.message) for w in caught) == 1
    assert callback.skipped_tests == 2
    assert ("batch_size/requested", 2) not in logger.values
    assert logger.values["batch_size/global", 3] == logger.values["batch_size/global", 2]
    assert all(math.isfinite(value) for (name, _), value in logger.values.items() if name.startswith("batch_size"))
    assert callback.batch_size > 8


# --- two ranks ---


def fit_rank(kwargs):
    strategy = DDPStrategy(process_group_backend="gloo")
    logger, callback = Rows(), AdaptiveBatchSize(**kwargs)
    module, trainer = fit([callback], size=99, logger=logger, log_every_n_steps=1, devices=2, strategy=strategy)
    logged = [[name, step, value] for (name, step), value in logger.values.items() if name.startswith("batch_size")]
    return {
        "seen": [list(s) for s in module.seen],
        "gradients": torch.stack(module.gradients),
        "parameters": parameters(module),
        "state": {k: v for k, v in callback.state_dict().items() if k in ("batch", "micro", "accum", "samples")},
        "logged": logged,
        "steps": trainer.global_step,
    }


def fit_ranks(settings):
    settings, folder = settings
    return [[fit_rank(kwargs) for kwargs in settings], resume_rank(folder)]


def resume_rank(folder):
    """Parameters of a run, and of it resumed from several batches, mostly within a window that tests."""

    def run(*callbacks, ckpt_path=None):
        callback = AdaptiveBatchSize("augmented_inner_product", theta=0.5, **GROWING, max_micro=5)
        strategy = DDPStrategy(process_group_backend="gloo")
        callbacks = [callback, ResumeState(), *callbacks]
        module, trainer = fit(callbacks, size=99, ckpt_path=ckpt_path, devices=2, strategy=strategy)
        return torch.cat([parameters(module), torch.tensor([float(callback.batch_size), trainer.global_step])])

    saver = Save(folder)
    return [run(saver), *(run(ckpt_path=path) for path in saver.paths[2:12:3])]


RANKS = [
    {**GROWING},
    {**GROWING, "max_micro": 5},
    {**GROWING, "estimator": "worker", "max_micro": 5},
    {**GROWING, "test": "augmented_inner_product", "theta": 0.5, "max_micro": 5},
    {**GROWING, "estimator": "per_sample", "max_micro": 5},
    {**GROWING, "test": "coordinate"},
]


def test_two_ranks_decide_alike_and_weigh_every_sample_alike(tmp_path):
    (first, whole_and_resumed), (second, on_rank_one) = on_two_ranks(fit_ranks, (RANKS, tmp_path))
    assert len(whole_and_resumed) == 5
    assert all(torch.equal(run, whole_and_resumed[0]) for run in [*whole_and_resumed, *on_rank_one])
    for kwargs, a, b in zip(RANKS, first, second, strict=True):
        assert a["state"] == b["state"], kwargs
        assert a["steps"] == b["steps"]
        assert torch.equal(a["parameters"], b["parameters"])
        assert a["state"]["batch"] > 16
        for epoch in range(2):
            seen = [i for rank in (a, b) for e, _, index in rank["seen"] if e == epoch for i in index]
            assert set(seen) == set(range(99))
            assert len(seen) <= 100
        data, w = Points(99), torch.zeros(4, dtype=torch.float64)
        buffer = torch.zeros_like(w)
        logged = {(name, step): value for name, step, value in a["logged"]}
        for step in range(a["steps"]):
            parts = [[i for _, s, index in rank["seen"] if s == step for i in index] for rank in (a, b)]
            samples = [*parts[0], *parts[1]]
            x = torch.cat([data.x[samples], torch.ones(len(samples), 1)], dim=1)
            gradients = 2 * (x @ w - data.y[samples]).unsqueeze(1) * x
            torch.testing.assert_close(a["gradients"][step], gradients.mean(0), rtol=1e-9, atol=1e-11)
            if ("batch_size/var_trace", step) in logged:
                assert logged["batch_size/grad_norm_sq", step] == pytest.approx(
                    gradients.mean(0).square().sum().item(), rel=1e-5
                )
                expected = None
                if kwargs.get("estimator") == "worker":
                    sizes = [len(part) for part in parts]
                    means = torch.stack([part.mean(0) for part in gradients.split(sizes)])
                    expected = GradientStatistics.from_groups(means, sizes)
                elif kwargs.get("estimator") == "per_sample":
                    expected = GradientStatistics.from_per_sample(gradients)
                else:  # the groups are the recorded pieces where no two were put together
                    sizes = [len(index) for rank in (a, b) for _, s, index in rank["seen"] if s == step]
                    if len(sizes) <= 8:
                        means = torch.stack([part.mean(0) for part in gradients.split(sizes)])
                        expected = GradientStatistics.from_groups(means, sizes)
                if expected is not None:
                    assert logged["batch_size/var_trace", step] == pytest.approx(expected.var_trace, rel=1e-5), step
            buffer = 0.9 * buffer + gradients.mean(0)
            w = w - 0.02 * buffer


# --- with what else a Trainer has ---


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}])
def test_mixed_precision_and_clipping(options):
    class Single(Line):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 1)

        def training_step(self, batch, batch_idx):
            x, y, index = batch
            self.seen.append((self.trainer.current_epoch, self.global_step, index.tolist()))
            return (self.net(x).squeeze(1) - y).float().square().mean()

        def on_before_optimizer_step(self, optimizer):
            pass

    callback = AdaptiveBatchSize(**GROWING)
    loader = ResumableLoader(Points(100, torch.float32), 8, shuffle=True, seed=3)
    module, _ = fit([callback, OptimizerMonitor()], module=Single(), loader=loader, **options)
    assert callback.batch_size > 16
    for epoch in range(2):
        assert sorted(i for e, _, index in module.seen if e == epoch for i in index) == list(range(100))


def test_the_report_has_its_picture(tmp_path):
    callback, report = AdaptiveBatchSize(**GROWING), RunReport()
    fit([callback, report], default_root_dir=tmp_path)
    assert "Batch size over samples" in report.path.read_text()


def test_a_fit_after_a_fit_starts_anew():
    callback = AdaptiveBatchSize(**GROWING)
    first, _ = fit([callback])
    state = str(copy.deepcopy(callback.state_dict()))
    second, _ = fit([callback])
    assert second.seen == first.seen
    assert str(callback.state_dict()) == state


# --- a loader of the user's ---


def test_a_plain_loader_is_replaced_and_said_so(caplog):
    loader = DataLoader(Points(100), batch_size=8, shuffle=True)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        module, _ = fit([AdaptiveBatchSize(**GROWING, seed=3)], loader=loader)
    assert "through lightning_opt.data.ResumableLoader(batch_size=8, shuffle=True, seed=3)" in caplog.text
    ours, _ = fit([AdaptiveBatchSize(**GROWING)])
    assert module.seen == ours.seen


class Stream(IterableDataset):
    def __iter__(self):
        yield from Points(100)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: DataLoader(Stream(), 8), "Stream is a stream; read it into a dataset with __len__"),
        (
            lambda: DataLoader(Points(), batch_sampler=[[0, 1], [2, 3]]),
            "makes the batches itself and cannot change those of list; leave batch_sampler out",
        ),
        (
            lambda: DataLoader(
                Points(), batch_sampler=type("Own", (BatchSampler,), {})(SequentialSampler(Points()), 4, False)
            ),
            "cannot change those of Own",
        ),
        (
            lambda: DataLoader(Points(), 8, sampler=WeightedRandomSampler([1.0] * 100, 100)),
            "cannot follow WeightedRandomSampler; leave the sampler out",
        ),
        (lambda: [DataLoader(Points(), 8), DataLoader(Points(), 8)], "one training loader, and got list"),
        (lambda: ResumableLoader(Points(), 1), "the loader's holds one; set b0=2 or more"),
    ],
)
def test_other_data_are_refused(loader, message):
    module = Line()
    with pytest.raises(MisconfigurationException, match=message):
        fit([AdaptiveBatchSize()], module=module, loader=loader())
    assert not module.seen


# --- wrong settings ---


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"test": "nrom"}, "Did you mean 'norm'"),
        ({"eta": 0.0}, "eta must be > 0.0 and finite, got 0.0"),
        ({"theta": -1.0}, "theta must be > 0.0"),
        ({"nu": math.nan}, "nu must be > 0.0"),
        ({"quantile": 1.5}, r"quantile must be in \(0.0, 1.0\], got 1.5"),
        ({"b0": 1}, "b0 must be >= 2 and finite, got 1"),
        ({"b0": 64, "b_max": 32}, "b_max must be >= 64 and finite, got 32"),
        ({"max_micro": 0}, "max_micro must be >= 1"),
        ({"max_micro": 2.5}, "max_micro must be an integer, got 2.5"),
        ({"test_interval": 0}, "test_interval must be >= 1"),
        ({"groups": 1}, "groups must be >= 2 and finite, got 1"),
        ({"ema": 1.0}, r"ema must be in \[0.0, 1.0\), got 1.0"),
        ({"growth_cap": 1.0}, "growth_cap must be > 1.0"),
        ({"estimator": "ranks"}, "estimator must be one of"),
        ({"lr_scale": "square"}, "lr_scale must be one of"),
        ({"test": "coordinate", "ema": 0.5}, "ema must be 0 with test='coordinate'"),
    ],
)
def test_wrong_values_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveBatchSize(**kwargs)


class ByHand(Line):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(ByHand):
    def configure_optimizers(self):
        return [torch.optim.SGD([self.w], 0.1), torch.optim.SGD([self.bias], 0.1)]


class Takes(Line):
    def training_step(self, dataloader_iter):
        raise AssertionError


class Normalised(Line):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)


class Complex(Line):
    def __init__(self):
        super().__init__()
        self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex128))


def schedule(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


@pytest.mark.parametrize(
    ("module", "kwargs", "options", "message"),
    [
        (ByHand, {}, {}, "ByHand optimizes by hand; use automatic optimization with one optimizer"),
        (TwoOptimizers, {}, {}, "TwoOptimizers optimizes by hand"),
        pytest.param(
            *(Takes, {}, {}, "takes dataloader_iter; let it take the batch"),
            marks=pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor"),
        ),
        (Line, {}, {"accumulate_grad_batches": 2}, "leave accumulate_grad_batches at 1"),
        (Line, {"estimator": "worker"}, {}, "compares the gradients of ranks, and there is one; use 'micro'"),
        (Normalised, {"estimator": "per_sample"}, {}, "BatchNorm mixes; use estimator='micro'"),
        (Complex, {}, {}, "compares real gradients, and phase is torch.complex128"),
        (lambda: Line(optimizer=torch.optim.LBFGS), {}, {}, "LBFGS would evaluate again"),
        (lambda: Line(schedule=schedule), {"lr_scale": "sqrt"}, {}, "both set the learning rate"),
        (Line, {"b_max": 4}, {}, r"AdaptiveBatchSize\(b_max=4\) is below the loader's 8 samples a step"),
    ],
)
def test_wrong_combinations_are_refused_before_the_first_step(module, kwargs, options, message):
    module = module()
    with pytest.raises(MisconfigurationException, match=message):
        fit([AdaptiveBatchSize(**kwargs)], module=module, **options)
    assert not module.seen


@pytest.mark.parametrize("estimator", ["micro", "per_sample"])
def test_sparse_gradients_are_refused(estimator):
    class Sparse(Line):
        def __init__(self):
            super().__init__(momentum=0.0)
            self.table = nn.Embedding(2, 1, sparse=True, dtype=torch.float64)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.table((batch[0][:, 0] > 0).long()).square().mean()

    with pytest.raises(RuntimeError, match="cannot compare sparse gradients: use sparse=False in the embedding"):
        fit([AdaptiveBatchSize(estimator=estimator)], module=Sparse())


def test_strategies_that_shard_are_refused(monkeypatch):
    from lightning_opt.callbacks import _batch_requirements

    monkeypatch.setattr(_batch_requirements, "SingleDeviceStrategy", DDPStrategy)
    with pytest.raises(MisconfigurationException, match="SingleDeviceStrategy accumulates or shards them"):
        fit([AdaptiveBatchSize()])


def test_a_second_owner_is_refused():
    with pytest.raises(MisconfigurationException, match="AdaptiveBatchSize and GradientAccumulationScheduler both set"):
        fit([AdaptiveBatchSize(), GradientAccumulationScheduler({1: 2})])


def test_a_larger_bound_than_the_epoch_is_said():
    with pytest.warns(UserWarning, match=r"b_max=5000\) is more than the 100 samples of an epoch"):
        fit([AdaptiveBatchSize(b_max=5000)], max_steps=1)


def test_a_batch_that_cannot_be_divided():
    loader = ResumableLoader(Points(), 8, collate_fn=lambda samples: (torch.stack([x for x, _, _ in samples]).T,))

    class Transposed(Line):
        def training_step(self, batch, batch_idx):
            return (self.w @ batch[0]).square().mean()

    with pytest.raises(MisconfigurationException, match=r"a tensor of shape \(3, 8\) in a batch of 8 samples"):
        fit([AdaptiveBatchSize()], module=Transposed(), loader=loader)
