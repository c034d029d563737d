import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_opt._lightning.probe import probing
from lightning_opt.callbacks import (
    STEER,
    GlobalODERegularization,
    LanczosLRLearner,
    LocalODERegularization,
    TayNODE,
    ode_regularization,
)
from lightning_opt.ode import NeuralODE, global_regularization, local_term, sample_place, taynode_regularization
from lightning_opt.testing._ranks import on_two_ranks

settings = {
    "LocalODERegularization": [
        {},
        {"estimate": "stiffness", "tableau": "tsit5", "coeff": 0.1, "decay": "constant", "norm": "sample"},
        {"sampling": "biased", "every_n_steps": 2, "rtol": 1e-3, "atol": 1e-3, "dt": 0.1, "seed": 1},
    ],
    "GlobalODERegularization": [{}],
    "STEER": [{"b": 0.3}],
    "TayNODE": [{}],
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*`logger=False`"),
]


class Dynamics(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def forward(self, t, y):
        return 4 * self.net(torch.cat([y, t.expand(len(y), 1)], dim=1))


class Module(pl.LightningModule):
    """Regression; keeps the gradient, the block and what the term was taken from at every step."""

    def __init__(self, as_dict=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.ode = NeuralODE(Dynamics(), **{"rtol": 1e-6, "atol": 1e-6, **options})
        self.as_dict = as_dict
        self.gradients, self.snapshots, self.losses = [], [], []

    def training_step(self, batch, batch_idx):
        self.snapshots.append(copy.deepcopy(self.ode))
        loss = (self.ode(batch[0]) - batch[1]).square().mean()
        self.losses.append(loss.item())
        return {"loss": loss, "more": 1} if self.as_dict else loss

    def on_after_backward(self):
        self.gradients.append([p.grad.clone() for p in self.parameters()])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Manual(Module):
    def __init__(self, calls=True, **options):
        super().__init__(**options)
        self.automatic_optimization = False
        self.calls = calls

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.calls:
            loss = loss + ode_regularization(self)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()


class ManualWithout(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))


class Rows(pl.loggers.logger.Logger):
    name, version = "rows", 0

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        self.rows.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *args, **kwargs):
        pass


def data(n=16):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(*(torch.randn(n, 3, generator=generator, dtype=torch.float64) for _ in range(2)))


def fit(module, *callbacks, batch_size=4, **options):
    trainer = pl.Trainer(
        **{
            **{"max_epochs": 1, "logger": False, "accelerator": "cpu", "enable_checkpointing": False},
            **{"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1, **options},
        },
        callbacks=list(callbacks),
    )
    trainer.fit(module, DataLoader(data(), batch_size))
    return module


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("solver", ["lightning_opt", "torchdiffeq"])
@pytest.mark.parametrize("adjoint", [False, True])
def test_the_gradient_is_that_of_the_loss_and_the_term(as_dict, solver, adjoint):
    """The first step's term is known from the log: its place, and so its gradient."""
    rows = Rows()
    options = {"method": "dopri5", "solver": solver, "adjoint": adjoint}
    module = fit(Module(as_dict, **options), LocalODERegularization(coeff=3.0, coeff_end=1.0, seed=1), logger=rows)
    first = rows.rows[0]
    block = module.snapshots[0]
    x, target = next(iter(DataLoader(data(), 4)))
    loss = (block(x) - target).square().mean()
    place = sample_place(block, draw=first["local_reg/time"])
    term = local_term(block, place)
    assert term.item() == pytest.approx(first["local_reg/value"], rel=1e-9)
    assert first["local_reg/dt"] == pytest.approx(place.dt)
    assert first["local_reg/coeff"] == 3.0
    assert first["local_reg/nfe_forward"] == block.last_solve.nfe_forward
    assert first["local_reg/accepted"] == block.last_solve.accepted
    expected = torch.autograd.grad(loss + 3.0 * term, list(block.parameters()))
    plain = fit(Module(as_dict, **options)).gradients[0]
    for a, b, without in zip(module.gradients[0], expected, plain, strict=True):
        assert (a - b).abs().max() < 1e-9
        assert (a - without).abs().max() > 1e-4
    assert module.losses[0] == pytest.approx(loss.item())
    assert rows.rows[3]["local_reg/coeff"] == pytest.approx(3.0 * 3 ** (-3 / 4))


def test_without_a_coefficient_gradients_are_bit_for_bit_the_same():
    rows = Rows()
    watched = fit(Module(), LocalODERegularization(coeff=0.0), logger=rows)
    plain = fit(Module())
    for a, b in zip(watched.gradients, plain.gradients, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert [rows.rows[i]["local_reg/value"] > 0 for i in range(4)] == [True] * 4
    assert all(rows.rows[i]["local_reg/nfe_backward"] == 0 for i in range(4))


def test_evaluations_of_the_adjoint_are_logged():
    rows = Rows()
    fit(Module(adjoint=True), LocalODERegularization(), logger=rows)
    assert rows.rows[0]["local_reg/nfe_backward"] > 10


def test_accumulated_terms_are_averaged():
    """Each micro-batch adds its loss and its term, both divided by their number."""
    callback = LocalODERegularization(coeff=3.0, decay="constant")
    whole = fit(Module(), callback, accumulate_grad_batches=2, limit_train_batches=2)
    parts = fit(Module(), callback, limit_train_batches=2, max_steps=2, limit_val_batches=0)
    # the second batch of parts is behind a step, so only its first is the same
    assert all(torch.equal(a / 2, b) for a, b in zip(parts.gradients[0], whole.gradients[0], strict=True))
    assert not torch.equal(whole.gradients[1][0], whole.gradients[0][0])


def test_every_so_many_steps():
    rows = Rows()
    fit(Module(), LocalODERegularization(every_n_steps=3), logger=rows)
    assert ["local_reg/value" in rows.rows[i] for i in range(4)] == [True, False, False, True]
    assert all("local_reg/nfe_forward" in rows.rows[i] for i in range(4))


def test_times_come_from_the_seed():
    times = []
    for seed in (0, 0, 1):
        rows = Rows()
        fit(Module(), LocalODERegularization(seed=seed), logger=rows)
        times.append([rows.rows[i]["local_reg/time"] for i in range(4)])
    assert times[0] == times[1] != times[2]
    assert len(set(times[0])) == 4


def test_it_lowers_the_error_that_it_is_given():
    def mean_error(coeff):
        rows = Rows()
        callback = LocalODERegularization(coeff=coeff, decay="constant", dt=0.2)
        fit(Module(), callback, logger=rows, max_epochs=10)
        return sum(row["local_reg/value"] for step, row in rows.rows.items() if step >= 30) / 10

    assert mean_error(3.0) < 0.5 * mean_error(0.0)


def test_several_blocks_by_name_and_by_themselves():
    class Two(Module):
        def __init__(self):
            super().__init__()
            self.second = NeuralODE(Dynamics(), rtol=1e-3, atol=1e-3)

        def training_step(self, batch, batch_idx):
            return (self.second(self.ode(batch[0])) - batch[1]).square().mean()

    rows = Rows()
    fit(Two(), LocalODERegularization(), logger=rows)
    assert {"local_reg/value/ode", "local_reg/value/second", "local_reg/nfe_forward/second"} <= rows.rows[0].keys()
    for one in ("second", (module := Two()).second):
        rows = Rows()
        fit(Two() if isinstance(one, str) else module, LocalODERegularization(one), logger=rows)
        assert "local_reg/value" in rows.rows[0]
        assert "local_reg/value/second" not in rows.rows[0]


@pytest.mark.parametrize("callback", [LocalODERegularization, GlobalODERegularization, TayNODE])
def test_a_compiled_block_is_one_block(callback):
    class Compiled(Module):
        def __init__(self):
            super().__init__()
            self.ode = torch.compile(self.ode, backend="eager")

        def training_step(self, batch, batch_idx):
            return (self.ode(batch[0]) - batch[1]).square().mean()

    fit(plain := Module(), callback("ode"))
    for block in (None, "ode", (module := Compiled()).ode):
        compiled = module if isinstance(block, nn.Module) else Compiled()
        fit(compiled, callback(block))
        for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
            assert torch.equal(one, other)


class Plain(Module):
    def training_step(self, batch, batch_idx):
        return (self.ode(batch[0]) - batch[1]).square().mean()


class Probe(pl.Callback):
    """Evaluates the loss as other plugins do, behind the forward pass, and keeps its values."""

    def __init__(self, training):
        self.training, self.losses = training, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        with probing(trainer, pl_module) as loss:
            pl_module.train(self.training)
            self.losses.append(loss([x[:4] for x in data().tensors]).item())
            pl_module.train()


@pytest.mark.parametrize("callback", [LocalODERegularization, GlobalODERegularization, TayNODE])
def test_a_probe_leaves_no_trace(callback):
    """In evaluation mode it sees the loss alone."""
    rows, values = [Rows() for _ in range(3)], {}
    fit(plain := Plain(), callback(), logger=rows[0])
    for logger, training in zip(rows[1:], (True, False), strict=True):
        fit(module := Plain(), callback(), probe := Probe(training), logger=logger)
        values[training] = probe.losses
        assert logger.rows == rows[0].rows
        for one, other in zip(plain.parameters(), module.parameters(), strict=True):
            assert torch.equal(one, other)
    assert all(a > b for a, b in zip(values[True], values[False], strict=True))


def test_a_learning_rate_from_the_curvature_beside_a_regularizer():
    fit(module := Plain(), LocalODERegularization(), LanczosLRLearner())
    assert all(p.isfinite().all() for p in module.parameters())


def test_in_manual_optimization_the_module_adds_the_term():
    callback = LocalODERegularization(coeff=3.0)
    by_hand, automatic = fit(Manual(), callback), fit(Module(), callback)
    for a, b in zip(by_hand.gradients, automatic.gradients, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    with pytest.raises(MisconfigurationException, match=r"add lightning_opt.callbacks.ode_regularization\(self\)"):
        fit(ManualWithout(), callback)
    with pytest.raises(MisconfigurationException, match="training_step did not call"):
        fit(Manual(calls=False), callback)


def test_the_step_is_put_back_after_a_fit_and_after_an_error():
    module = fit(Module(), LocalODERegularization(), GlobalODERegularization())
    assert "training_step" not in vars(module)
    assert not module.ode.keep_graph

    class Fails(Module):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("planted")

    module = Fails()
    with pytest.raises(RuntimeError, match="planted"):
        fit(module, LocalODERegularization(), STEER())
    assert "training_step" not in vars(module)
    assert module.ode.end_shift == 0


def test_a_term_that_is_not_finite_is_left_out(monkeypatch):
    monkeypatch.setattr(
        "lightning_opt.callbacks.local_ode_regularization.local_term", lambda *_, **__: torch.tensor(math.nan)
    )
    rows = Rows()
    with pytest.warns(UserWarning, match="a term is not finite") as caught:
        module = fit(Module(), LocalODERegularization(), logger=rows)
    assert len([w for w in caught if "not finite" in str(w.message)]) == 1
    assert rows.rows[3]["local_reg/skipped"] == 4
    plain = fit(Module())
    assert all(torch.equal(a, b) for a, b in zip(module.gradients[3], plain.gradients[3], strict=True))


def test_mixed_precision_leaves_solve_and_term_in_float32():
    class Float(Module):
        def __init__(self):
            super().__init__()
            self.float()
            self.inner = nn.Linear(3, 3)

        def training_step(self, batch, batch_idx):
            y = self.inner(batch[0].float())
            assert y.dtype == torch.bfloat16
            end = self.ode(y)
            assert end.dtype == torch.float32
            return (end - batch[1]).square().mean().float()

        def on_after_backward(self):
            pass

    rows = Rows()
    fit(Float(), LocalODERegularization(), logger=rows, precision="bf16-mixed")
    # an accepted step has an error below 1, and bfloat16 would leave 4e-3 of the state, 40 tolerances
    assert all(0 < row["local_reg/value"] <= row["local_reg/dt"] * 1.5 for row in rows.rows.values())


def test_tolerances_below_rounding_are_warned_about():
    with pytest.warns(UserWarning, match="tolerances of 1e-15 are below ten roundings of torch.float64"):
        fit(Module(), LocalODERegularization(coeff=0.0, rtol=1e-15, atol=1e-15), logger=Rows())


def test_a_strategy_that_shards_is_refused():
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.__class__ = type("Shards", (pl.strategies.Strategy,), {"__abstractmethods__": frozenset()})
    with pytest.raises(MisconfigurationException, match="Shards may hold parts of them"):
        LocalODERegularization().setup(trainer, Module(), "fit")


def test_global_terms_and_taynode_are_added():
    for callback, value in [
        (GlobalODERegularization(coeff=2.0, decay="constant"), global_regularization),
        (GlobalODERegularization(coeff=2.0, decay="constant", estimate="stiffness"), None),
        (TayNODE(coeff=2.0), taynode_regularization),
    ]:
        module = fit(Module(), callback, max_steps=1, limit_val_batches=0)
        block = module.snapshots[0]
        block.keep_graph = True
        x, target = next(iter(DataLoader(data(), 4)))
        loss = (block(x) - target).square().mean()
        term = value(block) if value else global_regularization(block, estimate="stiffness")
        expected = torch.autograd.grad(loss + 2.0 * term, list(block.parameters()))
        assert all((a - b).abs().max() < 1e-9 for a, b in zip(module.gradients[0], expected, strict=True))


def test_random_ends_are_for_training_only():
    class Ends(Module):
        def __init__(self):
            super().__init__()
            self.ends, self.held_out = [], []

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.ends.append(self.ode.last_solve.t1)
            return loss

        def validation_step(self, batch, batch_idx):
            self.ode(batch[0])
            self.held_out.append(self.ode.last_solve.t1)

    module, rows = Ends(), Rows()
    trainer = pl.Trainer(
        **{"max_epochs": 2, "logger": rows, "enable_checkpointing": False, "enable_progress_bar": False},
        **{"enable_model_summary": False, "log_every_n_steps": 1, "accelerator": "cpu", "val_check_interval": 2},
        callbacks=[STEER(b=0.4)],
    )
    trainer.fit(module, DataLoader(data(), 4), DataLoader(data(), 4))
    assert len(set(module.ends)) == 8
    assert all(0.6 <= end < 1.4 for end in module.ends)
    assert set(module.held_out) == {1.0}
    assert [row["steer/shift"] + 1 for step, row in sorted(rows.rows.items())] == pytest.approx(module.ends)


def test_the_report_shows_evaluations_and_steps():
    callback = LocalODERegularization()
    fit(Module(adjoint=True), callback, logger=Rows(), max_epochs=2)
    titles = [panel.title for panel in callback.report_panels()]
    assert titles == ["Function evaluations of a solve", "Steps of a solve"]
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    callback.report_panels()[0].draw(axes)
    assert [line.get_label() for line in axes.get_lines()] == ["forward", "backward, of the adjoint"]
    assert len(axes.get_lines()[0].get_xdata()) == 8
    assert LocalODERegularization().report_panels() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coeff": -1.0}, "coeff must be >= 0"),
        ({"coeff_end": 0.0}, "coeff_end must be > 0"),
        ({"decay": "linear"}, "decay must be one of"),
        ({"estimate": "errors"}, "estimate must be one of .* Did you mean 'error'"),
        ({"sampling": "uniform"}, "sampling must be one of"),
        ({"dt": -0.1}, "dt must be > 0"),
        ({"dt": "first"}, "dt must be one of"),
        ({"tableau": "tsit"}, "tableau must be one of .* Did you mean 'tsit5'"),
        ({"rtol": -1.0}, "rtol must be >= 0"),
        ({"atol": 0.0}, "atol must be > 0"),
        ({"norm": "max"}, "norm must be one of"),
        ({"every_n_steps": 0}, "every_n_steps must be >= 1"),
        ({"decay_steps": 0}, "decay_steps must be >= 1"),
        ({"seed": -1}, "seed must be >= 0"),
    ],
)
def test_what_the_constructor_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        LocalODERegularization(**options)


class Without(Module):
    def __init__(self):
        super().__init__()
        self.ode = nn.Linear(3, 3).double()


class Drops(Module):
    def __init__(self):
        super().__init__()
        self.ode.func.net.append(nn.Dropout(0.1))


@pytest.mark.parametrize(
    ("module", "callback", "message"),
    [
        (Without, lambda: LocalODERegularization(), "found no block that solves a differential equation in Without"),
        (Module, lambda: LocalODERegularization("od"), "'od' is no block .* Module has 'ode'. Did you mean 'ode'"),
        (Module, lambda: LocalODERegularization(nn.Linear(1, 1)), "the Linear given is no block of the module"),
        (lambda: Module(method="rk4"), lambda: LocalODERegularization(), r"takes fixed steps \(method 'rk4'\)"),
        (
            lambda: Module(method="bosh3"),
            lambda: LocalODERegularization(estimate="stiffness"),
            "stages of bosh3 do not show stiffness",
        ),
        (Drops, lambda: LocalODERegularization(), r"Dropout\(p=0.1\), which draws another mask"),
        (lambda: Module(adjoint=True), lambda: GlobalODERegularization(), "build the block with adjoint=False"),
        (lambda: Module(adjoint=True), lambda: TayNODE(), "build the block with adjoint=False"),
        (Module, lambda: STEER(b=1.0), r"b must be in \[0, 1\.0\)"),
    ],
)
def test_what_is_refused_before_the_first_step(module, callback, message):
    built = module()
    with pytest.raises(MisconfigurationException, match=message):
        fit(built, callback())
    assert not built.snapshots


def test_a_decay_over_training_of_unknown_length_is_refused():
    with pytest.raises(MisconfigurationException, match="give decay_steps, or decay='constant'"):
        fit(Module(), LocalODERegularization(), max_epochs=-1)


@pytest.mark.filterwarnings("ignore:.*training_step solved none of")
def test_a_block_that_is_not_solved_is_warned_about():
    class Unused(Module):
        def training_step(self, batch, batch_idx):
            return self.ode.func(torch.tensor(0.0, dtype=torch.float64), batch[0]).square().mean()

    with pytest.warns(UserWarning, match="training_step solved none of 'ode'"):
        fit(Unused(), LocalODERegularization())


def _fit_on_a_rank(_):
    """Times and parameters with times of one's own, and with the same on all ranks."""
    done = {}
    for sync in (False, True):
        rows = Rows()
        callback = LocalODERegularization(sync_time=sync)
        times = []
        taken = callback.value_of

        def value_of(block, draw, generator, times=times, taken=taken):
            times.append(draw)
            return taken(block, draw, generator)

        callback.value_of = value_of
        torch.manual_seed(0)
        trainer = pl.Trainer(
            **{"max_epochs": 1, "accelerator": "cpu", "devices": 2, "strategy": "ddp", "logger": rows},
            **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
            log_every_n_steps=1,
            callbacks=[callback],
        )
        module = Module()
        trainer.fit(module, DataLoader(data(), 4))
        done[f"times {sync}"] = times
        done[f"parameters {sync}"] = [p.detach() for p in module.parameters()]
    return done


def test_two_ranks_have_times_of_their_own_and_the_same_parameters():
    first, second = on_two_ranks(_fit_on_a_rank, None)
    for sync in (False, True):
        pairs = zip(first[f"parameters {sync}"], second[f"parameters {sync}"], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert first["times True"] == second["times True"] == first["times False"]
    assert all(a != b for a, b in zip(first["times False"], second["times False"], strict=True))
