"""Every recipe: its header is complete and true, its config parses, its classes train one batch."""

import hashlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_opt import registry
from lightning_opt.cli import LightningOptCLI
from lightning_opt.cli.errors import import_class
from lightning_opt.cli.recipes import FOLDER, HEADER_KEYS, recipe_header, recipe_names
from lightning_opt.data import IdxImages, write_idx
from lightning_opt.schedules.refined import save_schedule

registry.load_all()
RESULTS = Path(__file__).parents[1] / "benchmarks/results/recipes"
UNMEASURED = "not yet measured"
every_recipe = pytest.mark.parametrize("name", recipe_names())


def test_there_is_a_recipe_for_every_optimizer() -> None:
    used = {yaml.safe_load((FOLDER / f"{n}.yaml").read_text())["optimizer"]["class_path"] for n in recipe_names()}
    for name in ("AdaBelief", "DiffGrad", "Lion", "ExponentiatedSGD"):
        assert f"lightning_opt.optim.{name}" in used


@every_recipe
def test_the_header_is_complete(name: str) -> None:
    header = recipe_header(FOLDER / f"{name}.yaml")
    assert tuple(header) == HEADER_KEYS
    assert all(header.values())
    *before, fit = header["command"].split(" && ")
    assert fit == f"lightning-opt fit --config {name}" or (name == "digits/quickstart" and fit == "lightning-opt fit")
    assert all(command.startswith("lightning-opt ") for command in before)
    assert header["method"] in {entry.name for entry in registry.entries()}


JUDGES = [
    ("accuracy", 100, 1, "%"),
    ("frechet", 1, 2, "Frechet distance"),
    ("bits_per_character", 1, 3, "bits"),
    ("mse", 1, 4, "mean squared error"),
    ("moment_error", 1, 3, "RMS error"),
]


@every_recipe
def test_the_measured_numbers_are_those_on_file(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    header = recipe_header(path)
    if header["result"] == UNMEASURED:
        assert header["minutes"] == UNMEASURED
        assert not (RESULTS / f"{name}.json").exists(), "measured: write it with python benchmarks/recipes.py --write"
        return
    measured = json.loads((RESULTS / f"{name}.json").read_text())
    content = re.sub(r"\A(#.*\n)+", "", path.read_text())
    assert measured["recipe_sha256"] == hashlib.sha256(content.encode()).hexdigest(), "measured before it was changed"
    judge, factor, digits, unit = next(row for row in JUDGES if f"{row[0]}_mean" in measured)
    mean, std = (f"{factor * measured[f'{judge}_{part}']:.{digits}f}" for part in ("mean", "std"))
    value = f"{mean} ± {std} {unit}" if len(measured["runs"]) > 1 else f"{mean} {unit}"  # one run has no spread
    assert header["result"].startswith(value)
    if "nfe_mean" in measured:
        assert f" in {measured['nfe_mean']:.0f} evaluations" in header["result"]
    assert header["minutes"] == f"{measured['seconds_mean'] / 60:.1f}"


@every_recipe
def test_classes_go_by_their_public_path_and_the_module_takes_no_rate(name: str) -> None:
    config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert "lr" not in config["model"].get("init_args", {})
    assert "lr" in config["optimizer"]["init_args"]
    for class_path in _class_paths(config):
        import_class(class_path)
        assert "._" not in class_path
        if class_path.startswith("lightning_opt."):
            assert class_path.count(".") == 2  # from the package, not from the module behind it


@every_recipe
@pytest.mark.filterwarnings("ignore:.*is more than the .* samples of an epoch")  # 40 images
@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
def test_one_batch_trains_and_tests(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-opt"])
    config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    words = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    schedule = config.get("lr_scheduler", {}).get("init_args", {}).get("schedule")
    if schedule:  # what the command before the fit makes of an earlier run
        (tmp_path / schedule).parent.mkdir(parents=True)
        save_schedule(tmp_path / schedule, torch.linspace(1, 0, 20))
    data = import_class(config["data"]["class_path"])
    if issubclass(data, IdxImages):
        _write_images(data, tmp_path / "data")
        words += [f"--data.root={tmp_path}/data", "--data.verify=false", "--data.train_size=40", "--data.val_size=20"]
    cli = LightningOptCLI(["fit", f"--config={name}", *words])
    assert cli.trainer.global_step == 1
    assert type(cli.trainer.optimizers[0]) is import_class(config["optimizer"]["class_path"])
    result = cli.test_results[0]
    judged = next(result[name] for name in ("test/accuracy", "test/bits_per_character", "test/loss") if name in result)
    assert 0 <= judged <= 1 if "test/accuracy" in result else judged > 0
    assert all(torch.isfinite(parameter).all() for parameter in cli.model.parameters())


def _write_images(data: type[IdxImages], folder: Path) -> None:
    """60 images for training and 20 for testing, in the format and the names of the dataset."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    for split, count in (("train", 60), ("test", 20)):
        images, labels = data.files[split]
        pixels = torch.randint(256, (count, *data.shape[1:]), generator=generator).to(torch.uint8)
        write_idx(folder / images.name, pixels)
        write_idx(folder / labels.name, (torch.arange(count) % len(data.classes)).to(torch.uint8))


def _class_paths(node: object) -> list[str]:
    if isinstance(node, list):
        return [path for item in node for path in _class_paths(item)]
    if isinstance(node, dict):
        own = [node["class_path"]] if "class_path" in node else []
        return own + [path for value in node.values() for path in _class_paths(value)]
    return []
