import math
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import TensorDataset

from lightning_opt.callbacks import GradNormRecorder, ResumeState
from lightning_opt.callbacks._report_render import render_svg
from lightning_opt.callbacks.grad_norm_recorder import gradient_norm
from lightning_opt.data import ResumableLoader
from lightning_opt.schedules import NormRecord

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

settings = {"GradNormRecorder": [{}, {"norm": "l1", "every_n_steps": 3}]}
INPUTS = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))


class Net(pl.LightningModule):
    def __init__(self, make=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5)):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
        self.make = make
        self.seen = []

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def on_before_optimizer_step(self, optimizer):
        self.seen.append(torch.cat([p.grad.flatten() for p in self.parameters()]).double())

    def configure_optimizers(self):
        return self.make(self.parameters())


def fit(folder, *callbacks, net=None, ckpt_path=None, batch_size=8, seed=0, **options):
    """Two epochs of six steps."""
    net = net or Net()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    options = {"max_epochs": 2, "enable_checkpointing": False} | quiet | options
    trainer = pl.Trainer(callbacks=list(callbacks), default_root_dir=folder, **options)
    pl.seed_everything(seed, verbose=False)
    trainer.fit(net, ResumableLoader(TensorDataset(INPUTS), batch_size, shuffle=True, seed=1), ckpt_path=ckpt_path)
    return net


def record(folder):
    return NormRecord.load(folder / "gradnorms.npz")


@pytest.mark.parametrize(
    ("make", "norm", "order"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5), "l2", 2),
        (lambda p: torch.optim.AdamW(p, lr=0.01), "l1", 1),
    ],
)
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "batch_size": 4}, {"gradient_clip_val": 1e-3}])
def test_one_norm_a_step_of_what_the_optimizer_gets_before_clipping(tmp_path, make, norm, order, options):
    net = fit(tmp_path, GradNormRecorder(), net=Net(make), **options)
    written = record(tmp_path)
    assert (written.norm, written.optimizer) == (norm, type(net.optimizers().optimizer).__name__)
    assert (written.steps, written.total_steps, written.complete) == (12, 12, True)
    expected = torch.stack([torch.linalg.vector_norm(g, order) for g in net.seen])
    # float32 sums of some 50 terms
    torch.testing.assert_close(written.norms, expected, rtol=1e-6, atol=0)
    assert written.norms.min() > 1e-2  # not clipped


def test_facts_in_the_file(tmp_path):
    fit(tmp_path, GradNormRecorder(every_n_steps=5), batch_size=4, accumulate_grad_batches=2)
    written = record(tmp_path)
    assert len(written.norms) == 3  # of steps 0, 5 and 10
    assert (written.batch_size, written.accumulate_grad_batches, written.world_size, written.lr) == (4, 2, 1, 0.1)
    assert (written.every_n_steps, written.complete, written.version != "") == (5, True, True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_the_norm_of_many_tensors(dtype):
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(n, 3, generator=generator).to(dtype) for n in (1, 20, 300, 2000)]
    flat = torch.cat([g.flatten() for g in gradients]).to(torch.complex128 if dtype.is_complex else torch.float64)
    for name, order in (("l1", 1), ("l2", 2)):
        expected = torch.linalg.vector_norm(flat, order)
        # float32 sums over some thousand terms, one tensor of them alone; the inputs are exact in every dtype
        assert gradient_norm(gradients, name).item() == pytest.approx(expected.item(), rel=1e-6)
    mixed = [*gradients, torch.full((4,), 2.0)]
    assert gradient_norm(mixed, "l1").item() == pytest.approx(flat.abs().sum().item() + 8, rel=1e-6)


def test_half_precision_does_not_overflow():
    assert gradient_norm([torch.full((1000,), 60000.0, dtype=torch.float16)], "l1").item() == 60000e3


def test_sparse_gradients_count_with_their_sum():
    g = torch.sparse_coo_tensor(torch.tensor([[1, 1, 3]]), torch.tensor([1.0, 2.0, -4.0]), (5,), check_invariants=True)
    assert gradient_norm([g], "l2").item() == pytest.approx(5.0)


def test_a_step_that_mixed_precision_skips_is_not_recorded():
    """With a GradScaler the optimizer is not called where a gradient is not finite; there is none on the CPU here."""
    recorder, net = GradNormRecorder(), Net()
    optimizer = net.make(net.parameters())
    trainer = SimpleNamespace(
        global_step=0, optimizers=[optimizer], estimated_stepping_batches=4, train_dataloader=None,
        accumulate_grad_batches=1, world_size=1, should_stop=False, is_global_zero=True,
    )  # fmt: skip
    recorder.on_train_start(trainer, net)
    for value in (1.0, math.inf, 2.0, 3.0):
        recorder.on_train_batch_start(trainer, net, None, 0)
        for p in net.parameters():
            p.grad = torch.full_like(p, value)
        recorder.on_before_optimizer_step(trainer, net, optimizer)
        if value < math.inf:
            optimizer.step()
    size = math.sqrt(sum(p.numel() for p in net.parameters()))
    state = recorder.state_dict()
    torch.testing.assert_close(state["norms"], torch.tensor([1.0, 2.0, 3.0]).double() * size, rtol=1e-6, atol=0)
    assert (state["steps"], state["skipped"]) == (3, 1)


def test_the_first_evaluation_of_a_closure_counts(tmp_path):
    net = fit(tmp_path, GradNormRecorder(), net=Net(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3)))
    assert len(record(tmp_path).norms) == 12
    assert len(net.seen) > 12
    assert record(tmp_path).norms[0].item() == pytest.approx(net.seen[0].norm().item(), rel=1e-6)


class Stops(Callback):
    def __init__(self, step, error=None):
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.should_stop = True
            if self.error:
                raise self.error


def test_crashed_and_stopped_runs_are_recognised(tmp_path):
    fit(tmp_path, GradNormRecorder(), Stops(7))
    assert (record(tmp_path).steps, record(tmp_path).total_steps, record(tmp_path).complete) == (7, 12, False)
    error = RuntimeError("planted")
    with pytest.raises(RuntimeError, match="planted"):
        fit(tmp_path, GradNormRecorder(), Stops(5, error))
    assert (len(record(tmp_path).norms), record(tmp_path).complete) == (5, False)


def test_written_beside_the_checkpoints_and_with_each_of_them(tmp_path):
    class Look(Callback):
        found = []

        def on_train_batch_start(self, trainer, *_):
            path = tmp_path / "ckpt" / "gradnorms.npz"
            self.found.append(NormRecord.load(path).steps if path.exists() else 0)

    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=4, save_top_k=-1)
    look = Look()
    fit(tmp_path, GradNormRecorder(), look, saver, enable_checkpointing=True)
    assert look.found == [0] * 4 + [4] * 4 + [8] * 4
    assert {path.name for path in (tmp_path / "ckpt").iterdir()} >= {"gradnorms.npz"}
    fit(tmp_path, GradNormRecorder(dirpath=str(tmp_path / "own"), filename="norms.npz"))
    assert NormRecord.load(tmp_path / "own/norms.npz").complete


@pytest.mark.parametrize("batches", [4, 6, 7, 11])
def test_a_resumed_run_continues_the_record_without_a_gap_or_a_step_twice(tmp_path, batches):
    class Save(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.fit_loop.total_batch_idx + 1 == batches:
                trainer.save_checkpoint(tmp_path / "c.ckpt")

    options = {"accumulate_grad_batches": 2}
    fit(tmp_path, GradNormRecorder(), ResumeState(), Save(), **options)
    whole = record(tmp_path)
    (tmp_path / "gradnorms.npz").unlink()
    fit(tmp_path, GradNormRecorder(), ResumeState(), ckpt_path=tmp_path / "c.ckpt", seed=9, **options)
    assert torch.equal(record(tmp_path).norms, whole.norms)
    assert (record(tmp_path).steps, record(tmp_path).complete) == (6, True)


def test_a_record_that_began_late_says_so(tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "c.ckpt")

    fit(tmp_path, ResumeState(), Save())
    with pytest.warns(UserWarning, match="the record lacks the first 4 steps"):
        fit(tmp_path, GradNormRecorder(), ResumeState(), ckpt_path=tmp_path / "c.ckpt")
    assert len(record(tmp_path).norms) == 8
    assert (record(tmp_path).steps, record(tmp_path).total_steps, record(tmp_path).complete) == (8, 12, False)


def test_a_resumed_run_that_ends_before_its_training_begins_leaves_the_record_alone(tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "c.ckpt")

    class Fails(Callback):
        def on_train_start(self, *_):
            raise RuntimeError("planted")

    fit(tmp_path, GradNormRecorder(), Save())
    with pytest.raises(RuntimeError, match="planted"):
        fit(tmp_path, Fails(), GradNormRecorder(), ckpt_path=tmp_path / "c.ckpt")
    assert (record(tmp_path).steps, record(tmp_path).complete) == (12, True)


def test_a_run_without_a_known_end_is_complete_once_it_has_ended(tmp_path):
    with pytest.raises(RuntimeError, match="planted"):
        fit(tmp_path, GradNormRecorder(), Stops(15, RuntimeError("planted")), max_epochs=-1)
    assert (record(tmp_path).steps, record(tmp_path).complete) == (15, False)
    fit(tmp_path, GradNormRecorder(), Stops(15), max_epochs=-1)
    assert (record(tmp_path).steps, record(tmp_path).complete) == (15, True)


def test_norms_stay_on_the_device_until_they_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_opt.callbacks.grad_norm_recorder.FLUSH_AT", 5)
    recorder = GradNormRecorder()
    lengths = []

    class Watch(Callback):
        def on_train_batch_end(self, *_):
            lengths.append((len(recorder._norms), len(recorder._fresh)))

    fit(tmp_path, recorder, Watch())
    assert lengths == [
        (0, 1),
        (0, 2),
        (0, 3),
        (0, 4),
        (5, 0),
        (5, 1),
        (5, 2),
        (5, 3),
        (5, 4),
        (10, 0),
        (10, 1),
        (10, 2),
    ]


def test_the_panel_draws(tmp_path):
    recorder = GradNormRecorder()
    assert recorder.report_panels() == []
    fit(tmp_path, recorder)
    (panel,) = recorder.report_panels()
    assert "l2 norm of the gradient" in render_svg(panel)[0] or "<svg" in render_svg(panel)[0]


def test_refusals(tmp_path):
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.SGD(self.net[2].parameters(), 0.1)]

    with pytest.raises(
        MisconfigurationException, match="GradNormRecorder needs a run with one optimizer, this one has 2"
    ):
        fit(tmp_path, GradNormRecorder(), net=Two())

    class Nothing(Net):
        def configure_optimizers(self):
            return None

    with (
        pytest.warns(UserWarning, match="this fit will run with no optimizer"),
        pytest.raises(MisconfigurationException, match="this one has 0"),
    ):
        fit(tmp_path, GradNormRecorder(), net=Nothing())
    trainer = SimpleNamespace(strategy=object())
    with pytest.raises(MisconfigurationException, match="does not support object, where no rank holds the whole"):
        GradNormRecorder().setup(trainer, Net(), "fit")
    for kwargs, message in [
        ({"norm": "l3"}, "norm must be one of"),
        ({"every_n_steps": 0}, "every_n_steps must be >= 1"),
        ({"filename": "norms.csv"}, "must be the name of a file that ends in .npz"),
        ({"filename": "a/b.npz"}, "must be the name of a file"),
    ]:
        with pytest.raises(ValueError, match=message):
            GradNormRecorder(**kwargs)


def test_fast_dev_run_writes_nothing(tmp_path):
    fit(tmp_path, GradNormRecorder(), fast_dev_run=True)
    assert not list(tmp_path.iterdir())
