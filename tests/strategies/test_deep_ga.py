import os
import socket
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_opt.callbacks import ResumeState
from lightning_opt.data import ResumableLoader
from lightning_opt.solvers.deep_ga import (
    Novelty,
    PowerSchedule,
    call_each,
    deep_ga,
    fan_in_init,
    flatten,
    load_genome,
    load_weights,
)
from lightning_opt.strategies import DeepGAStrategy

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
    pytest.mark.filterwarnings("ignore:.*number of training batches .* is smaller than the logging interval"),
]

settings = {"DeepGAStrategy": {"population": 8, "truncation": 3, "mutation_power": 0.1, "seed": 1}}

SMALL = {"population": 20, "truncation": 5, "mutation_power": 0.1, "chunk": 4, "seed": 1}


def samples(n=60):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, 4, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] * inputs[:, 1] > 0).long())


class Net(pl.LightningModule):
    """Two classes; returns a loss, a behavior, or what a subclass says."""

    def __init__(self, dropout=0.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 2))

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        logits = self.net(inputs)
        loss = functional.cross_entropy(logits, labels)
        self.log("accuracy", (logits.argmax(dim=1) == labels).float().mean())
        self.log("loss", loss)
        return {"loss": loss, "behavior": logits.mean(dim=0)}

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)


class Losses(pl.Callback):
    """Those of the elite, by generation."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


def losses(trainer):
    return next(callback.values for callback in trainer.callbacks if isinstance(callback, Losses))


def fit(strategy=None, module=None, steps=5, loader=None, ckpt_path=None, callbacks=(), **options):
    module = module or Net()
    trainer = pl.Trainer(
        **{
            "max_steps": steps,
            "max_epochs": -1,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "log_every_n_steps": 1,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        },
        strategy=strategy or DeepGAStrategy(**SMALL),
        callbacks=[*callbacks, Losses()],
    )
    trainer.fit(module, loader or ResumableLoader(samples(), batch_size=60), ckpt_path=ckpt_path)
    return module, trainer


def test_the_run_is_that_of_the_function():
    module, trainer = fit(DeepGAStrategy(**SMALL), steps=6)
    start, (inputs, labels) = Net(), samples()[:]

    def fitness(weights):
        logits = call_each(start.net, weights, inputs)
        return -torch.vmap(functional.cross_entropy, in_dims=(0, None))(logits, labels)

    result = deep_ga(
        fitness,
        flatten(start.net),
        generations=6,
        vectorized=True,
        chunk_size=4,
        **{key: value for key, value in SMALL.items() if key != "chunk"},
    )
    assert trainer.strategy.elite == result.elite
    assert torch.equal(flatten(module), result.weights)
    assert trainer.strategy.genetic.evaluations == result.evaluations == 120
    assert trainer.global_step == 6


def test_the_module_holds_the_elite_and_logs_it_once():
    module, trainer = fit()
    values = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert values["ga/best"] == pytest.approx(-values["loss"], rel=1e-6)
    assert values["ga/elite_validation"] == values["ga/best"]
    assert values["ga/mean"] < values["ga/best"]
    assert values["ga/genome_len"] == len(trainer.strategy.elite)
    assert values["ga/genome_bytes"] == len(trainer.strategy.elite.to_bytes())
    assert values["ga/sigma"] == pytest.approx(0.1)
    assert values["ga/evals"] == 100
    assert losses(trainer) == sorted(losses(trainer), reverse=True)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert all(p.grad is None for p in module.parameters())


def test_frozen_parameters_do_not_evolve():
    module = Net()
    module.net[0].requires_grad_(False)
    before = [p.clone() for p in module.parameters()]
    fit(module=module)
    assert [torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)] == [True, True, False, False]


def test_initial_weights_of_the_paper():
    module, trainer = fit(DeepGAStrategy(**SMALL, init="fan_in"), steps=1)
    elite = trainer.strategy.elite
    assert len(elite) == 0
    assert torch.equal(flatten(module), fan_in_init(Net())(elite.init_seed))


def test_a_logged_value_is_the_fitness():
    module, trainer = fit(DeepGAStrategy(**SMALL, fitness="metric:accuracy"))
    assert trainer.callback_metrics["ga/best"] == trainer.callback_metrics["accuracy"] > 0.5
    with pytest.raises(MisconfigurationException, match="'f1' .* and it logs 'accuracy', 'loss'"):
        fit(DeepGAStrategy(**SMALL, fitness="metric:f1"))


def test_novelty_selects_by_behavior():
    module, trainer = fit(DeepGAStrategy(**SMALL, novelty=Novelty(k=3, archive_prob=0.5)), steps=8)
    values, genetic = trainer.callback_metrics, trainer.strategy.genetic
    assert values["ga/archive_size"] == len(genetic.archive) > 20
    assert genetic.archive.shape[1] == 2
    assert values["ga/novelty_mean"] > 0
    assert losses(trainer)[-1] == min(losses(trainer))  # the module holds the fittest ever seen

    class Silent(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)["loss"]

    with pytest.raises(MisconfigurationException, match="entry 'behavior'"):
        fit(DeepGAStrategy(**SMALL, novelty=Novelty()), Silent())


@pytest.mark.filterwarnings("ignore:.*torch.func.vmap")
def test_random_numbers_are_common_to_all_and_leave_no_trace():
    """Dropout: the same masks whether individuals are evaluated at once or one by one, and on what is drawn besides."""
    runs = {}
    for vectorize in ("always", "never"):
        torch.manual_seed(len(vectorize))
        strategy = DeepGAStrategy(**SMALL, elite_candidates=3, elite_episodes=4, vectorize=vectorize)
        fit(strategy, Net(dropout=0.5), loader=DataLoader(samples(), 60))
        runs[vectorize] = strategy.genetic
    assert runs["always"].elite == runs["never"].elite
    assert runs["always"].elite_score == pytest.approx(runs["never"].elite_score, rel=1e-5)
    assert runs["always"].evaluations == 5 * (20 + 3 * 4)
    strategy = DeepGAStrategy(**SMALL)
    assert len({strategy._draw(episode, generation) for episode in range(5) for generation in range(5)}) == 25
    state = torch.get_rng_state()
    _, trainer = fit(module=Net(dropout=0.5), loader=ResumableLoader(samples(), batch_size=60))
    assert torch.equal(torch.get_rng_state(), state)
    # what the elite logs is what it was chosen by
    assert losses(trainer)[-1] == pytest.approx(-trainer.callback_metrics["ga/best"].item(), rel=1e-6)


class Together(Net):
    """Evaluates individuals together."""

    calls = 0

    def population_losses(self, parameters, batch):
        type(self).calls += 1
        inputs, labels = batch
        hidden = torch.tanh(inputs @ parameters["net.0.weight"].mT + parameters["net.0.bias"][:, None])
        logits = hidden @ parameters["net.3.weight"].mT + parameters["net.3.bias"][:, None]
        return torch.stack([functional.cross_entropy(each, labels) for each in logits])


def test_a_module_may_evaluate_individuals_together():
    plain, together = DeepGAStrategy(**SMALL), DeepGAStrategy(**SMALL)
    fit(plain)
    fit(together, Together())
    assert together.elite == plain.elite
    assert Together.calls == 5 * 5  # twenty individuals in chunks of four


class Broken(Net):
    """Losses that are not finite, of some individuals or of all."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def training_step(self, batch, batch_idx):
        output = super().training_step(batch, batch_idx)
        bad = self.net[0].bias.sum() > self.share
        return {**output, "loss": torch.where(bad, torch.nan, output["loss"])}


def test_individuals_without_a_finite_fitness():
    threshold = Net().net[0].bias.sum().item()
    with pytest.warns(UserWarning, match="of 20 individuals is NaN or infinite") as caught:
        module, trainer = fit(module=Broken(threshold + 1e-6))
    assert sum("individuals is NaN" in str(w.message) for w in caught) == 1
    assert trainer.callback_metrics["ga/nonfinite"] > 0
    assert all(torch.isfinite(p).all() for p in module.parameters())
    module = Broken(-1e9)
    before = flatten(module)
    with pytest.raises(ValueError, match="generation 0: the fitness of all 20 individuals"):
        fit(module=module)
    assert torch.equal(flatten(module), before)


RESUMED = {
    "exact": {},
    "all": {
        "novelty": Novelty(k=3, archive_prob=0.3),
        "init": "fan_in",
        "mutation_power": PowerSchedule(0.2, 0.05, 8, "exponential"),
        "elite_candidates": 3,
        "elite_episodes": 2,
    },
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_whole_one_bit_for_bit(name, tmp_path):
    def strategy():
        return DeepGAStrategy(**{**SMALL, **RESUMED[name]})

    def loader():
        return ResumableLoader(samples(), batch_size=20, shuffle=True)

    whole, trainer = fit(strategy(), Net(0.2), steps=8, loader=loader(), callbacks=[ResumeState()])
    save = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    fit(strategy(), Net(0.2), steps=5, loader=loader(), callbacks=[ResumeState(), save])
    for step in (1, 5):  # within epochs of three
        path = str(tmp_path / f"step={step}.ckpt")
        torch.load(path, weights_only=True)
        again, resumed = fit(strategy(), Net(0.2), steps=8, loader=loader(), ckpt_path=path, callbacks=[ResumeState()])
        assert torch.equal(flatten(again), flatten(whole))
        assert losses(resumed)[-3:] == losses(trainer)[-3:]
        one, other = trainer.strategy.genetic.state_dict(), resumed.strategy.genetic.state_dict()
        assert str(one) == str(other)
        assert {k: v.item() for k, v in trainer.callback_metrics.items()} == {
            k: v.item() for k, v in resumed.callback_metrics.items()
        }


def test_a_generation_without_a_better_child_is_resumed(tmp_path):
    """The elite is then the module's own weights: a genome of no bytes."""
    strategy = {**SMALL, "mutation_power": 1e3}
    save = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    _, trainer = fit(DeepGAStrategy(**strategy), steps=1, callbacks=[save])
    assert len(trainer.strategy.elite) == 0
    _, resumed = fit(DeepGAStrategy(**strategy), steps=2, ckpt_path=str(tmp_path / "last.ckpt"))
    assert resumed.strategy.genetic.generation == 2


def test_a_checkpoint_of_another_search_is_refused(tmp_path):
    save = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    fit(steps=2, callbacks=[save])
    path = str(tmp_path / "last.ckpt")
    for other, message in (
        ({"init": "fan_in"}, "has init='module'"),
        ({"seed": 2}, "seed=1 there, 2 here"),
        ({"population": 30}, "population=20 there, 30 here"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            fit(DeepGAStrategy(**{**SMALL, **other}), ckpt_path=path)


def test_the_genome_is_exported(tmp_path):
    strategy = DeepGAStrategy(**SMALL, export="elite.json")
    module, _ = fit(strategy, default_root_dir=tmp_path / "new")
    tmp_path /= "new"
    assert load_genome(tmp_path / "elite.json") == strategy.elite
    assert torch.equal(load_weights(tmp_path / "elite.json", flatten(Net())), flatten(module))
    with pytest.raises(ValueError, match="before the first generation"):
        DeepGAStrategy().export_genome(tmp_path / "none.json")


def test_by_its_name_and_in_bfloat16():
    module, trainer = fit("deep_ga", steps=1, precision="bf16-mixed")
    assert isinstance(trainer.strategy, DeepGAStrategy)
    assert trainer.strategy.genetic.population == 100
    assert module.net[0].weight.dtype == torch.float32
    assert trainer.callback_metrics["ga/best"] > -0.75


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"population": 1}, "population"),
        ({"truncation": 21}, "truncation"),
        ({"mutation_power": 0.0}, "mutation_power"),
        ({"elite_candidates": 2}, "need each other"),
        ({"init": "zeros"}, "init must be one of"),
        ({"fitness": "loss"}, "fitness must be"),
        ({"fitness": "metric:"}, "fitness must be"),
        ({"chunk": 0}, "chunk"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_values(argument, message):
    with pytest.raises(ValueError, match=message):
        DeepGAStrategy(**{**SMALL, **argument})


class Normalized(Net):
    def __init__(self):
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches must be 1"),
        ({"gradient_clip_val": 1.0}, "no gradients to clip"),
        ({"module": Normalized}, "track_running_stats=False"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, message):
    options = {**options, **({"module": options["module"]()} if "module" in options else {})}
    with pytest.raises(MisconfigurationException, match=message):
        fit(**options)


# Ranks


def test_one_two_and_three_ranks_are_the_same_run(tmp_path):
    """In one group of three processes: two of them are the ranks of the second run."""
    alone = run_of(1, 0, tmp_path)
    with socket.socket() as free, socket.socket() as other:
        free.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = {3: free.getsockname()[1], 2: other.getsockname()[1]}
    torch.multiprocessing.spawn(ranks, (ports, str(tmp_path)), nprocs=3)
    for world in (2, 3):
        for rank in range(world):
            found = torch.load(tmp_path / f"{world}-{rank}.pt", weights_only=True)
            assert found["genetic"] == alone["genetic"]
            assert torch.equal(found["weights"], alone["weights"])
            assert found["sent"] == alone["sent"] == 6 * 20 * (1 + 2) * 4  # bytes: fitness and two of behavior
            assert torch.equal(found["resumed"], alone["weights"])  # from the checkpoint of the run alone


def ranks(rank, ports, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for world, port in ports.items():
        if rank < world:
            os.environ.update(
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                WORLD_SIZE=str(world),
                NODE_RANK="0",
                LOCAL_RANK=str(rank),
            )
            torch.save(run_of(world, rank, Path(folder)), Path(folder, f"{world}-{rank}.pt"))
            dist.destroy_process_group()


class Counting(DeepGAStrategy):
    """Counts the bytes of what travels in a search."""

    sent = 0

    def sum_over_ranks(self, tensor):
        self.sent += tensor.numel() * tensor.element_size()
        return super().sum_over_ranks(tensor)


def run_of(world, rank, folder):
    options = {**SMALL, "novelty": Novelty(k=3, archive_prob=0.3)}
    strategy = Counting(**options)
    save = [ModelCheckpoint(folder, every_n_train_steps=4, filename="four")] if world == 1 else []
    loader = ResumableLoader(samples(), batch_size=30, shuffle=True)
    module, _ = fit(strategy, Net(0.3), steps=6, loader=loader, devices=world, callbacks=save)
    state = strategy.genetic.state_dict()
    answer = {"genetic": str(state), "weights": flatten(module), "sent": strategy.sent}
    if world > 1:
        path = str(folder / "four.ckpt")
        loader = ResumableLoader(samples(), batch_size=30, shuffle=True)
        module, _ = fit(Counting(**options), Net(0.3), 6, loader, path, devices=world)
        answer["resumed"] = flatten(module)
    return answer
