"""Deep GA (arXiv:1712.06567) at a size of minutes, and beside evotorch's genetic algorithm.

    python benchmarks/deep_ga.py digits maze targets throughput    # some of the parts, in this order; default: all
    python benchmarks/deep_ga.py --draw                            # only the picture
    python benchmarks/deep_ga.py --film runs/atari/deep_ga         # a strip of the elite that a run of the recipe found

digits: the strategy on scikit-learn's digits, MLP 64-16-10, population 200, truncation 20, sigma 0.05, 150
generations, three seeds. maze: ``DeceptiveMaze``, population 100, truncation 20, sigma 0.1, at most 200 generations,
ten seeds, with novelty (k=15, archive probability 0.02) and without. targets: evaluations to a target on Sphere-100 and
Rastrigin-20, ten seeds, with evotorch's ``GeneticAlgorithm`` at the same population and mutation power, parents not
evaluated again. throughput: evaluations a second of the digits' population, paired with evotorch's vectorized
evaluation of the same network in this process. The last two need ``pip install evotorch==0.6.1``.

A part's results replace those on file in ``benchmarks/results/deep_ga.json``; the picture goes to
``docs/methods/img/deep-neuroevolution.png``.
"""

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from _fits import quiet_trainer
from _runner import machine_record, paired_times, ratio_summary, read_result, write_result
from torch import Tensor, nn
from torch.nn import functional

from lightning_opt.cli.errors import import_class
from lightning_opt.cli.runs import checkpoint_of
from lightning_opt.data import Digits
from lightning_opt.models import MLP, Classifier, GymnasiumPolicy
from lightning_opt.solvers.deep_ga import (
    DeceptiveMaze,
    GenomeDecoder,
    Novelty,
    call_each,
    deep_ga,
    fan_in_init,
)
from lightning_opt.strategies import DeepGAStrategy

PICTURE = Path(__file__).parents[1] / "docs" / "methods" / "img" / "deep-neuroevolution.png"
FILM = PICTURE.with_name("deep-neuroevolution-frostbite.png")
PARTS = ("digits", "maze", "targets", "throughput")
GENERATIONS = 150
MAZE = {"population": 100, "truncation": 20, "mutation_power": 0.1, "vectorized": True, "chunk_size": 100}
# dimension, bound of the first weights, mutation power, target of what is minimized
TARGETS = {"sphere": (100, 1.0, 0.05, 5.0), "rastrigin": (20, 5.12, 0.2, 160.0)}
LIMIT = 400  # generations to reach it
POPULATION, TRUNCATION = 100, 20


def main() -> None:
    """Measure the parts, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--draw", action="store_true", help="only draw the picture from the results on file")
    parser.add_argument("--film", metavar="RUN", help="only draw an episode of an Atari run's elite")
    options = parser.parse_args()
    if options.film:
        film(options.film)
        return
    torch.set_num_threads(1)
    for part in [] if options.draw else options.parts or PARTS:
        begin = time.process_time()
        result = {"digits": digits, "maze": maze, "targets": targets, "throughput": throughput}[part]()
        old = {name: value for name, value in read_result("deep_ga").items() if name in PARTS}
        stamp = {"cpu_seconds": time.process_time() - begin, "torch_threads": machine_record()["torch_threads"]}
        write_result("deep_ga", {**old, part: {**result, **stamp}})
        print(part, {name: value for name, value in result.items() if name not in ("runs", "curves", "trails")})
    draw()


def film(run: str) -> None:
    """Eight moments of an episode that the elite of ``lightning-opt fit --config atari/deep_ga`` plays."""
    import matplotlib.pyplot as plt

    checkpoint = checkpoint_of(Path(run))
    model = yaml.safe_load((checkpoint.parents[1] / "config.yaml").read_text())["model"]["init_args"]
    net = import_class(model["net"]["class_path"])(**model["net"]["init_args"])
    policy = GymnasiumPolicy(**{**model, "net": net})
    policy.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    pictures = policy.film(seed=0)
    figure, places = plt.subplots(1, len(pictures), figsize=(1.6 * len(pictures), 2.1), layout="constrained")
    for place, picture in zip(places, pictures, strict=True):
        place.imshow(picture)
        place.axis("off")
    figure.savefig(FILM, dpi=80)
    policy.teardown("")


# --- digits ---


class Curve(pl.Callback):
    """Test accuracy of the elite, and the size of its genome."""

    def __init__(self, data: Digits) -> None:
        assert data.test_set is not None
        self.images, self.labels = data.test_set.__getitems__(range(len(data.test_set)))
        self.rows: list[dict[str, float]] = []

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        logits = pl_module(self.images)
        values = trainer.callback_metrics
        self.rows.append(
            {
                "generation": trainer.global_step,
                "accuracy": (logits.argmax(dim=1) == self.labels).double().mean().item(),
                "train_loss": values["train/loss"].item(),
                "genome_bytes": int(values["ga/genome_bytes"]),
            }
        )


class Model(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)  # holds the parameters


def digits() -> dict[str, Any]:
    curves, seconds = {}, []
    for seed in range(3):
        data = Digits(batch_size=2000)
        data.setup()
        curve = Curve(data)
        strategy = DeepGAStrategy(population=200, truncation=20, mutation_power=0.05, init="fan_in", seed=seed)
        trainer = quiet_trainer(
            max_steps=GENERATIONS, max_epochs=-1, strategy=strategy, devices=1, callbacks=[curve], limit_val_batches=0
        )
        begin = time.process_time()
        trainer.fit(Model(MLP(64, (16,))), data)
        seconds.append(time.process_time() - begin)
        curves[str(seed)] = curve.rows
    last = [rows[-1] for rows in curves.values()]
    return {
        "accuracy": [row["accuracy"] for row in last],
        "train_loss": [row["train_loss"] for row in last],
        "genome_bytes": [row["genome_bytes"] for row in last],
        "dense_bytes": 4 * sum(p.numel() for p in MLP(64, (16,)).parameters()),
        "fit_cpu_seconds": statistics.median(seconds),
        "curves": curves,
    }


# --- maze ---


def maze() -> dict[str, Any]:
    room = DeceptiveMaze()
    result: dict[str, Any] = {"runs": {}, "trails": {}}
    for name, novelty in (("novelty", Novelty(k=15, archive_prob=0.02)), ("fitness", None)):

        def fitness(weights: Tensor, novelty: Novelty | None = novelty) -> Any:
            return room(weights) if novelty else room(weights)[0]

        runs, trails = [], []
        for seed in range(10):
            found = deep_ga(fitness, room.n_params, generations=200, novelty=novelty, seed=seed, target=0.0, **MAZE)
            runs.append({"seed": seed, "generations": len(found.history), "fitness": found.fitness})
            trails.append([[round(x, 3) for x in place] for place in room.trails(found.weights[None])[0].tolist()])
            print(name, runs[-1], flush=True)
        result["runs"][name] = runs
        result["trails"][name] = trails
        result[f"{name}_solved"] = sum(run["fitness"] == 0 for run in runs)
    return result


# --- targets ---


def sphere(x: Tensor) -> Tensor:
    return x.square().sum(-1)


def rastrigin(x: Tensor) -> Tensor:
    return (x.square() - 10 * (2 * math.pi * x).cos() + 10).sum(-1)


def targets() -> dict[str, Any]:
    functions = {"sphere": sphere, "rastrigin": rastrigin}
    result: dict[str, Any] = {"runs": {}}
    for name, (dimension, bound, power, target) in TARGETS.items():
        ours = [our_evaluations(functions[name], dimension, bound, power, target, seed) for seed in range(10)]
        theirs = [evotorch_evaluations(functions[name], dimension, bound, power, target, seed) for seed in range(10)]
        result["runs"][name] = {"deep_ga": [*map(finite, ours)], "evotorch": [*map(finite, theirs)]}
        medians = {who: statistics.median(counts) for who, counts in (("deep_ga", ours), ("evotorch", theirs))}
        reached = {
            f"{who}_reached": sum(map(math.isfinite, counts))
            for who, counts in (("deep_ga", ours), ("evotorch", theirs))
        }
        result[name] = {**{who: finite(m) for who, m in medians.items()}, **reached}
        if all(map(math.isfinite, medians.values())):
            result[name]["ratio"] = medians["deep_ga"] / medians["evotorch"]
    return result


def finite(count: float) -> float | None:
    """For JSON: None where the target was not reached."""
    return count if math.isfinite(count) else None


def our_evaluations(function: Any, dimension: int, bound: float, power: float, target: float, seed: int) -> float:
    def init(number: int) -> Tensor:
        return bound * (2 * torch.rand(dimension, generator=torch.Generator().manual_seed(number)) - 1)

    found = deep_ga(
        lambda x: -function(x),
        init,
        generations=LIMIT,
        population=POPULATION,
        truncation=TRUNCATION,
        mutation_power=power,
        seed=seed,
        vectorized=True,
        chunk_size=POPULATION,
        target=-target,
    )
    return found.evaluations if found.fitness >= -target else math.inf


def evotorch_evaluations(function: Any, dimension: int, bound: float, power: float, target: float, seed: int) -> float:
    from evotorch import Problem
    from evotorch.algorithms import GeneticAlgorithm
    from evotorch.decorators import vectorized
    from evotorch.operators import GaussianMutation

    evaluated = 0

    @vectorized
    def counted(x: Tensor) -> Tensor:
        nonlocal evaluated
        evaluated += len(x)
        return function(x)

    problem = Problem("min", counted, solution_length=dimension, initial_bounds=(-bound, bound), seed=seed)
    searcher = GeneticAlgorithm(
        problem, popsize=POPULATION, operators=[GaussianMutation(problem, stdev=power)], re_evaluate=False
    )
    while True:
        searcher.step()
        if float(searcher.status["best_eval"]) <= target:
            return evaluated
        if evaluated >= LIMIT * POPULATION:
            return math.inf


# --- throughput ---


class Loss(nn.Module):
    """Cross-entropy of the digits' network on the training images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = MLP(64, (16,))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(self.net(images), labels)


def throughput(population: int = 200, rounds: int = 60) -> dict[str, Any]:
    from evotorch import Problem
    from evotorch.decorators import vectorized
    from evotorch.neuroevolution.net.functional import make_functional_module

    data = Digits()
    data.setup()
    assert data.train_set is not None
    images, labels = data.train_set.__getitems__(range(len(data.train_set)))
    loss = Loss()
    init = fan_in_init(loss)
    decoder = GenomeDecoder(init)
    search_seed = deep_ga(lambda w: -w.square().sum(), init, generations=1, population=population).elite
    decoder.remember([search_seed])
    genomes = [search_seed.mutated(seed, 0.05) for seed in range(population)]
    weights = decoder.stack(genomes)
    flat = make_functional_module(Loss())

    @vectorized
    def theirs(x: Tensor) -> Tensor:
        return -torch.vmap(lambda vector: flat(vector, images, labels))(x)

    problem = Problem("max", theirs, solution_length=weights.shape[1], initial_bounds=(-0.1, 0.1))
    batch = problem.generate_batch(population)

    def ours(chunk: int, decode: bool = False) -> Tensor:
        vectors = decoder.stack(genomes) if decode else weights
        with torch.no_grad():
            return -torch.cat([call_each(loss, part, images, labels) for part in vectors.split(chunk)])

    def evotorch() -> None:
        batch.set_values(weights)
        problem.evaluate(batch)

    evotorch()
    torch.testing.assert_close(batch.evals[:, 0], ours(64), rtol=1e-5, atol=1e-6)
    functions = {"ours": lambda: ours(64), "ours_with_decoding": lambda: ours(64, decode=True), "evotorch": evotorch}
    times = paired_times(functions, rounds, clock=time.process_time)
    return {
        "population": population,
        "images": len(labels),
        "evaluations_per_second": {name: population / statistics.median(t) for name, t in times.items()},
        "speed_beside_evotorch": ratio_summary(times, "evotorch", "ours"),  # of times, so of speeds the other way round
        "speed_with_decoding": ratio_summary(times, "evotorch", "ours_with_decoding"),
    }


# --- picture ---


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results = read_result("deep_ga")
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.8), constrained_layout=True)
    if "digits" in results:
        for rows in results["digits"]["curves"].values():
            generation = [row["generation"] for row in rows]
            axes[0].plot(generation, [100 * row["accuracy"] for row in rows], color="C0", alpha=0.8)
            axes[1].plot(generation, [row["genome_bytes"] for row in rows], color="C1", alpha=0.8)
        axes[0].set(title="Digits: accuracy of the elite, 3 seeds", xlabel="generation", ylabel="test accuracy, %")
        axes[0].axhline(78, color="0.6", linestyle="--", linewidth=1)
        dense = results["digits"]["dense_bytes"]
        axes[1].axhline(dense, color="0.6", linestyle="--", linewidth=1)
        axes[1].text(2, dense * 0.97, "the weights themselves", va="top", color="0.4")
        axes[1].set(title="Digits: bytes of its genome", xlabel="generation", ylim=(0, None))
    if "maze" in results:
        room = DeceptiveMaze()
        for axis, name, title in ((axes[2], "fitness", "by fitness"), (axes[3], "novelty", "by novelty")):
            for (x0, y0), (x1, y1) in room.walls:
                axis.plot([x0, x1], [y0, y1], color="black")
            for trail, run in zip(results["maze"]["trails"][name], results["maze"]["runs"][name], strict=True):
                color = "C2" if run["fitness"] == 0 else "C3"
                axis.plot([x for x, _ in trail], [y for _, y in trail], color=color, linewidth=1, alpha=0.7)
            axis.plot(*room.start, "o", color="black")
            axis.plot(*room.goal, "*", color="gold", markersize=14, markeredgecolor="black")
            solved = results["maze"][f"{name}_solved"]
            axis.set(title=f"Maze {title}: {solved} of 10 arrive", aspect="equal", xticks=[], yticks=[])
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
