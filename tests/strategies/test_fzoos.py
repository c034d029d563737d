import logging
import math
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import TensorDataset

from lightning_opt.data import ResumableLoader
from lightning_opt.solvers.fzoos import NonFiniteObjectiveError, fzoos_minimize
from lightning_opt.strategies import FZooSStrategy
from lightning_opt.testing import TwoRanks

settings = {
    "FZooSStrategy": {
        "local_steps": 4,
        "n_features": 30,
        "active": 1,
        "active_pool": 4,
        "sync_active": 2,
        "sync_pool": 4,
        "init": 2,
        "process_group_backend": "gloo",
    }
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Using a target size"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated"),
]
one_rank = pytest.mark.filterwarnings("ignore:.*with one rank there is nothing to correct by")

D = 5
QUICK = {"local_steps": 4, "n_features": 60, "active": 2, "active_pool": 10, "sync_active": 4, "sync_pool": 12}
START = torch.full((D,), 0.6, dtype=torch.float64)
CENTERS = torch.tensor([[0.3], [0.55]], dtype=torch.float64)  # the data: one for each rank


def bowl(x, center):
    weights = torch.linspace(1, 1 + 4 * float(center), D, dtype=torch.float64)
    return (weights * (x - center) ** 2).sum() + 0.3 * torch.sin(5 * x).sum()


class Bowl(pl.LightningModule):
    """The objective holds no graph: rounded values of a bowl, around what the batch says."""

    def __init__(self, nan_on=None, **parts):
        super().__init__()
        self.x = nn.Parameter(START.clone())
        for name, part in parts.items():
            setattr(self, name, part)
        self.nan_on, self.calls, self.logged = nan_on, 0, []

    def training_step(self, batch, batch_idx):
        type(self).evaluations += 1
        value = sum(bowl(self.x.detach(), center) for center in batch[0].flatten()) / batch[0].numel()
        assert not value.requires_grad
        if self.nan_on is not None and self.nan_on == self.trainer.global_rank and self.global_step >= 5:
            value = value * math.nan
        return value

    evaluations = 0

    def on_train_batch_end(self, *_):
        self.logged.append({k: float(v) for k, v in self.trainer.callback_metrics.items()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def loader(samples=CENTERS, batch_size=1):
    return ResumableLoader(TensorDataset(samples), batch_size)


def fit(module, *, steps, devices=1, ckpt_path=None, data=None, trainer=None, callbacks=(), **options):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = pl.Trainer(
        strategy=FZooSStrategy(**{"process_group_backend": "gloo", **QUICK, **options}),
        accelerator="cpu",
        devices=devices,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **(trainer or {}),
    )
    trainer.fit(module, data or loader(), ckpt_path=ckpt_path)
    return trainer


# What two ranks do, in one pair of processes


def run(folder, steps, save_at=None, resume=None, **options):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == save_at:
                trainer.save_checkpoint(Path(folder, f"{save_at}.ckpt"))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = Bowl()
        trainer = fit(
            module,
            steps=steps,
            devices=2,
            ckpt_path=str(Path(folder, f"{resume}.ckpt")) if resume else None,
            callbacks=[Save()],
            **options,
        )
    client = trainer.strategy.client
    return {
        "x": module.x.detach().clone(),
        "state": {**client.state_dict(), "objective": client.objective},
        "logged": module.logged,
        "steps": trainer.global_step,
    }


def fail(_):
    """Rank 1 has no value after 5 steps: what either rank says, and after how many steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = Bowl(nan_on=1)
        try:
            fit(module, steps=20, devices=2)
        except NonFiniteObjectiveError as error:
            return {"said": str(error), "after": module.trainer.global_step}
    return {"said": "nothing", "after": module.trainer.global_step}


@pytest.fixture(scope="module")
def ranks():
    with TwoRanks(timeout=300) as two:  # it starts processes, which takes long on a busy machine
        yield two


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def whole(ranks, folder):
    return ranks.call(run, folder, 12, 6)


def test_ranks_are_the_clients_of_the_function(whole):
    here = fzoos_minimize([lambda x, c=c: bowl(x, c) for c in CENTERS], START, rounds=3, bounds=None, **QUICK)
    for told in whole:
        # float64 throughout, and the same operations but for the order of a sum in the objective
        torch.testing.assert_close(told["x"], here.x, rtol=0, atol=1e-10)
        assert told["state"]["objective"] == pytest.approx(float(here.objective[-1]), abs=1e-10)
        assert 2 * told["state"]["queries"] == int(here.queries[-1])
    assert float((here.x - 0.6).abs().max()) > 0.05


def test_what_is_logged(whole):
    first, later = whole[0]["logged"][0], whole[0]["logged"][-1]
    assert first["fzoos/rounds"] == 0
    assert later["fzoos/rounds"] == 2  # the third ends behind its last step
    a_round = 4 + 3 * 2 + 1 + 4
    assert later["fzoos/queries"] == 2 * (11 + 3 * a_round - 6)  # before the evaluations of the last step
    assert later["fzoos/bytes_per_round"] == pytest.approx(2 * 8 * (D + 60 + 1), rel=0.02)
    assert later["fzoos/correction_norm"] > 0
    assert first["fzoos/correction_norm"] == 0
    assert later["fzoos/gradient_uncertainty"] > 0
    assert math.isfinite(later["fzoos/objective"])
    assert later["fzoos/f_local"] != first["fzoos/f_local"]


def test_a_run_that_is_resumed_within_a_round_is_the_whole_one(whole, ranks, folder):
    torch.load(Path(folder, "6.ckpt"), weights_only=True)
    for told, expected in zip(ranks.call(run, folder, 12, None, 6), whole, strict=True):
        assert told["steps"] == expected["steps"] == 12
        torch.testing.assert_close(told["x"], expected["x"], rtol=0, atol=0)
        for name, value in expected["state"].items():
            torch.testing.assert_close(told["state"][name], value, rtol=0, atol=0)
        assert told["logged"][-6:] == expected["logged"][-6:]


def test_where_training_ends_within_a_round_ranks_agree_on_the_mean(ranks, folder):
    told = ranks.call(run, folder, 6)
    assert torch.equal(told[0]["x"], told[1]["x"])
    assert not torch.equal(told[0]["state"]["x"], told[1]["state"]["x"])
    torch.testing.assert_close(told[0]["x"], (told[0]["state"]["x"] + told[1]["state"]["x"]) / 2)


def test_all_ranks_raise_at_the_end_of_the_round_in_which_one_has_no_value(ranks):
    for told in ranks.call(fail, None):
        assert told == {"said": "the objective of rank 1 is not finite", "after": 7}


@one_rank
def test_a_checkpoint_of_other_ranks_is_refused(whole, folder):
    with pytest.raises(MisconfigurationException, match="2 ranks evaluated on their data, and this run has 1"):
        fit(Bowl(), steps=12, ckpt_path=str(Path(folder, "6.ckpt")))


@one_rank
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "1 is the seed of the features, in the checkpoint 0"),
        ({"n_features": 50}, "50 features carry a surrogate, in the checkpoint 60"),
        ({"param_filter": "x"}, "5 parameters are searched, in the checkpoint 6"),
    ],
)
def test_a_checkpoint_of_another_search_is_refused(options, message, tmp_path):
    class Two(Bowl):
        def __init__(self):
            super().__init__(y=nn.Parameter(torch.zeros(1, dtype=torch.float64)))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.y.detach().square().sum()

    fit(Two(), steps=5).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(MisconfigurationException, match=message):
        fit(Two(), steps=8, ckpt_path=str(tmp_path / "a.ckpt"), **options)


# One rank


def test_one_rank_searches_and_is_warned():
    module = Bowl()
    with pytest.warns(UserWarning, match="with one rank there is nothing to correct by"):
        fit(module, steps=30, lr=0.05, data=loader(batch_size=2))

    def mean(x):
        return sum(bowl(x, center) for center in CENTERS[:, 0]) / 2

    x = START.clone().requires_grad_()
    descent = torch.optim.LBFGS([x], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        descent.zero_grad()
        value = mean(x)
        value.backward()
        return value

    descent.step(closure)
    start, found, least = (float(mean(point.detach())) for point in (START, module.x, x))
    assert least <= found < least + 0.05 * (start - least)


@one_rank
def test_training_step_runs_once_a_query():
    Bowl.evaluations = 0
    trainer = fit(Bowl(), steps=9, vectorize="never")
    assert trainer.strategy.client.queries == 11 + 2 * (4 + 3 * 2 + 1 + 4) + 1 + 2
    assert Bowl.evaluations == trainer.strategy.client.queries + 2  # whether it depends on x


@one_rank
def test_only_parameters_that_match_move():
    module = Bowl(frozen_part=nn.Linear(2, 2), y=nn.Parameter(torch.zeros(1, dtype=torch.float64)))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, steps=5, param_filter="x")
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"x"}


@one_rank
def test_parameters_that_nothing_depends_on_are_refused():
    module = Bowl(y=nn.Parameter(torch.zeros(3, dtype=torch.float64)))
    with pytest.raises(MisconfigurationException, match="does not depend on y, which are not used on any rank"):
        fit(module, steps=5)
    assert torch.equal(module.x, START)


@one_rank
def test_noise_of_batches_is_measured_before_the_first_move():
    samples = torch.linspace(0.2, 0.6, 7, dtype=torch.float64)[:, None]
    values = torch.stack([bowl(START, center) for center in samples[:5, 0]])
    moves = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            moves.append(not torch.equal(module.x, START))

    trainer = fit(Bowl(), steps=6, noise="auto", data=loader(samples), callbacks=[Watch()])
    assert moves == [False] * 5 + [True]
    assert trainer.strategy.client.noise_variance == pytest.approx(float(values.var()), rel=1e-12)


@one_rank
def test_the_search_stays_within_bounds():
    seen = []

    class Slope(Bowl):
        def training_step(self, batch, batch_idx):
            seen.append(self.x.detach().clone())
            return self.x.detach().sum()

    module = Slope()
    fit(module, steps=30, lr=0.1, bounds=(-1.0, 1.0), vectorize="never")
    assert torch.stack(seen).abs().max() <= 1
    assert torch.equal(module.x, torch.full((D,), -1.0, dtype=torch.float64))


@one_rank
def test_half_precision_of_the_module_is_not_that_of_the_surrogate():
    class Half(Bowl):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.full((D,), 0.6))

        def training_step(self, batch, batch_idx):
            return (self.x.detach() @ torch.eye(D)).square().sum()  # in bfloat16 under autocast

    module = Half()
    trainer = fit(module, steps=12, lr=0.05, trainer={"precision": "bf16-mixed"})
    assert trainer.strategy.client.values.dtype == torch.float64
    assert module.x.dtype == torch.float32
    assert float(module.x.detach().square().sum()) < 0.5 * D * 0.36


class NeverValue(Bowl):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * math.nan


class NoValue(Bowl):
    def training_step(self, batch, batch_idx):
        return None if self.global_step else super().training_step(batch, batch_idx)


@one_rank
@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.")
@pytest.mark.parametrize(
    ("module", "trainer", "options", "error", "message"),
    [
        (
            Bowl,
            {"accumulate_grad_batches": 2},
            {},
            MisconfigurationException,
            "accumulate_grad_batches must be 1, got 2",
        ),
        (Bowl, {"gradient_clip_val": 1.0}, {}, MisconfigurationException, "no gradients to clip"),
        (Bowl, {}, {"max_dim": 4}, MisconfigurationException, "5 coordinates to search, above max_dim=4"),
        (Bowl, {}, {"bounds": (-0.5, 0.5)}, MisconfigurationException, "start lies outside of the bounds"),
        (Bowl, {}, {"param_filter": "y"}, MisconfigurationException, "must be a parameter to search"),
        (lambda: Bowl(nan_on=0), {}, {}, NonFiniteObjectiveError, "objective of rank 0 is not finite"),
        (NeverValue, {}, {}, NonFiniteObjectiveError, "objective of rank 0 is not finite"),
        (NoValue, {}, {}, NonFiniteObjectiveError, "objective of rank 0 is not finite"),
    ],
)
def test_what_is_refused(module, trainer, options, error, message):
    with pytest.raises(error, match=message):
        fit(module(), steps=20, trainer=trainer, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bounds": (1.0, 1.0)}, "the lowest value below the highest"),
        ({"param_filter": "("}, "param_filter must be a regular expression, got '\\('"),
        ({"max_dim": 0}, "max_dim must be >= 1"),
        ({"lr": -1.0}, "lr must be > 0"),
        ({"noise": "much"}, "noise must be a number or 'auto'"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        FZooSStrategy(**options)
