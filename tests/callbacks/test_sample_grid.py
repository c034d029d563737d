"""SampleGrid on a diffusion model; the contract's checks, on a module that draws too, run from the settings."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, RichProgressBar, TQDMProgressBar
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image

from lightning_opt.callbacks import ResumeState, SampleGrid
from lightning_opt.callbacks._image_loggers import log_picture
from lightning_opt.callbacks._report_render import render_svg
from lightning_opt.diffusion import image_grid
from lightning_opt.metrics import frechet_distance
from lightning_opt.testing._callback_checks.state import Saver
from lightning_opt.testing._callback_checks.subject import require_equal
from tests.diffusion.small_models import IMAGES, Rows, Told, Trained, TrainedGaussian, fit, small_unet

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
]
settings = {"SampleGrid": [{"num": 3}, {"num": 2, "every_n_epochs": 2, "columns": 1, "seed": 5}]}


def pictures(folder: Path) -> dict[str, torch.Tensor]:
    """By name the samples of a run."""
    return {path.name: torch.from_numpy(np.array(Image.open(path))) for path in sorted(folder.rglob("samples/*.png"))}


def test_a_picture_every_few_epochs_and_at_the_end(tmp_path):
    grid = SampleGrid(num=6, every_n_epochs=2, num_inference_steps=3, columns=3)
    module = Trained(small_unet())
    fit(module, tmp_path, grid, max_epochs=3)
    assert list(pictures(tmp_path)) == ["step=12.png", "step=18.png"]
    generator = torch.Generator().manual_seed(0)
    expected = image_grid(module.sample(6, num_inference_steps=3, generator=generator), columns=3)
    assert torch.equal(grid.state_dict()["picture"], expected)
    (panel,) = grid.report_panels()
    assert panel.title == "Samples after 18 steps"
    svg, drawn = render_svg(panel)
    assert drawn is panel  # no error
    assert "<image" in svg
    assert pictures(tmp_path)["step=18.png"].shape == (19 * 25, 28 * 25, 3)  # 480 / 19 is about 25


def test_noise_is_the_same_in_every_epoch(tmp_path):
    class Still(Trained):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    fit(Still(small_unet()), tmp_path, SampleGrid(num=4, num_inference_steps=2), max_epochs=2)
    first, second = pictures(tmp_path).values()
    assert torch.equal(first, second)


@pytest.mark.parametrize("model", [Trained, TrainedGaussian])
def test_training_is_bit_for_bit_the_same(tmp_path, model):
    """On the real model: dropout, accumulation, averaged weights, bfloat16, and the resume in the middle."""

    def run(folder, *callbacks, **options):
        module = model(small_unet(num_class_embeds=4, dropout=0.2), num_classes=3)
        saver = Saver(folder)
        averaging = EMAWeightAveraging(decay=0.9)
        trainer = fit(
            module, folder, *callbacks, averaging, ResumeState(), saver, max_epochs=2, accumulate_grad_batches=2,
            precision="bf16-mixed", **options,
        )  # fmt: skip
        grid = next((c.state_dict() for c in callbacks), None)
        return trainer.logger.rows, module.state_dict(), trainer.optimizers[0].state_dict(), grid, saver

    torch.manual_seed(1)
    without = run(tmp_path / "without")
    torch.manual_seed(1)
    watching = {"num": 3, "num_inference_steps": 2, "guidance_scale": 2.0, "frechet_num": 40}
    watched = run(tmp_path / "with", SampleGrid(**watching))
    distances = {key: watched[0].pop(key) for key in list(watched[0]) if key[0] == "sample/frechet"}
    assert [step for _, step in distances] == [2, 5]  # two batches a step
    for name, a, b in zip(("rows", "weights", "optimizer"), watched, without, strict=False):
        require_equal(a, b, name)
    torch.manual_seed(7)
    path, _ = watched[-1].files[8]
    resumed = run(tmp_path / "resumed", SampleGrid(**watching), ckpt_path=path)
    assert resumed[0]["sample/frechet", 5] == distances["sample/frechet", 5]
    require_equal(resumed[1], watched[1], "weights of the resumed run")
    require_equal(resumed[3], watched[3], "picture of the resumed run")


@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_draw(tmp_path, first):
    """Wherever the callback stands; the trained weights are back afterwards."""
    drawn, trained = [], []

    class Watches(Trained):
        def sample(self, num, **options):
            drawn.append(self.denoiser.conv_in.weight.detach().clone())
            return super().sample(num, **options)

        def on_train_epoch_end(self):
            trained.append(self.denoiser.conv_in.weight.detach().clone())

    averaging, grid = EMAWeightAveraging(decay=0.5), SampleGrid(num=2, num_inference_steps=1)
    module = Watches(small_unet())
    fit(module, tmp_path, *((grid, averaging) if first else (averaging, grid)))
    assert torch.equal(drawn[0], module.denoiser.conv_in.weight)  # the average, which training ends with
    assert not torch.equal(drawn[0], trained[0])


def test_the_distance_to_validation_images_is_logged(tmp_path):
    module = Trained(small_unet(num_class_embeds=4), num_classes=3)
    grid = SampleGrid(num=3, every_n_epochs=2, num_inference_steps=2, class_labels=[1, 1, 1], frechet_num=40, seed=3)
    trainer = fit(module, tmp_path, grid, max_epochs=2)
    assert [step for name, step in trainer.logger.rows if name == "sample/frechet"] == [11]
    samples = module.sample(40, num_inference_steps=2, generator=torch.Generator().manual_seed(4))
    chosen = torch.randperm(48, generator=torch.Generator().manual_seed(3))[:40]
    expected = frechet_distance(samples, IMAGES[chosen], features="digits8")
    # the logger has it in float32
    assert trainer.logger.rows["sample/frechet", 11] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("count", "options", "complaint"),
    [
        (60, {}, "60 images are to be compared with as many of validation, which has 48"),
        (40, {"limit_val_batches": 0}, "there are no validation data with a length to compare with"),
    ],
)
def test_a_distance_that_cannot_be_measured_is_left_out(tmp_path, count, options, complaint):
    with pytest.warns(UserWarning, match=f"SampleGrid measured nothing at step 6: {complaint}"):
        trainer = fit(
            Trained(small_unet()), tmp_path, SampleGrid(num=1, num_inference_steps=1, frechet_num=count), **options
        )
    assert not any(name == "sample/frechet" for name, _ in trainer.logger.rows)


def test_every_logger_gets_the_picture_in_its_own_way():
    picture = torch.zeros(5, 7, 3, dtype=torch.uint8)
    calls = []

    def note(*args, **kwargs):
        calls.append((args, kwargs))

    loggers = [
        SimpleNamespace(log_image=note, experiment=None),
        SimpleNamespace(experiment=SimpleNamespace(add_image=note)),
        SimpleNamespace(experiment=SimpleNamespace(log_image=note), run_id="run"),
        SimpleNamespace(experiment=SimpleNamespace(log_image=note)),
    ]
    assert all(log_picture(logger, "samples", picture, 3) for logger in loggers)
    (_, wandb), (tensorboard, options), (mlflow, metric), (comet, named) = calls
    assert (wandb["key"], wandb["images"][0].shape, wandb["step"]) == ("samples", (5, 7, 3), 3)
    assert (tensorboard[0], tensorboard[1].shape, tensorboard[2], options) == (
        "samples", (5, 7, 3), 3, {"dataformats": "HWC"},
    )  # fmt: skip
    assert (mlflow[0], mlflow[1].shape, metric) == ("run", (5, 7, 3), {"key": "samples", "step": 3})
    assert (comet[0].shape, named) == ((5, 7, 3), {"name": "samples", "step": 3})
    assert not log_picture(Rows(), "samples", picture, 3)


def test_loggers_are_given_every_picture_and_may_fail(tmp_path):
    class Pictures(Rows):
        def __init__(self, error=None):
            super().__init__()
            self.steps, self.error = [], error

        def log_image(self, key, images, step):
            self.steps.append(step)
            if self.error:
                raise self.error

    taking, failing = Pictures(), Pictures(OSError("no network"))
    with pytest.warns(UserWarning, match="could not show the samples: OSError: no network") as caught:
        fit(
            Trained(small_unet()), tmp_path, SampleGrid(num=2, num_inference_steps=1), max_epochs=2,
            logger=[taking, failing],
        )  # fmt: skip
    assert taking.steps == failing.steps == [6, 12]
    assert sum("could not show" in str(warning.message) for warning in caught) == 1


def test_a_network_that_goes_wrong_costs_the_picture_alone(tmp_path):
    module = Trained(Told(lambda state, times: state if module.training else state / 0))
    with pytest.warns(UserWarning, match="SampleGrid drew nothing at step 6: step 1 of 2: Told returned .* not finite"):
        fit(
            module, tmp_path, SampleGrid(num=2, num_inference_steps=2), max_epochs=2, limit_val_batches=0,
        )  # fmt: skip
    assert not pictures(tmp_path)
    assert module.training


def test_fast_dev_run_draws_and_writes_nothing(tmp_path):
    asked = []

    class Watches(Trained):
        def sample(self, num, **options):
            asked.append(num)
            return super().sample(num, **options)

    grid = SampleGrid(num=9, num_inference_steps=2, class_labels=[0, 1, 2] * 3)
    fit(Watches(small_unet(num_class_embeds=4), num_classes=3), tmp_path, grid, fast_dev_run=True)
    assert asked == [4]
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"num_inference_steps": 3, "scheduler": "GBMShceduler"}, "SampleGrid: there is no scheduler named"),
        (
            {"scheduler": "GBMDEISScheduler", "num_inference_steps": 3},
            "SampleGrid: a multistep .* at least 4 steps, got 3",
        ),
        ({"scheduler": "DDIMScheduler"}, "SampleGrid: DDIMScheduler samples from added noise"),
        ({"scheduler_args": {"sampler": "odd"}}, "SampleGrid: sampler must be one of"),
        ({"guidance_scale": 2.0}, "SampleGrid: guidance_scale=2.0 needs a model that was trained with classes"),
        ({"class_labels": [1] * 64}, "SampleGrid: class_labels were given, but the model was trained without"),
    ],
)
def test_what_the_module_cannot_draw_is_refused_before_the_first_step(tmp_path, arguments, complaint):
    module = Trained(small_unet())
    with pytest.raises(MisconfigurationException, match=complaint):
        fit(module, tmp_path, SampleGrid(**arguments))
    assert module.image_shape is None


def test_a_module_that_does_not_draw_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"method sample\(num, generator=...\), which BoringModel does"):
        fit(BoringModel(), tmp_path, SampleGrid())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"num": 0}, "num must be >= 1"),
        ({"every_n_epochs": 0}, "every_n_epochs must be >= 1"),
        ({"num_inference_steps": 0}, "num_inference_steps must be >= 1"),
        ({"guidance_scale": -1.0}, "guidance_scale must be >= 0"),
        ({"columns": 0}, "columns must be >= 1"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"frechet_num": 0}, "frechet_num must be >= 1"),
        ({"features": "grey"}, "features must be one of"),
        ({"num": 2, "class_labels": [1]}, "class_labels must have num=2 entries, got 1"),
    ],
)
def test_wrong_values(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        SampleGrid(**arguments)


@pytest.mark.parametrize("bar", [TQDMProgressBar(), RichProgressBar(), None])
def test_the_bar_is_one_of_the_kind_that_the_trainer_has(tmp_path, capsys, bar):
    shown = []

    class Watches(Trained):
        def sample(self, num, *, progress, **options):
            if isinstance(bar, RichProgressBar):
                add = bar.progress.add_task
                bar.progress.add_task = lambda *args, **kwargs: (shown.append((args, kwargs)), add(*args, **kwargs))[1]
            return super().sample(num, progress=progress, **options)

    fit(
        Watches(small_unet()), tmp_path, SampleGrid(num=2, num_inference_steps=2), *([bar] if bar else []),
        enable_progress_bar=bar is not None, limit_val_batches=0,
    )  # fmt: skip
    assert ("samples" in capsys.readouterr().err) == isinstance(bar, TQDMProgressBar)
    assert shown == ([(("samples",), {"total": 2})] if isinstance(bar, RichProgressBar) else [])
    assert list(pictures(tmp_path)) == ["step=6.png"]
