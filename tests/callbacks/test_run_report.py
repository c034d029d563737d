import re
import struct
from pathlib import Path

import lightning.pytorch as pl
import matplotlib
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_opt.callbacks import Panel, ResumeState, RunReport
from lightning_opt.callbacks._report_curves import MOST_PANELS, curve_panels
from lightning_opt.callbacks._report_history import MAX_POINTS, Curve
from lightning_opt.callbacks._report_render import render_svg
from lightning_opt.data import ResumableLoader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
]

settings = {"RunReport": {}}

INPUTS = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))


class Net(pl.LightningModule):
    """Logs in every way that a module can."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.fail_at = None

    def training_step(self, batch, batch_idx):
        if self.fail_at is not None and self.global_step == self.fail_at[0]:
            raise self.fail_at[1]
        loss = self.net(batch[0]).square().mean()
        self.log("train/loss", loss)
        self.log("train/both", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        self.log("epoch_weight", self.net.weight.sum())

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.net(batch[0]).square().mean())

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(
            [{"params": [self.net.weight], "name": "w"}, {"params": [self.net.bias], "lr": 0.5}], lr=0.1
        )
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


class LogsLate(Callback):
    """Logs in the last hook of a batch; the place among the callbacks must not matter."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        pl_module.log(f"late/{self.place}", trainer.global_step * 1.0)

    def __init__(self, place):
        self.place = place

    @property
    def state_key(self):
        return self.place


class Rows(Logger):
    name, version, save_dir = "rows", 7, None

    def __init__(self) -> None:
        super().__init__()
        self.points: dict[str, dict[int, float]] = {}

    def log_metrics(self, metrics, step=None):
        for name, value in metrics.items():
            self.points.setdefault(name, {})[step + 1] = value  # loggers count from 0, curves count taken steps

    def log_hyperparams(self, *args, **kwargs):
        pass


@pytest.fixture
def no_pictures(monkeypatch):
    """Leaves out the slow part where a test does not look at it."""
    monkeypatch.setattr("lightning_opt.callbacks.run_report.render_svg", lambda panel: ("<svg></svg>", panel))
    monkeypatch.setattr("lightning_opt.callbacks.run_report.render_png", lambda *_: None)


def loader(shuffle=False):
    return ResumableLoader(TensorDataset(INPUTS), batch_size=4, shuffle=shuffle)


def trainer(tmp_path, callbacks, **options):
    defaults = {
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "max_epochs": 2,
        "log_every_n_steps": 4,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 1,
        "default_root_dir": tmp_path,
        "accelerator": "cpu",
        "callbacks": callbacks,
    }
    return pl.Trainer(**{**defaults, **options})


def fit(tmp_path, callbacks, model=None, ckpt_path=None, **options):
    run = trainer(tmp_path, callbacks, **options)
    torch.manual_seed(0)
    run.fit(model or Net(), loader(), DataLoader(TensorDataset(INPUTS), 8), ckpt_path=ckpt_path)
    return run


def curves(report):
    return {name: dict(zip(*curve.points(), strict=True)) for name, curve in report._metrics.items()}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_curves_are_what_the_logger_got(tmp_path, accumulate):
    report, rows = RunReport(), Rows()
    callbacks = [LogsLate("before"), report, LogsLate("after")]
    fit(tmp_path, callbacks, logger=rows, accumulate_grad_batches=accumulate, max_epochs=3, val_check_interval=2)
    got = curves(report)
    assert got.keys() == rows.points.keys() - {"epoch"}
    for name, points in got.items():
        for step, value in rows.points[name].items():
            assert points.pop(step) == pytest.approx(value, rel=1e-6), (name, step)
        assert points == {}, name
    late = curves(report)["late/after"]
    assert late == {step: step for step in late}
    assert {4, 8} <= set(late)


@pytest.mark.usefixtures("no_pictures")
def test_without_a_logger_the_curves_are_the_same(tmp_path):
    with_logger, without = RunReport(), RunReport()
    fit(tmp_path, [with_logger, LogsLate("x")], logger=Rows())
    fit(tmp_path, [without, LogsLate("x")], logger=False)
    assert curves(with_logger) == curves(without)
    assert curves(without)["val/loss"].keys() == {6, 12}


@pytest.mark.usefixtures("no_pictures")
def test_rates_are_those_that_the_step_used(tmp_path):
    report = RunReport()
    fit(tmp_path, [report])
    for name, first in (("w", 0.1), ("group 1", 0.5)):
        steps, rates = report._rates[name].points()
        assert steps == [4, 8, 12]
        assert rates == pytest.approx([first * 0.9 ** (step - 1) for step in steps])


def test_the_page_and_the_picture(tmp_path, capsys):
    class Contributing(Callback):
        def report_panels(self):
            return [
                Panel("drawn & good", lambda axes: axes.imshow([[0.0, 1.0]])),
                ("a tuple", lambda axes: axes.plot([1.0, 2.0])),
                Panel("raises", lambda axes: axes.nothing()),
                Panel("fails when rendered", lambda axes: axes.set_title("$\\frac{1}$")),
            ]

    class Failing(Callback):
        def report_panels(self):
            raise RuntimeError("no <panels>")

    report, model = RunReport(), Net()
    model.save_hyperparameters({"width": "<b>wide</b>"})
    run = trainer(tmp_path, [report, Contributing(), Failing()], logger=CSVLogger(tmp_path, "a"))
    model.report_panels = lambda: [("of the module", lambda axes: axes.plot([1.0]))]
    optimizers, schedulers = model.configure_optimizers()
    optimizers[0].report_panels = lambda: [("of the optimizer", lambda axes: axes.plot([1.0]))]
    model.configure_optimizers = lambda: (optimizers, schedulers)
    settings, random = dict(matplotlib.rcParams), torch.get_rng_state()
    run.fit(model, loader(), loader())
    assert report.path == tmp_path / "a" / "version_0" / "report.html"
    assert f"Run report: {report.path}" in capsys.readouterr().out
    page = report.path.read_text()
    for text in (
        "of the module",
        "of the optimizer",
        "drawn &amp; good",
        "a tuple",
        "AttributeError",
        "ParseSyntaxException",
        "no &lt;panels&gt;",
    ):
        assert text in page
    assert "width: &lt;b&gt;wide&lt;/b&gt;" in page
    assert f"<dd>{run.global_step}</dd>" in page
    assert page.count("<figure>") == page.count("<svg") == 4 + 1 + 2 + len(("loss", "both", "rate", "epoch_weight"))
    # nothing is fetched from elsewhere: the only addresses are names of XML namespaces
    outside = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?(?!data:|#)([^"\')\s>]+)', page)
    assert outside == []
    assert set(re.findall(r'https?://[^"\s<]+', page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    picture = report.path.with_suffix(".png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    assert width > 1500
    assert height > 1000
    assert dict(matplotlib.rcParams) == settings
    assert torch.equal(torch.get_rng_state(), random)
    assert matplotlib._pylab_helpers.Gcf.figs == {}


@pytest.mark.usefixtures("no_pictures")
def test_results_of_a_test_are_added_and_those_of_the_run_stay(tmp_path):
    report = RunReport()
    run = trainer(tmp_path, [report, ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1)])
    model = Net()
    run.fit(model, loader(), loader())
    before = report.path.read_text()
    assert "test/loss" not in before
    first = sorted(tmp_path.glob("*.ckpt"))[0]
    (result,) = run.test(model, loader(), ckpt_path=first, verbose=False)  # restores callbacks of step 5 too
    run.validate(model, loader(), verbose=False)
    after = report.path.read_text()
    assert "<dt>test/loss</dt>" in after
    assert f"<dd>{result['test/loss']:.5g}</dd>" in after
    assert "<dd>12</dd>" in after
    assert max(curves(report)["train/loss"]) == 12


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(ValueError("too <large>"), "ValueError: too &lt;large&gt;"), (KeyboardInterrupt(), "interrupted")],
)
@pytest.mark.usefixtures("no_pictures")
def test_an_interrupted_run_has_a_report(tmp_path, error, outcome):
    report, model = RunReport(), Net()
    model.fail_at = (9, error)
    with pytest.raises((ValueError, SystemExit)):
        fit(tmp_path, [report], model)
    assert outcome in report.path.read_text()
    assert curves(report)["train/loss"].keys() == {4, 8}
    assert curves(report)["val/loss"].keys() == {6}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("stop", [7, 8, 12])
def test_a_resumed_run_shows_all_of_it(tmp_path, stop):
    whole = RunReport()
    checkpoint = ModelCheckpoint(tmp_path / str(stop), every_n_train_steps=stop, save_top_k=-1)
    fit(tmp_path, [whole, LogsLate("x"), ResumeState(), checkpoint], max_epochs=4)
    (path,) = [p for p in (tmp_path / str(stop)).glob("*.ckpt") if f"step={stop}" in p.name]
    for callbacks in ([RunReport(), LogsLate("x"), ResumeState()], [ResumeState(), LogsLate("x"), RunReport()]):
        report = next(callback for callback in callbacks if isinstance(callback, RunReport))
        with pytest.warns(match="callbacks used to create the checkpoint"):
            fit(tmp_path, callbacks, ckpt_path=path, max_epochs=4)
        assert curves(report) == curves(whole)
        assert {n: c.points() for n, c in report._rates.items()} == {n: c.points() for n, c in whole._rates.items()}
        assert report._seconds > torch.load(path)["callbacks"]["RunReport"]["wall_time"] > 0


@pytest.mark.usefixtures("no_pictures")
def test_a_second_run_with_the_same_callback_starts_anew(tmp_path):
    report = RunReport()
    fit(tmp_path, [report], max_epochs=3)
    fit(tmp_path, [report], max_epochs=1)
    assert curves(report)["train/loss"].keys() == {4}
    run = fit(tmp_path, [report], max_epochs=1)
    run.fit_loop.max_epochs = 2
    run.fit(run.lightning_module, loader(), loader())  # goes on
    assert curves(report)["train/loss"].keys() == {4, 8, 12}


@pytest.mark.parametrize(
    ("loggers", "folder"),
    [
        (False, "."),
        ([Rows(), CSVLogger("elsewhere")], "rows/7"),
        ([CSVLogger("here", "name"), Rows()], "here/name/version_0"),
    ],
)
@pytest.mark.usefixtures("no_pictures")
def test_the_report_lies_where_the_first_logger_writes(tmp_path, monkeypatch, loggers, folder):
    monkeypatch.chdir(tmp_path)
    report = RunReport()
    fit(Path("."), [report], logger=loggers, max_epochs=1)
    assert report.path.resolve() == tmp_path / folder / "report.html"
    assert report.path.is_file()


@pytest.mark.usefixtures("no_pictures")
def test_a_folder_that_cannot_be_written_costs_the_report_only(tmp_path):
    (tmp_path / "file").write_text("")
    report, model = RunReport(), Net()
    with pytest.warns(match=r"RunReport could not write the report to .*file.*NotADirectoryError"):
        fit(tmp_path / "file" / "sub", [report], model)
    assert report.path is None


def test_fast_dev_run_writes_nothing(tmp_path):
    report = RunReport()
    fit(tmp_path, [report], fast_dev_run=2)
    assert report.path is None
    assert list(tmp_path.iterdir()) == []


def test_a_curve_is_bounded_and_keeps_its_shape():
    curve, resumed = Curve(), Curve()
    count = 5 * MAX_POINTS + 3
    for step in range(1, count + 1):
        value = 1000.0 if step == 77 else -5.0 if step == 9999 else float(step)
        curve.add(step, value)
        resumed.add(step, value)
        if step % 1777 == 0:
            resumed = Curve.from_state_dict(resumed.state_dict())
    steps, values = curve.points()
    assert MAX_POINTS // 2 <= len(steps) <= MAX_POINTS + 1
    assert resumed.points() == (steps, values)
    assert curve.lowest == resumed.lowest == (9999.0, -5.0)
    assert curve.highest == (count, count)
    assert curve.last == (count, count)
    assert steps == sorted(steps)
    assert curve.stride == 8  # 5 * 4096 points in fewer than 4096
    # each kept point is the mean of 8 consecutive ones, 1 to 8 first
    assert (steps[0], values[0]) == (4.5, 4.5)
    assert values[9] == pytest.approx((sum(range(73, 81)) - 77 + 1000) / 8)


def test_a_point_at_the_last_step_replaces_it():
    curve = Curve()
    for step, value in [(1, 5.0), (2, 9.0), (2, 7.0), (3, 6.0), (3, float("nan"))]:
        curve.add(step, value)
    steps, values = curve.points()
    assert steps == [1, 2, 3]
    assert values[:2] == [5.0, 7.0]
    assert curve.highest == (2, 7.0)


def curve(*values):
    made = Curve()
    for step, value in enumerate(values, 1):
        made.add(step, value)
    return made


def test_curves_are_drawn_in_full():
    noisy = [2.0 + (-1) ** step for step in range(100)]
    panels = curve_panels({"train/loss": curve(*noisy), "val/loss": curve(3.0, 1.0, float("nan"), 2.0)}, {})
    figure = Figure()
    panels[0].draw(figure.add_subplot())
    (axes,) = figure.axes
    raw, smooth, validation, cross = axes.lines
    assert raw.get_ydata().tolist() == noisy
    # a triangle over 5 points weighs the two values of a noise that alternates 5 to 4, or 4 to 5
    assert abs(smooth.get_ydata()[3:-3] - 2.0).max() < 0.12
    assert validation.get_xdata().tolist() == [1, 2, 3, 4]
    assert cross.get_xdata().tolist() == [3]  # where the value is not finite
    assert axes.get_xlim() == (0, 101)
    low, high = axes.get_ylim()
    assert low <= 1
    assert high >= 3


def test_one_quantity_has_one_panel():
    two = curve(1.0, 2.0)
    names = ["val_loss", "train/loss_step", "train/loss_epoch", "test/loss", "opt/median_step", "train/acc", "val/acc"]
    panels = curve_panels(dict.fromkeys(names, two), {"a": two, "b": curve(1.0, 2.0), "c": curve(1.0, 3.0)})
    assert [panel.title for panel in panels] == ["loss", "acc", "learning rate", "opt/median_step"]
    svgs = {panel.title: render_svg(panel)[0] for panel in panels}
    assert all(f">{label}  2<" in svgs["loss"] for label in ("train", "train epoch", "val", "test"))
    assert ">a, b  2<" in svgs["learning rate"]
    assert ">c  3<" in svgs["learning rate"]
    many = {f"grad/layer{i}": two for i in range(MOST_PANELS + 1)}
    assert [panel.title for panel in curve_panels(many, {})] == ["grad"]
    nan = curve(float("nan"), float("inf"))
    assert ">no finite value<" in render_svg(curve_panels({"loss": nan}, {})[0])[0]
