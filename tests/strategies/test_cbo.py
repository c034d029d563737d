"""CBOStrategy: in the Trainer, on one rank and on two, killed and resumed."""

import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import TensorDataset

from lightning_opt.callbacks import ResumeState
from lightning_opt.data import ResumableLoader
from lightning_opt.solvers.consensus import ConsensusSettings, Swarm
from lightning_opt.strategies import CBOStrategy
from lightning_opt.testing._ranks import on_two_ranks

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

settings = {
    "CBOStrategy": [
        {"n_particles": 16, "particle_batch": 8, "alpha_schedule": "ess", "process_group_backend": "gloo"},
        {"scheme": "hopping", "n_particles": 9, "sigma": 0.1},
    ]
}

SCHEMES = {
    "cbo": {
        "n_particles": 20,
        "particle_batch": 10,
        "alpha_schedule": "double_per_epoch",
        "sigma_schedule": "log2",
        "stagnation_tol": 0.05,
    },
    "partial": {"n_particles": 12, "particle_batch": 4, "update": "partial", "alpha_schedule": "ess"},
    "hopping": {"scheme": "hopping", "n_particles": 15, "sigma": 0.3, "alpha": 20.0},
}


def data():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(44, 5, generator=generator)
    return TensorDataset(inputs, (inputs @ torch.randn(5, 3, generator=generator)).argmax(dim=1))


class Net(pl.LightningModule):
    """Its loss is not differentiable: the share of errors, and the loss in a few decimals."""

    def __init__(self, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        self.scale = scale
        self.rows = []

    def training_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        errors = (logits.argmax(dim=1) != batch[1]).float().mean()
        return self.scale * (nn.functional.cross_entropy(logits, batch[1]) + errors)

    def validation_step(self, batch, batch_idx):
        right = (self.net(batch[0]).argmax(dim=1) == batch[1]).float().mean()
        self.log("accuracy", right, batch_size=len(batch[1]), sync_dist=True)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        names = ("best_loss", "alpha", "ess", "lost")
        values = {name: self.trainer.callback_metrics[f"cbo/{name}"].item() for name in names}
        self.rows.append({"loss": outputs["loss"].item(), "first": batch[0][0, 0].item(), **values})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def loader():
    return ResumableLoader(data(), 8, shuffle=True)


def fit(scheme, epochs=3, devices=1, module=None, ckpt_path=None, strategy=None, **options):
    module = module or Net()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
        warnings.filterwarnings("ignore", "ResumeState: Lightning calls on_train_batch_end")
        trainer = pl.Trainer(
            strategy=strategy or CBOStrategy(**SCHEMES[scheme]),
            accelerator="cpu",
            devices=devices,
            max_epochs=epochs,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            **{"enable_checkpointing": False, **options},
        )
        trainer.fit(module, loader(), ResumableLoader(data(), 11), ckpt_path=ckpt_path)
    return trainer, module


def weights(module):
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_strategy_is_the_function(scheme):
    """The module goes where the functional core goes on the same batches, and holds the consensus."""
    module = Net()
    swarm = Swarm(ConsensusSettings(**{"stagnation_tol": 1e-5, **SCHEMES[scheme]}), weights(module))
    shapes = {name: p.shape for name, p in module.named_parameters()}
    trainer, fitted = fit(scheme)
    assert trainer.global_step == 18
    batches = loader()
    for epoch in range(3):
        batches.sampler.set_epoch(epoch)
        for inputs, labels in batches:

            def evaluate(points, batch=(inputs, labels)):
                losses = []
                for point in points:
                    parts = point.split([shape.numel() for shape in shapes.values()])
                    state = {n: part.view(s) for (n, s), part in zip(shapes.items(), parts, strict=True)}
                    module.load_state_dict(state)
                    losses.append(module.training_step(batch, 0).detach())
                return torch.stack(losses)

            swarm.step(evaluate, epoch)
    assert torch.allclose(weights(fitted), swarm.consensus, atol=1e-4)  # rounding of vmap times alpha, over 18 steps
    assert torch.equal(weights(fitted), trainer.strategy.swarm.consensus)


def test_by_its_name_it_learns():
    module = Net()
    trainer, module = fit(None, epochs=15, module=module, strategy="cbo")
    assert isinstance(trainer.strategy, CBOStrategy)
    assert trainer.callback_metrics["accuracy"] > 0.8  # of three classes
    assert not torch.distributed.is_initialized()
    logged = {name for name in trainer.callback_metrics if name.startswith("cbo/")}
    names = ("best_loss", "consensus_loss", "alpha", "sigma", "ess", "lost", "diameter", "variance")
    assert logged == {f"cbo/{name}" for name in names}
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert metrics["cbo/consensus_loss"] == pytest.approx(module.rows[-1]["loss"])
    swarm = trainer.strategy.swarm
    distances = (swarm.particles - swarm.consensus).norm(dim=1)
    assert metrics["cbo/diameter"] == pytest.approx(distances.max().item())
    assert metrics["cbo/variance"] == pytest.approx(distances.square().mean().item())
    assert 1 <= metrics["cbo/ess"] <= 100


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("step", [4, 11])
def test_a_run_killed_anywhere_resumes_bit_for_bit(scheme, step, tmp_path):
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    callbacks = [ResumeState(), saving]
    whole_trainer, whole = fit(scheme, callbacks=callbacks, enable_checkpointing=True)
    _, resumed = fit(scheme, ckpt_path=tmp_path / f"step={step}.ckpt", callbacks=[ResumeState()])
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.rows[step:] == resumed.rows
    torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)


def _on_a_rank(folder):
    """Everything that needs two ranks, in one pair of processes."""
    found = {}
    for scheme in SCHEMES:
        saving = ModelCheckpoint(f"{folder}/{scheme}", save_top_k=-1, every_n_train_steps=8, filename="{step}")
        trainer, module = fit(scheme, 2, devices=2, callbacks=[ResumeState(), saving], enable_checkpointing=True)
        resumed = module
        if scheme != "partial":
            path = f"{folder}/{scheme}/step=8.ckpt"
            _, resumed = fit(scheme, 2, devices=2, ckpt_path=path, callbacks=[ResumeState()])
        found[scheme] = {
            "weights": weights(module),
            "resumed": weights(resumed),
            "rows": [[row["loss"], row["first"], row["best_loss"]] for row in module.rows],
            "particles": len(trainer.strategy.swarm.particles),
            "accuracy": trainer.callback_metrics["accuracy"].item(),
        }
    saved = torch.load(f"{folder}/cbo/step=8.ckpt", weights_only=True)["lightning_opt_search"]
    found["saved"] = [len(state["particles"]) for state in saved["ranks"]]
    module = Net(scale=math.nan)
    try:
        fit("cbo", 1, devices=2, module=module)
    except ValueError as error:
        found["lost"] = str(error)
    return found


def test_two_ranks_are_one(tmp_path):
    first, second = on_two_ranks(_on_a_rank, str(tmp_path))
    assert "some value must be finite" in first["lost"]
    assert first["lost"] == second["lost"]
    assert first["saved"] == [10, 10]
    for scheme in SCHEMES:
        trainer, alone = fit(scheme, 2)
        ranks = first[scheme], second[scheme]
        assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
        assert ranks[0]["rows"] == ranks[1]["rows"]
        assert all(torch.equal(rank["weights"], rank["resumed"]) for rank in ranks)
        tolerance = 0 if scheme == "hopping" else 1e-6
        assert (ranks[0]["weights"] - weights(alone)).abs().max() <= tolerance
        expected = [[row["loss"], row["first"], row["best_loss"]] for row in alone.rows]
        assert torch.allclose(torch.tensor(ranks[0]["rows"]), torch.tensor(expected), atol=10 * tolerance)
        assert ranks[0]["accuracy"] == pytest.approx(trainer.callback_metrics["accuracy"].item())
        held = 0 if scheme == "hopping" else SCHEMES[scheme]["n_particles"]
        assert sum(rank["particles"] for rank in ranks) == held
        # what two ranks saved, one continues
        _, resumed = fit(scheme, 2, ckpt_path=tmp_path / scheme / "step=8.ckpt", callbacks=[])
        assert (weights(resumed) - weights(alone)).abs().max() <= tolerance


@pytest.mark.parametrize(
    ("changed", "saved"),
    [({"n_particles": 10, "particle_batch": None}, "'n_particles': 20"), ({"scheme": "hopping"}, "'scheme': 'cbo'")],
)
def test_another_search_is_not_continued(changed, saved, tmp_path):
    trainer, _ = fit("cbo", epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    strategy = CBOStrategy(**{**SCHEMES["cbo"], "particle_batch": None, **changed})
    with pytest.raises(MisconfigurationException, match=f"cannot continue the search of the checkpoint, .*{saved}"):
        fit("cbo", ckpt_path=tmp_path / "last.ckpt", strategy=strategy)


class Unused(Net):
    """With a layer that is not used, and one of zeros before which others have no effect at the start."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(2, 2)
        nn.init.zeros_(self.net[2].weight)


def test_parameters_without_effect_are_refused_and_may_be_frozen():
    with pytest.raises(MisconfigurationException, match=r"does not change with idle.weight, idle.bias, which are not"):
        fit("cbo", module=Unused())
    module = Unused()
    before = module.idle.requires_grad_(False).weight.clone()
    fit("cbo", epochs=1, module=module)
    assert torch.equal(module.idle.weight, before)


class SometimesLost(Net):
    """Large weights have no finite loss."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return torch.where(weights_of(self) > 8.0, torch.nan, loss)


def weights_of(module):
    return torch.cat([p.reshape(-1) for p in module.parameters()]).norm()


def test_candidates_without_a_finite_loss_are_counted_and_said_once():
    with pytest.warns(UserWarning, match="of 20 candidates had a loss that is not finite") as caught:
        trainer, module = fit("cbo", module=SometimesLost())
    assert sum("not finite" in str(warning.message) for warning in caught) == 1
    assert module.rows[0]["lost"] > 0
    assert all(math.isfinite(row["loss"]) for row in module.rows)
    assert weights(module).isfinite().all()


@pytest.mark.filterwarnings("ignore:CBOStrategy. .* not finite")
def test_no_finite_loss_at_all_ends_the_run():
    with pytest.raises(ValueError, match=r"some value must be finite, got \[nan, nan, nan\]"):
        fit("cbo", module=Net(scale=math.nan))


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("n_particles", 1, "must be >= 2"),
        ("dt", 0.0, "must be > 0"),
        ("sigma", -1.0, "must be >= 0"),
        ("alpha", -1.0, "must be > 0"),
        ("particle_batch", 7, "must be >= 2 and divide n_particles=100, got 7"),
        ("init", "zero", "must be one of 'around', 'normal'"),
        ("vectorize", "maybe", "must be one of 'auto', 'always', 'never'"),
    ],
)
def test_wrong_values(name, value, accepted):
    with pytest.raises(ValueError, match=f"{name} {accepted}"):
        CBOStrategy(**{name: value})
    with pytest.warns(UserWarning, match="lam \\* dt = 1.5 is above 1"):
        CBOStrategy(dt=1.0, lam=1.5, sigma=0.1)
