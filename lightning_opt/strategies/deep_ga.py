import itertools
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_opt._checks import check_choice
from lightning_opt.registry import register
from lightning_opt.solvers.deep_ga import (
    GeneticSearch,
    Genome,
    GenomeDecoder,
    Novelty,
    PowerSchedule,
    fan_in_init,
    save_genome,
)

from ._candidates import Vectorize
from ._fitness import CandidateFitness
from ._gradient_free import GradientFreeStrategy

CHUNK = 16


@register(
    "strategy",
    summary="Deep GA: trains without gradients by a genetic algorithm on seed lists, over ranks",
    paper="1712.06567",
    card="deep-neuroevolution",
    log_prefix="ga",
    aliases={"deep_ga": {}},
)
class DeepGAStrategy(GradientFreeStrategy):
    """Trains a module by a genetic algorithm: for losses, rewards or metrics that have no useful gradient.

    ``Trainer(strategy="deep_ga")``. One training batch is one generation: every individual is evaluated on it by
    ``training_step``, parents are the ``truncation`` fittest, children are parents plus Gaussian noise, and the module
    holds the elite, which is validated and saved. See :class:`lightning_opt.solvers.deep_ga.GeneticSearch` for the
    algorithm, and :func:`lightning_opt.solvers.deep_ga.deep_ga` for the same without a Trainer. Where there is a
    gradient, training with it is faster.

    An individual is the list of seeds of its mutations. Ranks share the evaluations out, every rank on the same batch;
    only fitness travels, 4 bytes an individual (with novelty, its behavior too). The same settings choose the same
    elite, bit for bit, on any number of ranks of the same kind with the same number of threads, and a run resumes bit
    for bit, also on another number of ranks.

    ``training_step`` may draw random numbers, for dropout or to choose episodes: torch's global random state there
    depends on ``seed``, the generation and the episode alone, and is put back. Evaluations log nothing; the elite is
    evaluated once more with the same random numbers, and logs as usual.

    Logs ``ga/best`` and ``ga/mean`` (fitness of the generation), ``ga/elite_validation`` (fitness of the elite, or its
    mean over ``elite_episodes``), ``ga/genome_len``, ``ga/genome_bytes``, ``ga/sigma``, ``ga/evals``, ``ga/nonfinite``
    (individuals whose fitness is NaN or infinite), and with novelty ``ga/novelty_mean`` and ``ga/archive_size``.

    Source: arXiv:1712.06567.

    Args:
        population: Individuals of a generation, the elite among them.
        truncation: Parents; 0 for random search.
        mutation_power: Standard deviation of a mutation, constant or scheduled.
        elite_candidates: With noisy fitness: so many of the best are evaluated again, with new random numbers on the
            same batch, to choose the elite.
        elite_episodes: How often.
        novelty: Select parents by novelty of the entry ``"behavior"`` in the dict that ``training_step`` returns. The
            elite is still the fittest seen.
        init: "module" mutates the module's weights; "fan_in" draws initial weights as the paper does, see
            :func:`lightning_opt.solvers.deep_ga.fan_in_init`.
        fitness: "neg_loss", or "metric:NAME" for a value, more being better, that ``training_step`` logs as NAME.
        export: A JSON file that the elite's genome is written to when training ends, in the Trainer's
            ``default_root_dir`` unless the path is absolute.
        seed: Of all random numbers.
        vectorize: Whether individuals are evaluated at once by ``torch.func.vmap``: "auto", "always" or "never". A
            module with ``population_losses(parameters, batch)`` evaluates them at once itself.
        chunk: Individuals evaluated at once, and the least that a rank takes.
        ddp: What :class:`lightning.pytorch.strategies.DDPStrategy` takes, such as ``process_group_backend``.

    Raises:
        ValueError: If a value is out of range, and in training if no individual has finite fitness.
        MisconfigurationException: In ``setup``, for what has no meaning without gradients: gradient accumulation,
            clipping, ``precision="16-mixed"``, manual optimization; for BatchNorm with running statistics; and when a
            checkpoint of another search is to be continued.

    Cost:
        A step is ``population + elite_candidates * elite_episodes + 1`` forward passes over all ranks, and two normal
        numbers a parameter and individual. Memory: ``truncation + chunk + 2`` vectors as large as the model. Bytes on
        the wire: 4 an individual. A checkpoint grows by 8 bytes a parent and generation.

    Example:
        >>> import lightning.pytorch as pl
        >>> strategy = DeepGAStrategy(population=50, truncation=10, mutation_power=0.05)
        >>> trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False)
    """

    log_prefix: ClassVar[str] = "ga"
    strategy_name = "deep_ga"

    def __init__(
        self,
        population: int = 100,
        truncation: int = 20,
        mutation_power: float | PowerSchedule = 0.02,
        *,
        elite_candidates: int = 1,
        elite_episodes: int = 0,
        novelty: Novelty | None = None,
        init: Literal["module", "fan_in"] = "module",
        fitness: str = "neg_loss",
        export: str | None = None,
        seed: int = 0,
        vectorize: Vectorize = "auto",
        chunk: int = CHUNK,
        **ddp: Any,
    ) -> None:
        super().__init__(vectorize=vectorize, chunk=chunk, **ddp)
        check_choice("init", init, ("module", "fan_in"))
        kind, _, metric = fitness.partition(":")
        if fitness != "neg_loss" and (kind != "metric" or not metric):
            raise ValueError(f"fitness must be 'neg_loss' or 'metric:NAME', got {fitness!r}")
        self._settings: dict[str, Any] = {
            "population": population,
            "truncation": truncation,
            "mutation_power": mutation_power,
            "elite_candidates": elite_candidates,
            "elite_episodes": elite_episodes,
            "novelty": novelty,
            "seed": seed,
            "initial_seeds": init == "fan_in",
        }
        self.genetic = GeneticSearch(**self._settings)
        self.init = init
        self._metric = metric or None
        self._export = export
        self._chunk_size = chunk
        self._warned = False

    @property
    def elite(self) -> Genome | None:
        """The genome of the module's weights; None before the first generation."""
        return self.genetic.elite

    def export_genome(self, path: str | Path) -> None:
        """Write the elite's genome as a JSON file that :func:`lightning_opt.solvers.deep_ga.load_weights` reads.

        Raises:
            ValueError: Before the first generation.
        """
        if self.elite is None:
            raise ValueError("there is no elite before the first generation")
        save_genome(path, self.elite, self.decoder.weights(self.elite))

    def start(self, point: Tensor) -> None:
        """A search that begins at the module's weights, or with random ones."""
        assert self.lightning_module is not None
        self.genetic = GeneticSearch(**self._settings)
        self.candidate_loss = self.fitness = CandidateFitness(
            self.lightning_module, self.flat, self, self._vectorize, self._chunk_size
        )
        self.fitness.metric, self.fitness.behavior = self._metric, self.genetic.novelty is not None
        self._begin_at(point if point.dtype == torch.float64 else point.float())

    def search(self) -> tuple[Tensor, dict[str, float]]:
        """One generation."""
        genetic = self.genetic
        genomes = genetic.ask()
        measured = self._measure([(genome, 0) for genome in genomes])
        fitness, behavior = measured[:, 0], measured[:, 1:] if genetic.novelty is not None else None
        scores = None
        if torch.isfinite(fitness).any() and (candidates := genetic.candidates(fitness)):
            episodes = range(1, genetic.elite_episodes + 1)
            again = self._measure([(genomes[i], episode) for episode in episodes for i in candidates])[:, 0]
            scores = again.double().reshape(len(episodes), len(candidates)).mean(dim=0)
        result = genetic.tell(fitness, behavior, scores)
        assert genetic.elite is not None
        self.decoder.remember([*genetic.parents, genetic.elite])
        self._warn_of(result.nonfinite)
        values = {
            "best": result.best,
            "mean": result.mean,
            "elite_validation": result.elite_score,
            "genome_len": float(len(genetic.elite)),
            "genome_bytes": float(len(genetic.elite.to_bytes())),
            "sigma": result.sigma,
            "evals": float(genetic.evaluations),
            "nonfinite": float(result.nonfinite),
        }
        if result.novelty_mean is not None:
            values["novelty_mean"] = result.novelty_mean
            values["archive_size"] = float(0 if genetic.archive is None else len(genetic.archive))
        return self.decoder.weights(genetic.elite), values

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """At the elite, with the random numbers of the generation that chose it."""
        devices = [] if self.root_device.type == "cpu" else [self.root_device]
        with torch.random.fork_rng(devices, device_type=self.root_device.type if devices else "cuda"):
            torch.manual_seed(self._draw(0, self.genetic.generation - 1))
            return super().training_step(*args, **kwargs)

    def search_state(self) -> dict[str, Any]:
        """Genomes, and the weights that they start from; the same on every rank."""
        return {"init": self.init, "start": self._start, "search": self.genetic.state_dict()}

    def load_search_state(self, states: list[dict[str, Any]]) -> None:
        """Go on, on any number of ranks."""
        state = states[0]
        if state["init"] != self.init or len(state["start"]) != self.flat.dimension:
            raise MisconfigurationException(
                f"DeepGAStrategy cannot continue the search of the checkpoint, which has init={state['init']!r} and"
                f" {len(state['start'])} parameters; this one has init={self.init!r} and {self.flat.dimension}."
            )
        try:
            self.genetic.load_state_dict(state["search"])
        except ValueError as error:
            raise MisconfigurationException(f"DeepGAStrategy cannot continue the checkpoint: {error}") from error
        self._begin_at(state["start"])

    def on_train_end(self) -> None:
        """Export the elite."""
        super().on_train_end()
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if self._export is None or self.elite is None or not self.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = Path(trainer.default_root_dir) / self._export
        path.parent.mkdir(parents=True, exist_ok=True)
        self.export_genome(path)

    def _begin_at(self, point: Tensor) -> None:
        self._start = point
        init = point
        if self.init == "fan_in":
            parts = self.flat.views(point)
            named = {name: torch.nn.Parameter(part, requires_grad=False) for name, part in parts.items()}
            init = fan_in_init(named)  # type: ignore[assignment]
        self.decoder = GenomeDecoder(init)
        known = [*self.genetic.parents, *([] if self.genetic.elite is None else [self.genetic.elite])]
        self.decoder.remember(known)

    def _measure(self, individuals: list[tuple[Genome, int]]) -> Tensor:
        """Fitness, and behavior behind it, ``[n, 1 + d]``, of genomes in episodes; the same on every rank.

        Individuals go to ranks in chunks that do not depend on the number of ranks: what a batched matrix product gives
        may depend, in its last bits, on what is computed beside it.
        """
        chunks: list[tuple[int, list[Genome], int]] = []
        start = 0
        for episode, group in itertools.groupby(individuals, key=lambda individual: individual[1]):
            members = [genome for genome, _ in group]
            for i in range(0, len(members), self._chunk_size):
                chunks.append((start + i, members[i : i + self._chunk_size], episode))
            start += len(members)
        own = chunks[self.global_rank :: self.world_size]
        everything: Tensor | None = None
        for place, genomes, episode in own or chunks[:1]:  # one to spare still tells the width of a behavior
            self.fitness.draw = self._draw(episode, self.genetic.generation)
            values = self.evaluate(self.decoder.stack(genomes)).float()
            if everything is None:
                everything = values.new_zeros(len(individuals), values.shape[1])
            if own:
                everything[place : place + len(genomes)] = values
        assert everything is not None
        return self.sum_over_ranks(everything).cpu()  # one number and zeros: exact

    def _draw(self, episode: int, generation: int) -> int:
        key = (self.genetic.seed, generation, 2, episode)
        return int(np.random.SeedSequence(key).generate_state(1)[0])

    def _warn_of(self, nonfinite: int) -> None:
        if nonfinite and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"DeepGAStrategy: the fitness of {nonfinite} of {self.genetic.population} individuals is NaN or"
                " infinite; they have no children. ga/nonfinite counts them."
            )
