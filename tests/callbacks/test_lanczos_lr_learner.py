import copy
import math
import os
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    SequentialLR,
)
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_opt.callbacks import LanczosLRLearner, ResumeState, RunReport
from lightning_opt.callbacks import lanczos_lr_learner as learner_module
from lightning_opt.callbacks._refresh_schedule import DENSE, RefreshSchedule, refreshes
from lightning_opt.curvature import step_rule
from lightning_opt.data import ResumableLoader
from lightning_opt.schedules import LinearDecayLR
from lightning_opt.testing._ranks import on_two_ranks

settings = {
    "LanczosLRLearner": [
        {},
        {"decay": "linear", "refresh_every_n_steps": 3, "rule": "polyak", "mu": "min", "start": "optimizer"},
        {"rule": "ssgdmn", "refresh_every_n_epochs": 1, "curvature_samples": 3, "products": "finite_difference"},
        {"refresh_every_n_steps": 3, "curvature_batches": 3, "include_weight_decay": True, "param_filter": ["!*.bias"]},
        {"refresh_every_n_steps": 2, "curvature": "ggn"},
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


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: LambdaLR(o, lambda step: step / 10),
        lambda o: LinearDecayLR(o, 50, warmup_steps=4),
        lambda o: OneCycleLR(o, 123.0, 50, cycle_momentum=False),
        lambda o: CyclicLR(o, 1.0, 123.0, step_size_up=4, cycle_momentum=False),
        lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=4), CosineAnnealingLR(o, 46)], [4]),
        lambda o: ChainedScheduler([LinearLR(o, 0.1, total_iters=4), ExponentialLR(o, 0.9)]),
    ],
)
def test_the_learned_rate_is_the_base_of_the_schedule(schedule):
    """With the rate learned once, the rates are those of the schedule over its base rates, times what was learned."""

    def make(parameters):
        optimizer = sgd(lr=123.0)(parameters)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"}}

    plain, trainer = fit(Callback(), Net(make))
    base = trainer.optimizers[0].param_groups[0]["initial_lr"]
    learner = LanczosLRLearner(refresh_every_n_steps=1000, on_scheduler="rebase")
    rebased, _ = fit(learner, Net(make))
    learned = learner.state_dict()["lr"]
    assert learned != pytest.approx(base, rel=1e-3)
    expected = [rate[0] / base * learned for rate in plain.rates]
    assert [rate[0] for rate in rebased.rates] == pytest.approx(expected, rel=1e-9, abs=0)


def test_a_learned_rate_cannot_be_the_base_of_a_schedule_that_starts_from_zero():
    def make(parameters):
        optimizer = sgd(lr=0.0)(parameters)
        return [optimizer], [LambdaLR(optimizer, lambda step: 1.0)]

    with pytest.raises(MisconfigurationException, match="they are 0.0; give the optimizer a positive lr"):
        fit(LanczosLRLearner(on_scheduler="rebase"), Net(make))


def test_a_decay_is_not_laid_over_a_schedule():
    """It would write the scheduler's rates over in every step."""

    def make(p):
        optimizer = torch.optim.SGD(p, 0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]

    with pytest.raises(MisconfigurationException, match="scheduler"):
        fit(LanczosLRLearner(on_scheduler="rebase", decay="linear"), Net(make))


def test_a_run_that_is_resumed_without_the_callback_s_state(tmp_path):
    """Its first refresh is behind step 16, where the interval is chosen, with no step timed."""

    class Save(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 20:
                trainer.save_checkpoint(tmp_path / "c.ckpt")

    fit(Save(), max_epochs=3)
    learner = LanczosLRLearner()
    _, trainer = fit(learner, max_epochs=6, ckpt_path=tmp_path / "c.ckpt")
    assert trainer.global_step == 48
    state = learner.state_dict()
    assert state["schedule"]["interval"] >= 1  # chosen at the second refresh, at step 40
    assert state["learned_at"] >= 40


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

    complex_net = Net()
    complex_net.net[0].weight = nn.Parameter(torch.ones(8, 5, dtype=torch.complex64))
    cases = [
        ("one optimizer, this one has 2", {"module": Net(two)}),
        ("not for RMSprop", {"module": Net(torch.optim.RMSprop)}),
        ("dampening=0", {"module": Net(sgd(dampening=0.1, nesterov=False))}),
        ("optimizes by hand; give loss_fn", {"module": Manual()}),
        ("precision='bf16-true' is too coarse", {"precision": "bf16-true"}),
        ("net.0.weight is torch.bfloat16; convert it, or freeze it", {"module": Net().bfloat16()}),
        ("net.0.weight is torch.complex64; convert it, or freeze it", {"module": complex_net}),
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


# --- what is measured ---


def measured(patch):
    """The dense operators of all refreshes to come."""
    seen, original = [], learner_module.lanczos
    patch.setattr(learner_module, "lanczos", lambda op, *a, **k: seen.append(op.to_dense()) or original(op, *a, **k))
    return seen


class Called(Net):
    """As :class:`Net`, but it calls itself, and adds a penalty that is no part of the outputs' loss."""

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        penalty = sum(p.pow(4).sum() for p in self.parameters())
        return nn.functional.cross_entropy(self(batch[0]), batch[1]) + penalty


@pytest.mark.parametrize("products", ["autograd", "finite_difference"])
def test_gauss_newton_is_measured_without_knowing_the_loss(monkeypatch, products):
    """J' (diag p - p p') J of the first step, over its two micro-batches; and never a negative eigenvalue."""
    seen = measured(monkeypatch)
    learner = LanczosLRLearner(curvature="ggn", refresh_every_n_steps=4, curvature_samples="all", products=products)
    loader = DataLoader(TensorDataset(*data(16)), 4)
    fit(learner, Called(), loader=loader, accumulate_grad_batches=2)
    module, (inputs, _) = Called(), data(16)
    p = module(inputs[:8]).softmax(dim=1).detach()
    jacobian = torch.func.jacrev(lambda q: torch.func.functional_call(module, q, inputs[:8]))(
        dict(module.named_parameters())
    )
    rows = torch.cat([part.detach().flatten(2) for part in jacobian.values()], dim=2)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("nop,noq,nqr->pr", rows, middle, rows) / 8
    # float32 sums of 8 terms; central differences of float32 have a relative error of 1e-4 or so
    tolerance = 1e-5 if products == "autograd" else 1e-2
    assert (seen[0] - expected).norm() <= tolerance * expected.norm()
    if products == "autograd":
        assert min(torch.linalg.eigvalsh(matrix).min() for matrix in seen) > -1e-5 * max(map(torch.norm, seen))


def test_gauss_newton_needs_a_module_that_is_called_once():
    class Twice(Called):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]) + self(batch[0]), batch[1])

    class Pair(Called):
        def forward(self, inputs):
            return self.net(inputs), inputs

        def training_step(self, batch, batch_idx):
            return self(batch[0])[0].square().mean()

    class Around(Called):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    cases = [
        (Net, "needs the outputs of the network: give Net a forward method"),
        (Twice, "must call Twice once, as a function of its inputs, it called it 2 times"),
        (Around, "must call Around once, as a function of its inputs, it called it 0 times"),
        (Pair, "Pair must return a tensor of outputs, got tuple"),
    ]
    for make in (sgd(), torch.optim.Adam):
        for cls, message in cases:
            module = cls(make)
            with pytest.raises(MisconfigurationException, match=message):
                fit(LanczosLRLearner(curvature="ggn"), module)
            assert not module.rates


def test_a_batch_without_a_loss_has_no_gauss_newton_matrix():
    class Skips(Called):
        def training_step(self, batch, batch_idx):
            return None if 3 <= self.trainer.global_step < 6 else super().training_step(batch, batch_idx)

    learner = LanczosLRLearner(curvature="ggn", refresh_every_n_steps=1)
    with pytest.warns(UserWarning, match="the loss is not finite, and there are no outputs"):
        fit(learner, Skips())
    assert learner._rejected == 3


class Tilted(pl.LightningModule):
    """x w^2 / 2, mean over the batch: its sharpness is the mean of the inputs."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        return (batch[0] * self.w.square()).mean() / 2

    def configure_optimizers(self):
        return torch.optim.SGD([self.w], lr=1e-3)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("count", [1, 3])
def test_curvature_batches_are_the_last_ones(count, accumulate):
    """One of them about to be trained on; fewer where the run begins."""
    inputs = 1 + torch.arange(24, dtype=torch.float64)  # a sample a micro-batch
    steps = inputs.view(-1, accumulate).mean(dim=1)
    learner = LanczosLRLearner(curvature_batches=count, refresh_every_n_steps=4, rule="gd", num_steps=2)
    seen, original = [], learner_module.curvature_range
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner_module, "curvature_range", lambda *a: (seen.append(original(*a)[0]), original(*a))[1])
        loader = DataLoader(TensorDataset(inputs), 1)
        fit(learner, Tilted(), loader=loader, max_epochs=1, accumulate_grad_batches=accumulate)
    expected = [steps[max(0, s + 1 - count) : s + 1].mean().item() for s in range(0, len(steps), 4)]
    assert seen == pytest.approx(expected, rel=1e-12)
    assert len(learner._window) < count * accumulate  # no more is kept than the next refresh needs


def test_curvature_batches_before_an_epoch():
    inputs = 1 + torch.arange(8, dtype=torch.float64)
    learner = LanczosLRLearner(curvature_batches=2, refresh_every_n_epochs=1, rule="gd", num_steps=2)
    fit(learner, Tilted(), loader=DataLoader(TensorDataset(inputs), 1), max_epochs=2)
    assert max(learner._spectrum[0]) == pytest.approx((8 + 1) / 2, rel=1e-12)
    assert len(learner._window) <= 2


@pytest.mark.filterwarnings("ignore:.*ResumeState")
def test_curvature_batches_survive_a_kill(tmp_path):
    """Also those of steps before, which are trained on already."""

    def learner():
        return LanczosLRLearner(refresh_every_n_steps=5, curvature_batches=4)

    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole, _ = fit(learner(), Net(), ResumeState(), save)
    for step in (1, 3, 4, 9, 13):
        resumed, _ = fit(learner(), Net(), ResumeState(), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert resumed.rates == whole.rates[step:]


def test_weight_decay_adds_to_every_eigenvalue():
    """By group, exactly; left out by default."""

    class Decayed(Quadratic):
        def __init__(self):
            super().__init__([1.0, 4.0, 9.0, 100.0])
            self.v = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 30 * self.v.square().sum() / 2

        def configure_optimizers(self):
            groups = [{"params": [self.w], "weight_decay": 50.0}, {"params": [self.v], "weight_decay": 300.0}]
            return torch.optim.SGD(groups, lr=1e-3)

    for included, largest, smallest in ((False, 100.0, 1.0), (True, 330.0, 51.0)):
        learner = LanczosLRLearner(include_weight_decay=included, num_steps=6, mu="min", weight_threshold=1.0)
        fit(learner, Decayed(), max_steps=1)
        assert max(learner._spectrum[0]) == pytest.approx(largest, rel=1e-9)
        assert min(learner._spectrum[0]) == pytest.approx(smallest, rel=1e-9)


@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay_of_adam(monkeypatch, decoupled):
    """Part of the gradient, it is preconditioned; decoupled, it acts beside the metric."""
    make = torch.optim.AdamW if decoupled else torch.optim.Adam
    found = {}
    for included in (False, True):
        seen = measured(monkeypatch)
        learner = LanczosLRLearner(include_weight_decay=included, refresh_every_n_steps=1, curvature_samples="all")
        _, trainer = fit(
            learner,
            Net(lambda p: make(p, lr=1e-3, weight_decay=0.25)),
            max_steps=2,
            loader=DataLoader(TensorDataset(*data(4)), 4),
        )
        found[included] = seen[0]
        monkeypatch.undo()
    difference = (found[True] - found[False]).double()
    if decoupled:
        expected = torch.full((len(difference),), 0.25, dtype=torch.float64)
    else:  # 0.25 / D, with the moments of the first step
        first = Net(lambda p: make(p, lr=1e-3, weight_decay=0.25))
        loss = nn.functional.cross_entropy(first.net(data(4)[0]), data(4)[1])
        grads = torch.autograd.grad(loss, list(first.parameters()))
        steps = [g + 0.25 * p for g, p in zip(grads, first.parameters(), strict=True)]
        expected = 0.25 / (torch.cat([s.flatten() for s in steps]).abs().double() + 1e-8)
    # differences of float32 entries, whose rates in the two runs are not the same
    assert (difference.diagonal() - expected).norm() <= 1e-4 * (expected.norm() + found[True].norm())
    assert (difference - difference.diagonal().diag()).norm() <= 1e-4 * found[True].norm()


def test_chosen_parameters_alone_are_measured(monkeypatch):
    """The block of the Hessian that belongs to them; the rate is for all."""
    whole, chosen = [], []
    for seen, patterns in ((whole, None), (chosen, ["net.*", "!net.0.*"])):
        seen.append(measured(monkeypatch))
        module, _ = fit(LanczosLRLearner(param_filter=patterns, curvature_samples="all"), max_steps=1)
        monkeypatch.undo()
    first_layer = sum(p.numel() for p in module.net[0].parameters())
    assert torch.allclose(chosen[0][0], whole[0][0][first_layer:, first_layer:], atol=1e-7)
    with pytest.raises(
        MisconfigurationException, match=r"param_filter=\['head.*'\]\) matches no trained parameter of Net"
    ):
        fit(LanczosLRLearner(param_filter=["head.*"]))


def test_a_sparse_embedding_can_be_left_out():
    class Words(Net):
        def __init__(self):
            super().__init__(sgd(momentum=0.0, nesterov=False))
            self.embedding = nn.Embedding(7, 5, sparse=True)

        def training_step(self, batch, batch_idx):
            words = batch[0][:, 0].abs().long().clamp(max=6)
            return nn.functional.cross_entropy(self.net(batch[0] + self.embedding(words)), batch[1])

    with pytest.raises(MisconfigurationException, match="cannot differentiate twice through embedding"):
        fit(LanczosLRLearner(rule="gd"), Words())
    learner = LanczosLRLearner(rule="gd", param_filter=["!embedding.*"], refresh_every_n_steps=1)
    module, _ = fit(learner, Words())
    assert len(learner._curves["lr"].points()[0]) == 16
    assert all(p.isfinite().all() for p in module.parameters())


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
        ({"curvature": "fisher"}, "curvature must be one of 'hessian', 'ggn'"),
        ({"curvature_batches": 0}, "curvature_batches must be >= 1"),
        ({"param_filter": "net.*"}, "param_filter must be a list of patterns, none of them empty, got 'net"),
        ({"param_filter": ["net.*", ""]}, "param_filter must be a list of patterns"),
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
