"""Multiplicative beside Gaussian diffusion: the same network, steps and seeds; distance to held-out images.

    python benchmarks/diffusion.py digits           trains 3 seeds of both models and scores every sampler
    python benchmarks/diffusion.py fashion_mnist    one seed of the multiplicative model alone, at the size of the
                                                    recipe fashion_mnist/gbm_diffusion_small
    python benchmarks/diffusion.py digits --plot    only draw the pictures again

Both models are trained as the recipe of the data set says, one with ``--model=GaussianDiffusion``; the learning rate is
chosen for each by the validation loss of seed 0 among those of ``RATES``. Each sampler then draws as many images as
there are held-out ones, and ``score_samples`` compares them in the features of the shipped net, beside as many training
images and as noise. "ancestral" is the sampler that each model was proposed with (``dale``, DDPM). Where a sampler has
several grids of noise levels (``GRIDS``), the one with the least distance to training images, mean over the seeds, is
taken for each number of calls, for both models alike.

Every training and every sampling is written to ``benchmarks/results/diffusion_<data>.json`` when it ends, and is
skipped from then on. Weights are kept in ``runs/benchmarks/diffusion``. Pictures go to ``docs/methods/img``.
"""

import argparse
import dataclasses
import json
import logging
import math
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from _runner import RESULTS, write_result
from diffusers import UNet2DModel
from torch import Tensor
from torch.nn import functional

from lightning_opt.cli.recipes import recipe_path
from lightning_opt.data import Digits, FashionMNIST
from lightning_opt.diffusion import DiffusionModule, GaussianDiffusion, GBMDiffusion, load_diffusion, sampling_scheduler
from lightning_opt.metrics import frechet_distance, score_samples
from lightning_opt.schedules import LinearDecayLR

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "methods" / "img"
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
MODELS: dict[str, type[DiffusionModule]] = {"multiplicative": GBMDiffusion, "Gaussian": GaussianDiffusion}
Sampler = tuple[str, str | None, dict[str, Any], tuple[int, ...]]  # label, scheduler, its arguments, steps
SAMPLERS: dict[str, list[Sampler]] = {
    "multiplicative": [
        ("DEIS", "GBMDEISScheduler", {}, (5, 10, 20, 50)),
        ("DEIS, rho AB", "GBMDEISScheduler", {"algorithm_type": "rho_ab", "solver_order": 3}, (5, 10, 20)),
        ("exp_euler", None, {"sampler": "exp_euler"}, (10, 20, 50, 100, 200, 1000)),
        ("multistep", None, {"sampler": "multistep"}, (5, 10, 20, 50, 200)),
        ("ancestral", None, {"sampler": "dale"}, (50, 200, 1000)),
    ],
    "Gaussian": [
        ("DDIM", "DDIMScheduler", {}, (5, 10, 20, 50)),
        ("DEIS", "DEISMultistepScheduler", {}, (5, 10, 20, 50)),
        ("multistep", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, (5, 10, 20, 50, 200)),
        ("ancestral", None, {}, (50, 100, 200, 1000)),
    ],
}
FEWER: dict[str, list[Sampler]] = {  # where a call of the network takes seconds, and one model
    "multiplicative": [
        ("DEIS", "GBMDEISScheduler", {}, (5, 10, 20)),
        ("exp_euler", None, {"sampler": "exp_euler"}, (50, 200)),
        ("multistep", None, {"sampler": "multistep"}, (5, 10, 20)),
        ("ancestral", None, {"sampler": "dale"}, (1000,)),
    ],
}
THEIRS = {"times": {}, "Karras": {"use_karras_sigmas": True}, "exponential": {"use_exponential_sigmas": True}}
GRIDS: dict[tuple[str, str], dict[str, dict[str, Any]]] = {  # tried for few calls; training images choose among them
    ("multiplicative", "multistep"): {f"rho^(1/{order})": {"spacing_order": float(order)} for order in (2, 3, 5)},
    ("multiplicative", "DEIS"): {f"rho^(1/{order})": {"spacing_order": float(order)} for order in (3, 5, 7)},
    ("Gaussian", "multistep"): THEIRS,
    ("Gaussian", "DEIS"): THEIRS,
}
OWN: dict[str, dict[str, Any]] = {"": {}}  # the sampler's own grid
GAP = 1  # pixels between images
KEY = ("model", "seed", "sampler", "steps", "grid")
STYLES = {
    "ancestral": "-",
    "exp_euler": "-.",
    "DDIM": "-.",
    "DEIS": "--",
    "DEIS, rho AB": ":",
    "multistep": (0, (5, 1)),
}
COLORS = {"multiplicative": "C3", "Gaussian": "C0"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained on a data set."""

    recipe: str
    data: type[Any]
    held_out: int
    seeds: tuple[int, ...] = SEEDS
    rates: tuple[float, ...] = RATES
    samplers: dict[str, list[Sampler]] = dataclasses.field(default_factory=lambda: SAMPLERS)


SETTINGS = {
    "digits": Setting("digits/gbm_diffusion", Digits, 360),
    "fashion_mnist": Setting(
        "fashion_mnist/gbm_diffusion_small", FashionMNIST, 500, seeds=(0,), rates=(2e-3,), samplers=FEWER
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=SETTINGS)
    parser.add_argument("--plot", action="store_true", help="train and sample nothing")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in ("lightning.pytorch", "diffusers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    study = Study(options.data, SETTINGS[options.data])
    if not options.plot:
        study.run()
    study.show()
    study.draw()


class Study:
    """All runs of one data set, and what has been found so far."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.name, self.setting = name, setting
        self.recipe = yaml.safe_load(recipe_path(setting.recipe).read_text())
        path = RESULTS / f"diffusion_{name}.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        same = old.get("recipe") == self._record()
        self.trainings: list[dict[str, Any]] = old["trainings"] if same else []
        self.samplings: list[dict[str, Any]] = old["samplings"] if same else []
        self.weights = ROOT / "runs" / "benchmarks" / "diffusion" / name
        arguments = dict(self.recipe["data"].get("init_args", {}))
        self.data = setting.data(**arguments)
        self.data.prepare_data()
        self.data.setup()
        generator = torch.Generator().manual_seed(0)
        test = _images(self.data.test_set)
        self.held_out = test[torch.randperm(len(test), generator=generator)[: setting.held_out]]
        self.real = _images(self.data.train_set)
        self.shown = self.real[torch.randperm(len(self.real), generator=generator)[: setting.held_out]]

    def run(self) -> None:
        for model in self.setting.samplers:
            for rate in self.setting.rates:
                self.train(model, rate, self.setting.seeds[0])
            for seed in self.setting.seeds:
                self.train(model, self.rate(model), seed)
                self.sample_all(model, seed)

    def rate(self, model: str) -> float:
        """The rate with the least validation loss on the first seed."""
        rows = [r for r in self.trainings if r["model"] == model and r["seed"] == self.setting.seeds[0]]
        return min(rows, key=lambda r: r["val_loss"])["lr"]

    def train(self, model: str, rate: float, seed: int) -> None:
        if any((r["model"], r["lr"], r["seed"]) == (model, rate, seed) for r in self.trainings):
            return
        pl.seed_everything(seed, verbose=False)
        arguments = self.recipe["data"].get("init_args", {})
        module = self._module(model, seed)
        steps = self.recipe["trainer"]["max_steps"]
        optimizer = torch.optim.Adam(module.parameters(), rate)
        schedule = {"scheduler": LinearDecayLR(optimizer, total_steps=steps), "interval": "step"}
        module.configure_optimizers = lambda: ([optimizer], [schedule])
        trainer = pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=10**9,  # once, below
        )
        begin = time.perf_counter()
        trainer.fit(module, self.setting.data(**arguments))
        seconds = time.perf_counter() - begin
        loss = float(trainer.validate(module, self.setting.data(**arguments), verbose=False)[0]["val/loss"])
        row = {"model": model, "lr": rate, "seed": seed, "steps": steps, "val_loss": loss, "seconds": round(seconds, 1)}
        self._path(model, rate, seed).parent.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(self._path(model, rate, seed), weights_only=True)
        self.trainings.append(row)
        self.write()
        print(row, flush=True)

    def sample_all(self, model: str, seed: int) -> None:
        module: DiffusionModule | None = None
        for label, scheduler, options, counts in self.setting.samplers[model]:
            for steps in counts:
                for grid, changes in self.grids(model, label).items():
                    key = (model, seed, label, steps, grid)
                    if any(tuple(r[name] for name in KEY) == key for r in self.samplings):
                        continue
                    module = self.load(model, seed) if module is None else module
                    count = len(self.held_out)
                    images, seconds = draw_images(module, count, scheduler, {**options, **changes}, steps, seed)
                    scores = score_samples(images, self.held_out, self.real)
                    numbers = {name: round(value, 5) for name, value in scores.as_dict().items()}
                    numbers["frechet_train"] = round(frechet_distance(images, self.shown), 5)
                    row = dict(zip(KEY, key, strict=True))
                    missing = scores.missing_classes
                    self.samplings.append({**row, "seconds": round(seconds, 2), "missing": missing, **numbers})
                    self.write()
                    print(f"{' '.join(map(str, key))}: {numbers['frechet']:.2f} in {seconds:.1f} s", flush=True)

    def load(self, model: str, seed: int) -> DiffusionModule:
        """A trained model, from its checkpoint."""
        return load_diffusion(self._path(model, self.rate(model), seed))

    def write(self) -> None:
        payload = {
            "recipe": self._record(),
            "summary": self.summary(),
            "trainings": self.trainings,
            "samplings": self.samplings,
        }
        write_result(f"diffusion_{self.name}", payload)

    def summary(self) -> dict[str, Any]:
        """Mean and standard error of the Frechet distance over seeds for each model, sampler and number of steps."""
        rows: dict[str, Any] = {}
        for model, samplers in self.setting.samplers.items():
            for label, _, _, counts in samplers:
                for steps in counts:
                    found = {grid: self._rows(model, label, steps, grid) for grid in self.grids(model, label)}
                    if all(found.values()):
                        grid = min(found, key=lambda g: sum(row.get("frechet_train", 0.0) for row in found[g]))
                        measures = ("frechet", "kernel", "precision", "recall", "frechet_real", "frechet_noise")
                        rows[f"{model}, {label}, {steps}"] = {
                            "grid": grid,
                            **{measure: _mean_and_error([row[measure] for row in found[grid]]) for measure in measures},
                        }
        return rows

    def grids(self, model: str, label: str) -> dict[str, dict[str, Any]]:
        """The noise levels that are tried; where a call takes seconds, the sampler's own alone."""
        return GRIDS.get((model, label), OWN) if self.setting.samplers is SAMPLERS else OWN

    def _rows(self, model: str, label: str, steps: int, grid: str) -> list[dict[str, Any]]:
        """One a seed, or none if some are missing."""
        keys = [(model, seed, label, steps, grid) for seed in self.setting.seeds]
        found = {tuple(row[name] for name in KEY): row for row in self.samplings}
        return [found[key] for key in keys] if all(key in found for key in keys) else []

    def show(self) -> None:
        for name, row in self.summary().items():
            words = "  ".join(f"{m} {v['mean']:.4g} ± {v['error']:.2g}" for m, v in row.items() if m != "grid")
            print(f"{name:<34}{row['grid']:<13}{words}")

    def draw(self) -> None:
        """Distance against network calls; samples of ten calls, and how they come about."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        self._draw_distances(plt)
        self._draw_samples(plt)

    def _draw_distances(self, plt: Any) -> None:
        summary = self.summary()
        figure, axes = plt.subplots(figsize=(9, 4.2))
        for model, samplers in self.setting.samplers.items():
            for label, _, _, counts in samplers:
                rows = [
                    (s, summary[f"{model}, {label}, {s}"]["frechet"])
                    for s in counts
                    if f"{model}, {label}, {s}" in summary
                ]
                if rows:
                    axes.errorbar(
                        [s for s, _ in rows],
                        [r["mean"] for _, r in rows],
                        [r["error"] for _, r in rows],
                        color=COLORS[model],
                        ls=STYLES[label],
                        marker="o",
                        ms=4,
                        capsize=2,
                        label=f"{model}, {label}",
                    )
        if summary:
            first = next(iter(summary.values()))
            axes.axhline(first["frechet_real"]["mean"], color="0.5", lw=1, label="real images")
        axes.set(xscale="log", yscale="log", xlabel="network calls", ylabel="Frechet distance to held-out images")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8, handlelength=4, loc="center left", bbox_to_anchor=(1.01, 0.5))
        figure.tight_layout()
        figure.savefig(PICTURES / f"gbm-diffusion-{self.name}.png", dpi=110)
        plt.close(figure)

    def _draw_samples(self, plt: Any) -> None:
        """Left: states of the loop as images, each scaled to its range. Right: 64 samples."""
        module = self.load("multiplicative", self.setting.seeds[0])
        assert isinstance(module, GBMDiffusion)
        assert module.image_shape is not None
        scheduler = sampling_scheduler(module.scheduler, arguments={"sampler": "multistep"})
        generator = torch.Generator().manual_seed(0)
        scheduler.set_timesteps(10)
        state = scheduler.sample_prior((64, *module.image_shape), generator=generator)
        rows = []
        with torch.no_grad():
            for number, time_ in enumerate(scheduler.timesteps):
                if number >= 3:
                    rows.append(state[:8, 0])
                output = module.denoiser(scheduler.scale_model_input(state, time_), time_.expand(64)).sample
                state = scheduler.step(output, time_, state, generator).prev_sample
        rows.append(state[:8, 0])
        levels = [*scheduler.sigmas.tolist()[3:10], 0.0]
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5.2))
        tall = torch.stack(
            [(row - row.amin((1, 2), True)) / (row.amax((1, 2), True) - row.amin((1, 2), True)) for row in rows]
        )
        left.imshow(_tiles(tall.transpose(0, 1)), cmap="gray")
        size = module.image_shape[-1] + GAP
        left.set_xticks([size * (i + 0.5) for i in range(len(levels))], [f"{level:.2g}" for level in levels])
        left.set(yticks=[], xlabel="noise level of log x", title="from log-normal noise to images")
        right.imshow(_tiles(scheduler.to_images(state)[:, 0].unflatten(0, (8, 8))), cmap="gray", vmin=0, vmax=1)
        right.set(xticks=[], yticks=[], title="samples of 10 network calls")
        figure.tight_layout()
        figure.savefig(PICTURES / f"gbm-diffusion-{self.name}-samples.png", dpi=100, bbox_inches="tight")
        plt.close(figure)

    def _module(self, model: str, seed: int) -> DiffusionModule:
        denoiser = UNet2DModel(**self.recipe["model"]["init_args"]["denoiser"]["init_args"])
        return MODELS[model](denoiser, seed=seed)

    def _path(self, model: str, rate: float, seed: int) -> Path:
        return self.weights / f"{model}_{rate:g}_{seed}.ckpt"

    def _record(self) -> dict[str, Any]:
        """What a training depends on."""
        wanted = {key: self.recipe[key] for key in ("model", "data")}
        return json.loads(json.dumps({**wanted, "max_steps": self.recipe["trainer"]["max_steps"]}))


def draw_images(
    module: DiffusionModule, count: int, scheduler: str | None, options: dict[str, Any], steps: int, seed: int
) -> tuple[Tensor, float]:
    """Images and the seconds they took."""
    begin = time.perf_counter()
    images = module.sample(
        count,
        scheduler=scheduler,
        scheduler_args=options,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
    )
    return images, time.perf_counter() - begin


def _tiles(images: Tensor) -> Tensor:
    """One picture of rows and columns of images, ``[rows, columns, H, W]``."""
    images = functional.pad(images, (0, GAP, 0, GAP), value=1.0)
    rows, columns, height, width = images.shape
    return images.transpose(1, 2).reshape(rows * height, columns * width)


def _images(dataset: Any) -> Tensor:
    return dataset.__getitems__(range(len(dataset)))[0]


def _mean_and_error(values: list[float]) -> dict[str, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "error": error}


if __name__ == "__main__":
    main()
