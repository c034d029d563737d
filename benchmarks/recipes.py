"""Run recipes over seeds and write down what they give on the test set, training time and steps.

    python benchmarks/recipes.py                                  all recipes, seeds 0 1 2
    python benchmarks/recipes.py digits/quickstart --seeds 0 1    one of them
    python benchmarks/recipes.py --write                          put the numbers into the recipes' headers

A seed sets the initial weights and the order of the data. Every run is the command of the recipe's header, in this
process. Finished seeds are kept in ``benchmarks/results/recipes/<name>.json`` and skipped, until the recipe changes.
"""

import argparse
import contextlib
import hashlib
import json
import re
import shlex
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from _runner import RESULTS, write_result

from lightning_opt.callbacks import SampleGrid
from lightning_opt.cli import LightningOptCLI
from lightning_opt.cli import main as main_command
from lightning_opt.cli.recipes import recipe_header, recipe_names, recipe_path, recipe_runs
from lightning_opt.metrics import frechet_distance

MEASURES = {  # what a recipe is judged by: its words, its factor, its digits
    "accuracy": ("% test accuracy", 100, 1),
    "bits_per_character": ("bits per character of the test text", 1, 3),
    "mse": ("mean squared error of test values", 1, 4),
    "moment_error": ("RMS error of means and deviations", 1, 3),
    "frechet": ("Frechet distance of samples to test images", 1, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--write", action="store_true", help="write result and minutes into the recipes' headers")
    options = parser.parse_args()
    names = options.names or recipe_names()
    results = {name: measure(name, options.seeds) for name in names}
    print(f"\n{'recipe':<32}{'on the test set':>42}{'seconds':>10}{'steps':>8}{'seeds':>7}")
    for name, result in results.items():
        cost = f"{result['seconds_mean']:>10.1f}{result['steps']:>8}{len(result['runs']):>7}"
        print(f"{name:<32}{in_words(result):>42}{cost}")
        if options.write:
            write_header(recipe_path(name), result)


def measure(name: str, seeds: list[int]) -> dict[str, Any]:
    """The result of a recipe over seeds; runs what is not on file."""
    file = RESULTS / "recipes" / f"{name}.json"
    digest = hashlib.sha256(_without_header(recipe_path(name).read_text()).encode()).hexdigest()
    old = json.loads(file.read_text()) if file.exists() else {}
    runs = old["runs"] if old.get("recipe_sha256") == digest else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        if str(seed) not in runs:
            runs[str(seed)] = run(name, seed)
            write_result(f"recipes/{name}", {"recipe": name, "recipe_sha256": digest, **summary(runs)})
    return summary({str(seed): runs[str(seed)] for seed in seeds})


def run(name: str, seed: int) -> dict[str, float]:
    """One fit and its test, behind the runs that a recipe of several runs needs before it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        runs = recipe_runs(name.rpartition("/")[0])
        for earlier in runs[: runs.index(name)] if name in runs else []:
            fit(earlier, seed)
        for command in recipe_header(recipe_path(name))["command"].split(" && ")[:-1]:
            if main_command(shlex.split(command)[1:]) != 0:
                raise RuntimeError(command)
        cli = fit(name, seed)
    timer = next(callback for callback in cli.trainer.callbacks if type(callback).__name__ == "Timer")
    results = {**cli.test_results[0], **sample_distance(cli)}
    judge = next(name for name in MEASURES if f"test/{name}" in results)
    return {
        f"test_{judge}": results[f"test/{judge}"],
        "test_loss": results["test/loss"],
        **({"test_nfe": results["test/nfe"]} if "test/nfe" in results else {}),
        "train_seconds": timer.time_elapsed("train"),  # with its validation
        "steps": cli.trainer.global_step,
    }


def sample_distance(cli: LightningOptCLI) -> dict[str, float]:
    """Of a generative model: the distance of as many samples as there are test images, 1,000 at most."""
    grid = next((callback for callback in cli.trainer.callbacks if isinstance(callback, SampleGrid)), None)
    if grid is None:
        return {}
    test = cli.datamodule.test_set
    count = min(1000, len(test))
    generator = torch.Generator().manual_seed(0)
    real, _ = test.__getitems__(torch.randperm(len(test), generator=generator)[:count].tolist())
    samples = cli.model.sample(
        count,
        num_inference_steps=grid.num_inference_steps,
        scheduler=grid.scheduler,
        generator=torch.Generator(cli.model.device).manual_seed(0),
    )
    return {"test/frechet": frechet_distance(samples.cpu(), real)}


def fit(name: str, seed: int) -> LightningOptCLI:
    """The command of one recipe's fit, in the working folder."""
    return LightningOptCLI(
        [
            "fit",
            f"--config={name}",
            f"--seed_everything={seed}",
            f"--data.seed={seed}",
            "--trainer.callbacks+=Timer",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
        ]
    )


def summary(runs: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds (0 for a single one)."""
    judge = next(name for name in MEASURES if f"test_{name}" in next(iter(runs.values())))
    values = [r[f"test_{judge}"] for r in runs.values()]
    evaluations = [r["test_nfe"] for r in runs.values() if "test_nfe" in r]
    return {
        f"{judge}_mean": statistics.mean(values),
        f"{judge}_std": statistics.stdev(values) if len(runs) > 1 else 0.0,
        **({"nfe_mean": statistics.mean(evaluations)} if evaluations else {}),
        "seconds_mean": statistics.mean(r["train_seconds"] for r in runs.values()),
        "steps": next(iter(runs.values()))["steps"],
        "runs": runs,
    }


def write_header(path: Path, result: dict[str, Any]) -> None:
    """Put the measured numbers into the header lines ``result`` and ``minutes``."""
    seeds = len(result["runs"])
    of = f"mean and standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    text = path.read_text()
    line = f"# result: {in_words(result)} ({of})"
    text = re.sub(r"^# result:.*$", line, text, count=1, flags=re.MULTILINE)
    text = re.sub(r"^# minutes:.*$", f"# minutes: {result['seconds_mean'] / 60:.1f}", text, count=1, flags=re.MULTILINE)
    path.write_text(text)


def in_words(result: dict[str, Any]) -> str:
    """For example ``99.3 ± 0.3 % test accuracy``; of a neural ODE also ``in 26 evaluations``."""
    judge, (unit, factor, digits) = next(item for item in MEASURES.items() if f"{item[0]}_mean" in result)
    mean, std = factor * result[f"{judge}_mean"], factor * result[f"{judge}_std"]
    spread = f" ± {std:.{digits}f}" if len(result["runs"]) > 1 else ""
    evaluations = f" in {result['nfe_mean']:.0f} evaluations" if "nfe_mean" in result else ""
    return f"{mean:.{digits}f}{spread} {unit}{evaluations}"


def _without_header(text: str) -> str:
    return re.sub(r"\A(#.*\n)+", "", text)


if __name__ == "__main__":
    main()
