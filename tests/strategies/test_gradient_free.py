"""The base of strategies without gradients, by a random search."""

import csv
import logging
import math
import types
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_opt.callbacks import (
    AdaptiveBatchSize,
    GlobalODERegularization,
    GradNormRecorder,
    LanczosLRLearner,
    StabilityBooster,
)
from lightning_opt.data import ResumableLoader
from lightning_opt.strategies._candidates import CandidateLoss, FlatParameters, parts
from lightning_opt.strategies._gradient_free import GradientFreeStrategy

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class RandomSearch(GradientFreeStrategy):
    """Takes the best of eight candidates around the present point."""

    log_prefix = "random_search"

    def start(self, point):
        self.point, self.steps = point, 0

    def search(self):
        self.steps += 1
        generator = torch.Generator().manual_seed(self.steps)
        candidates = self.point + 0.1 * torch.randn(8, len(self.point), generator=generator, dtype=self.point.dtype)
        own = self.own_part(8)
        losses = self.gather(self.evaluate(candidates[own.start : own.stop]), own, 8)
        self.point = candidates[losses.argmin()].clone()
        return self.point, {"best": losses.min().item()}

    def search_state(self):
        return {"point": self.point, "steps": self.steps}

    def load_search_state(self, states):
        self.point, self.steps = states[0]["point"], states[0]["steps"]


def data(n=32):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, 5, generator=generator)
    return TensorDataset(inputs, (inputs @ torch.randn(5, 3, generator=generator)).argmax(dim=1))


class Net(pl.LightningModule):
    def __init__(self, net=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = net or nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        self.calls, self.seen = 0, []

    def training_step(self, batch, batch_idx):
        self.calls += 1
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(batch[1]))
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(outputs["loss"].item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0, weight_decay=0.1)


class Validated(Net):
    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), batch_size=len(batch[1]))


def trainer(strategy=None, **options):
    defaults = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(strategy=strategy or RandomSearch(), **{**defaults, **options})


def loader(**options):
    return ResumableLoader(data(), 8, shuffle=True, **options)


def candidate_loss(module, vectorize="auto", **options):
    module.log = lambda *args, **kwargs: None
    strategy = types.SimpleNamespace(precision_plugin=pl.plugins.Precision())
    flat = FlatParameters({n: p for n, p in module.named_parameters() if p.requires_grad})
    return flat, CandidateLoss(module, flat, strategy, vectorize, **options)


# --- the evaluation of candidates ---


def naive_losses(module, flat, points, batch):
    before, losses = flat.read(), []
    for point in points:
        flat.write(point)
        with torch.no_grad():
            losses.append(module.training_step(batch, 0))
    flat.write(before)
    return torch.stack(losses)


def batch_of(n=32):
    return data(n).tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_are_those_of_a_loop(dtype):
    module = Net().to(dtype)
    batch = (batch_of()[0].to(dtype), batch_of()[1])
    flat, at_once = candidate_loss(module)
    points = flat.read() + torch.randn(50, flat.dimension, dtype=dtype)
    expected = naive_losses(module, flat, points, batch)
    found = at_once(points, batch, 0)
    assert at_once._vectorize == "always"
    assert torch.allclose(found, expected, rtol=10 * torch.finfo(dtype).eps)
    assert torch.allclose(candidate_loss(module, "never")[1](points, batch, 0), expected, rtol=0, atol=0)
    assert not found.requires_grad
    assert found.std() > 0.1
    assert at_once(points[:0], batch, 0).shape == (0,)


def test_chunks_and_neighbors_change_no_bit():
    """So the number of ranks does not either."""
    module = Net()
    flat, whole = candidate_loss(module, "always")
    points = flat.read() + torch.randn(40, flat.dimension)
    expected = whole(points, batch_of(), 0)
    for chunk in (1, 3, 16):
        assert torch.equal(candidate_loss(module, "always", chunk=chunk)[1](points, batch_of(), 0), expected)
    assert torch.equal(whole(points[7:20], batch_of(), 0), expected[7:20])


def test_a_chunk_follows_the_size_of_the_results():
    """A batch ten times as large makes chunks a tenth as large, about: bytes of weights do not count."""
    sizes = []
    for n in (320, 3200):
        flat, at_once = candidate_loss(Net())
        at_once(flat.read()[None], batch_of(n), 0)
        sizes.append(at_once._chunk)
    assert 8 < sizes[0] / sizes[1] < 12


class Branches(Net):
    """Branches on a value, which vmap cannot."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if loss < 1.0 else 2 * loss


class Remembers(Net):
    """Has a metric and a buffer that training_step writes to."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(3)
        self.register_buffer("count", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.count += 1
        self.accuracy.update(self.net(batch[0]), batch[1])
        return super().training_step(batch, batch_idx)


class Recurrent(Net):
    """Whose cuDNN-style list of weights functional_call does not replace."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(5, 4, batch_first=True)
        self.net = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        states = self.rnn(batch[0][:, None, :])[0][:, -1]
        return nn.functional.cross_entropy(self.net(states), batch[1])


@pytest.mark.parametrize("kind", [Branches, Remembers, Recurrent])
def test_a_module_that_vmap_cannot_evaluate_is_evaluated_in_a_loop(kind, caplog):
    module = kind()
    flat, losses = candidate_loss(module)
    points = flat.read() + torch.randn(6, flat.dimension)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        found = losses(points, batch_of(), 0)
    assert "one candidate after the other" in caplog.text
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert module.calls == 0
    assert torch.equal(found, naive_losses(module, flat, points, batch_of()))
    with pytest.raises(Exception, match="vmap|in-place|data-dependent|atching rule"):
        candidate_loss(kind(), "always")[1](points, batch_of(), 0)


def test_every_candidate_sees_the_same_dropout():
    losses = {}
    for vectorize in ("always", "never"):
        module = Net(nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 3)))
        flat, losses_of = candidate_loss(module, vectorize, chunk=2)
        torch.manual_seed(1)
        losses[vectorize] = losses_of(flat.read().repeat(5, 1), batch_of(), 0)
        drawn = torch.rand(1)
        torch.manual_seed(1)
        assert torch.equal(drawn, torch.rand(1))  # the global random state is as it was
        assert (losses[vectorize] == losses[vectorize][0]).all()
    flat, by_itself = candidate_loss(module)
    by_itself(flat.read()[None], batch_of(), 0)
    assert by_itself._vectorize == "always"  # though vmap draws others than a loop


def test_a_batch_that_is_skipped_has_no_loss():
    module = Net()
    module.training_step = lambda batch, batch_idx: None
    flat, losses = candidate_loss(module)
    assert losses(flat.read()[None], batch_of(), 0).isnan().all()


def test_parts_cover_all_candidates_evenly():
    for n in range(9):
        for ranks in range(1, 6):
            shares = parts(n, ranks)
            assert [i for share in shares for i in share] == list(range(n))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_parameters_of_two_kinds_are_refused():
    with pytest.raises(ValueError, match="must be of one dtype and on one device"):
        FlatParameters({"a": nn.Parameter(torch.zeros(1)), "b": nn.Parameter(torch.zeros(1).double())})
    with pytest.raises(ValueError, match="must be a parameter to search over"):
        FlatParameters({})


# --- in the Trainer ---


def test_one_step_is_one_global_step_and_one_logged_value(tmp_path):
    module, logger = Net(), CSVLogger(tmp_path)
    fitting = trainer(logger=logger, max_epochs=2)
    fitting.fit(module, loader())
    assert fitting.global_step == 8
    assert module.calls == 8  # candidates leave no trace
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    logged = [float(row["loss_step"]) for row in rows if row["loss_step"]]
    assert logged == pytest.approx(module.seen)
    best = [float(row["random_search/best"]) for row in rows if row["random_search/best"]]
    assert best == pytest.approx(logged, rel=1e-5)  # the chosen one
    epochs = [float(row["loss_epoch"]) for row in rows if row["loss_epoch"]]
    assert epochs == pytest.approx([sum(logged[:4]) / 4, sum(logged[4:]) / 4])
    assert logged[-1] < logged[0]


def test_no_graph_no_gradient_and_no_decay():
    module = Net()
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    module.net[0].weight.requires_grad_(False)
    fitting = trainer(max_steps=3)
    fitting.fit(module, loader())
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(module.net[0].weight, start["net.0.weight"])
    assert torch.equal(FlatParameters(dict(module.net[2].named_parameters())).read(), fitting.strategy.point[8:])


def test_only_what_the_optimizer_holds_is_searched():
    module = Net()
    module.configure_optimizers = lambda: torch.optim.SGD(module.net[2].parameters(), lr=1.0)
    before = module.net[0].weight.clone()
    fitting = trainer(max_steps=2)
    fitting.fit(module, loader())
    assert torch.equal(module.net[0].weight, before)
    assert fitting.strategy.flat.dimension == 27


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precisions(precision):
    module = Net()
    fitting = trainer(max_epochs=4, precision=precision)
    fitting.fit(module, loader())
    assert fitting.strategy.candidate_loss._vectorize == "always"
    assert sum(module.seen[-4:]) < sum(module.seen[:4])
    assert all(math.isfinite(loss) for loss in module.seen)


def test_a_compiled_network_is_evaluated_eagerly():
    module = Net()
    module.net.compile(backend="aot_eager")
    fitting = trainer(max_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitting.fit(module, loader())
    assert fitting.strategy.candidate_loss._vectorize == "always"


def test_a_resumed_run_is_the_whole_one(tmp_path):
    whole = Net()
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1, filename="{epoch}")
    trainer(max_epochs=4, callbacks=[saving], enable_checkpointing=True).fit(whole, loader())
    resumed = Net()
    fitting = trainer(max_epochs=4)
    fitting.fit(resumed, loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.seen == whole.seen[8:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert saved["lightning_opt_search"]["ranks"][0]["steps"] == 8


def test_a_checkpoint_without_a_search_begins_one(tmp_path):
    path = tmp_path / "sgd.ckpt"
    first = trainer("auto", max_epochs=1)
    first.fit(Net(), loader())
    first.save_checkpoint(path)
    fitting = trainer(max_epochs=2)
    with pytest.warns(UserWarning, match="written with a strategy without a search; the search begins at its weights"):
        fitting.fit(Net(), loader(), ckpt_path=path)
    assert fitting.strategy.steps == 4


def test_weights_alone_and_evaluation_alone(tmp_path):
    fitting, module = trainer(max_steps=2), Validated()
    fitting.fit(module, loader(), loader())
    fitting.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "lightning_opt_search" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)
    (result,) = trainer().validate(module, loader(), verbose=False)
    assert result["val"] == pytest.approx(
        nn.functional.cross_entropy(module.net(batch_of()[0]), batch_of()[1]).item(), rel=1e-5
    )


def test_a_checkpoint_that_was_evaluated_is_not_resumed(tmp_path):
    fitting = trainer(max_steps=3)
    fitting.fit(Net(), loader())
    fitting.save_checkpoint(tmp_path / "some.ckpt")
    again = trainer(max_steps=1)
    again.validate(Validated(), loader(), ckpt_path=tmp_path / "some.ckpt", verbose=False)
    again.fit(Net(), loader())
    assert again.strategy.steps == 1


def test_a_trainer_fits_twice_and_runs_fast():
    module, fitting = Net(), trainer(max_epochs=1)
    fitting.fit(module, loader())
    fitting.fit_loop.max_epochs = 2
    fitting.fit(module, loader())
    assert fitting.global_step == 8
    assert fitting.strategy.steps == 4  # a new search
    trainer(fast_dev_run=True).fit(Validated(), loader(), loader())


def test_a_plain_loader_has_one_share():
    fitting = trainer(max_epochs=1)
    fitting.fit(Net(), DataLoader(data(), 8, shuffle=True))
    assert fitting.num_training_batches == 4
    assert fitting.train_dataloader.sampler.num_replicas == 1


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Fetches(Net):
    def training_step(self, dataloader_iter):
        return super().training_step(next(dataloader_iter)[0], 0)


class Clips(Net):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, 1.0, "norm")


def normalized():
    return Net(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))


def frozen():
    return Net().requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Net, {"accumulate_grad_batches": 2}, "cannot accumulate: accumulate_grad_batches must be 1, got 2"),
        (Net, {"gradient_clip_val": 1.0}, "no gradients to clip"),
        (Clips, {}, "no gradients to clip"),
        (Manual, {}, "Manual optimizes by hand"),
        (Fetches, {}, "dataloader_iter"),
        (normalized, {}, "net.1 of type BatchNorm1d needs track_running_stats=False"),
        (Net, {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))}, "got 16-mixed"),
        (frozen, {}, "must be a parameter to search over"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_what_has_no_meaning_is_refused_before_the_first_step(make, options, message):
    module = make()
    with pytest.raises(MisconfigurationException, match=message):
        trainer(max_steps=1, **options).fit(module, loader())
    assert module.calls == 0


@pytest.mark.parametrize(
    "callback",
    [AdaptiveBatchSize, GradNormRecorder, LanczosLRLearner, StabilityBooster, GlobalODERegularization],
)
def test_a_callback_that_works_on_gradients_is_refused(callback):
    module = Net()
    with pytest.raises(MisconfigurationException, match=f"no gradients, and {callback.__name__} works on them"):
        trainer(callbacks=[callback()], max_steps=1).fit(module, loader())
    assert module.calls == 0


def test_a_communication_hook_is_refused():
    with pytest.raises(MisconfigurationException, match="sends no gradients; leave out ddp_comm_hook"):
        trainer(RandomSearch(ddp_comm_hook=print), max_steps=1).fit(Net(), loader())


def test_wrong_values():
    with pytest.raises(ValueError, match="vectorize must be one of 'auto', 'always', 'never'; got 'yes'"):
        RandomSearch(vectorize="yes")
    with pytest.raises(ValueError, match="chunk must be >= 1"):
        RandomSearch(chunk=0)
