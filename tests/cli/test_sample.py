"""``lightning-opt sample`` and ``export``: from a fit by the command to pictures and a pipeline."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightning_opt.cli import main
from lightning_opt.diffusion import GBMDiffusion, GBMPipeline, load_diffusion
from tests.diffusion.small_models import Told, Trained, fit, loader, small_unet

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
]
FEW = ["--trainer.max_steps=3", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--report=false"]
TINY = {
    "block_out_channels": "[8,8]",
    "norm_num_groups": "4",
}


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A checkpoint of a model of three classes."""
    folder = tmp_path_factory.mktemp("classes")
    trainer = fit(Trained(small_unet(num_class_embeds=4), num_classes=3), folder, max_steps=2, limit_val_batches=0)
    trainer.save_checkpoint(folder / "classes.ckpt")
    return folder / "classes.ckpt"


def size(path):
    with Image.open(path) as picture:
        return picture.size


@pytest.mark.parametrize("model", ["GBMDiffusion", "GaussianDiffusion"])
def test_fit_sample_export_and_load(model, capsys, workdir):
    """One word changes the model of the recipe; the commands that follow are the same."""
    unet = [f"--model.denoiser.init_args.{name}={value}" for name, value in TINY.items()]
    few = ["--trainer.callbacks.init_args.num=4", "--trainer.callbacks.init_args.num_inference_steps=2"]
    words = ["fit", "--config=digits/gbm_diffusion", f"--model={model}", *unet, *few, *FEW]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "test/loss_q3" in out
    run = Path("runs/digits/gbm_diffusion/version_0")
    assert size(run / "samples/step=3.png") == (19 * 25, 19 * 25)
    assert main(["sample", str(run), "--steps=3", "--num=6", "--columns=3", "--out=a/grid.png"]) == 0
    assert capsys.readouterr().out == "samples: a/grid.png\n"
    assert size("a/grid.png") == (28 * 25, 19 * 25)
    checkpoint = next(run.glob("checkpoints/*step=3.ckpt"))
    assert main(["sample", str(checkpoint), "--steps=3", "--num=6", "--seed=4", "--out=images.pt"]) == 0
    images = torch.load("images.pt", weights_only=True)
    expected = load_diffusion(checkpoint).sample(6, num_inference_steps=3, generator=torch.Generator().manual_seed(4))
    assert torch.equal(images, expected)
    assert main(["export", "runs/digits/gbm_diffusion", "--out=pipeline"]) == 0
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("load it:  ")
    scope: dict = {}
    exec(line.replace("; ", "; pipeline = "), scope)
    pipeline = scope["pipeline"]
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(6, torch.Generator().manual_seed(4), num_inference_steps=3, output_type="np").images
    assert np.array_equal(drawn, images.permute(0, 2, 3, 1).numpy())
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["class_path"] == f"lightning_opt.diffusion.{model}"


def test_classes_guidance_and_another_sampler(classes):
    words = ["--steps=2", "--num=4", "--class-label=2", "--guidance=2", "--scheduler=GBMScheduler"]
    assert main(["sample", str(classes), *words, "--scheduler-arg=sampler=ode", "--out=a.pt"]) == 0
    expected = load_diffusion(classes).sample(
        4,
        num_inference_steps=2,
        scheduler="GBMScheduler",
        scheduler_args={"sampler": "ode"},
        class_labels=torch.full((4,), 2),
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(torch.load("a.pt", weights_only=True), expected)
    assert main(["sample", str(classes), "--steps=2", "--num=4", "--batch-size=2", "--out=b.pt"]) == 0
    module, generator = load_diffusion(classes), torch.Generator().manual_seed(0)
    labels = ([0, 1], [2, 0])  # each class in turn, through the batches
    batches = [
        module.sample(2, num_inference_steps=2, class_labels=torch.tensor(x), generator=generator) for x in labels
    ]
    assert torch.equal(torch.load("b.pt", weights_only=True), torch.cat(batches))


def test_ctrl_c_writes_what_is_finished(classes, capsys, monkeypatch):
    calls = []
    sample = GBMDiffusion.sample

    def interrupted(self, num, **options):
        calls.append(num)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return sample(self, num, **options)

    monkeypatch.setattr(GBMDiffusion, "sample", interrupted)
    words = ["sample", str(classes), "--steps=1", "--num=50", "--batch-size=5", "--out=a.pt"]
    assert main(words) == 130
    assert "interrupted; 10 of 50 images are finished" in capsys.readouterr().err
    assert len(torch.load("a.pt", weights_only=True)) == 10
    assert main([*words[:-1], "--out=b.pt"]) == 130
    assert "interrupted before the first batch was finished" in capsys.readouterr().err
    assert not Path("b.pt").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out=a.jpg"], "--out=a.jpg: must end in .png (a picture) or .pt (a tensor of images)"),
        (["--num=0"], "--num must be >= 1, got 0"),
        (["--steps=-1"], "--steps must be >= 1, got -1"),
        (["--scheduler=GBMSheduler"], "there is no scheduler named 'GBMSheduler'. Did you mean GBMScheduler or"),
        (["--scheduler=GBMDEISScheduler", "--steps=3"], "a multistep method of order 4 needs at least 4 steps, got 3"),
        (["--scheduler=DDIMScheduler"], "DDIMScheduler samples from added noise"),
        (["--scheduler-arg=sampler"], "--scheduler-arg sampler: must be NAME=VALUE"),
        (["--scheduler-arg=samplr=ode"], "GBMScheduler has no argument 'samplr'. Did you mean"),
        (["--scheduler-arg=sampler=[a"], "--scheduler-arg sampler=[a: '[a' cannot be read as YAML"),
        (["--seed=10000000000000000000000"], "--seed must be a whole number of 64 bits"),
        (["--class-label=3"], "class_labels must be from 0 to 2, got 3 to 3"),
        (["--guidance=-2"], "guidance_scale must be >= 0 and finite, got -2.0"),
    ],
)
def test_wrong_options(classes, capsys, words, message):
    assert main(["sample", str(classes), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_that_holds_no_diffusion_model_is_refused(run, capsys, classes):
    assert main(["sample", "none.ckpt"]) == 2
    assert "none.ckpt: no such file" in capsys.readouterr().err
    Path("empty").mkdir()
    assert main(["export", "empty", "--out=x"]) == 2
    assert "empty holds no checkpoint, neither in checkpoints nor in version_*" in capsys.readouterr().err
    Path("half.ckpt").write_bytes(classes.read_bytes()[:1000])
    assert main(["sample", "half.ckpt"]) == 2
    assert "half.ckpt: not a complete checkpoint" in capsys.readouterr().err
    assert run("fit", "--test_after_fit=false") == 0
    for command in (["sample", "runs/quick"], ["export", "runs/quick", "--out=x"]):
        assert main(command) == 2
        assert (
            "holds no diffusion model of lightning-opt, but a checkpoint of another module" in capsys.readouterr().err
        )


def test_export_does_not_overwrite(classes, capsys):
    Path("there").mkdir()
    shutil.copy(classes, "there/mine.ckpt")
    assert main(["export", str(classes), "--out=there"]) == 2
    assert "--out=there is not empty; --force writes into it" in capsys.readouterr().err
    assert main(["export", str(classes), "--out=there", "--force"]) == 0
    assert GBMPipeline.from_pretrained("there").config.num_classes == 3
    assert main(["export", str(classes), "--out=there/mine.ckpt"]) == 2
    assert "--out=there/mine.ckpt is a file; give a folder" in capsys.readouterr().err


def test_a_network_that_goes_wrong_and_one_that_cannot_be_built(classes, capsys, tmp_path):
    content = torch.load(classes, weights_only=True)
    content["state_dict"]["denoiser.conv_out.bias"].fill_(torch.nan)
    torch.save(content, "nan.ckpt")
    assert main(["sample", "nan.ckpt", "--steps=2", "--num=2"]) == 1
    assert "step 1 of 2: UNet2DModel returned 128 of 128 numbers that are not finite" in capsys.readouterr().err
    trainer = fit(Trained(Told(lambda state, _: 0 * state)), tmp_path, max_steps=1, limit_val_batches=0)
    trainer.save_checkpoint("told.ckpt")
    assert main(["sample", "told.ckpt"]) == 2
    assert "which is no model of diffusers and cannot be built from the checkpoint" in capsys.readouterr().err


def test_a_picture_of_two_channels_is_refused_before_drawing(capsys, tmp_path, workdir, monkeypatch):
    two = Trained(small_unet(in_channels=2, out_channels=2))
    images = torch.rand(8, 2, 8, 8)
    trainer = fit(two, tmp_path, data=loader(images=images), max_steps=1, limit_val_batches=0)
    trainer.save_checkpoint("two.ckpt")
    assert main(["sample", "two.ckpt", "--steps=1", "--num=2", "--out=two.pt"]) == 0
    assert torch.load("two.pt", weights_only=True).shape == (2, 2, 8, 8)
    monkeypatch.setattr(GBMDiffusion, "sample", None)
    assert main(["sample", "two.ckpt"]) == 2
    assert "a picture has 1 or 3 channels, and the model's images have 2; --out=samples.pt" in capsys.readouterr().err


def test_without_diffusers_the_extra_is_named(classes, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("lightning_opt.diffusion")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["sample", str(classes)]) == 2
    assert "needs diffusers: install lightning-opt[diffusion]" in capsys.readouterr().err
