"""From a checkpoint to a module and to a pipeline of diffusers, and back, with the same images."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_opt.diffusion import (
    GaussianDiffusion,
    GBMDiffusion,
    GBMPipeline,
    load_diffusion,
    sampling_scheduler,
)
from lightning_opt.models import MLP, Classifier
from tests.diffusion.small_models import IMAGES, LABELS, Told, Trained, fit, small_unet

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a model of classes with averaged weights."""
    folder = tmp_path_factory.mktemp("fit")
    module = Trained(small_unet(num_class_embeds=4, sample_size=None), num_classes=3, loss_weight="v")
    trainer = fit(module, folder, EMAWeightAveraging(decay=0.5), max_steps=3, limit_val_batches=0)
    trainer.save_checkpoint(folder / "model.ckpt")
    return folder / "model.ckpt"


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_module_pipeline_and_loaded_pipeline_draw_the_same_images(checkpoint, tmp_path):
    module = load_diffusion(checkpoint)
    assert not module.training
    assert (module.num_classes, module.loss_weight, module.image_shape) == (3, "v", (1, 8, 8))
    assert module.denoiser.config.sample_size is None
    options = {"num_inference_steps": 4, "guidance_scale": 2.0}
    expected = module.sample(6, generator=generator(), **options)
    quiet(module.pipeline()).save_pretrained(tmp_path / "pipeline")
    pipeline = quiet(GBMPipeline.from_pretrained(tmp_path / "pipeline"))
    drawn = pipeline(batch_size=6, generator=generator(), output_type="pt", **options).images
    assert torch.equal(drawn, expected)
    again = pipeline(6, generator(), class_labels=[0, 1, 2] * 2, output_type="np", return_dict=False, **options)[0]
    assert np.array_equal(again, expected.permute(0, 2, 3, 1).numpy())
    pictures = pipeline(2, generator(), num_inference_steps=2, class_labels=1).images
    assert [picture.size for picture in pictures] == [(8, 8)] * 2


def test_drawing_leaves_the_network_in_its_mode(checkpoint):
    """A pipeline made in the middle of training shares the network."""
    module = load_diffusion(checkpoint).train()
    quiet(module.pipeline())(1, generator(), num_inference_steps=1, class_labels=0)
    assert all(part.training for part in module.denoiser.modules())


def test_a_folder_loads_in_a_process_that_has_imported_nothing_else(checkpoint, tmp_path):
    """diffusers imports no module because a folder names it: the pipeline's own must have imported the scheduler's."""
    load_diffusion(checkpoint).pipeline().save_pretrained(tmp_path)
    script = f"from lightning_opt.diffusion import GBMPipeline; GBMPipeline.from_pretrained({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize("scheduler", ["GBMScheduler", "GBMDEISScheduler"])
def test_a_pipeline_keeps_its_scheduler(checkpoint, tmp_path, scheduler):
    pipeline = quiet(load_diffusion(checkpoint).pipeline())
    pipeline.scheduler = sampling_scheduler(pipeline.scheduler, scheduler)
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(GBMPipeline.from_pretrained(tmp_path))
    assert type(loaded.scheduler).__name__ == scheduler
    options = {"num_inference_steps": 5, "output_type": "pt"}
    expected = pipeline(2, generator(), **options).images
    assert torch.equal(loaded(2, generator(), **options).images, expected)
    drawn = load_diffusion(checkpoint).sample(2, scheduler=scheduler, num_inference_steps=5, generator=generator())
    assert torch.equal(drawn, expected)


def test_the_averaged_weights_are_loaded(checkpoint):
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    module = load_diffusion(checkpoint)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_a_pipeline_of_another_version_or_kind_is_refused(checkpoint, tmp_path):
    load_diffusion(checkpoint).pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "format": 2, "saved_by": "9.9"}))
    with pytest.raises(ValueError, match="was saved by lightning-opt 9.9 in format 2; lightning-opt .* reads format 1"):
        GBMPipeline.from_pretrained(tmp_path)
    module = GaussianDiffusion(small_unet())
    module.image_shape = (1, 8, 8)
    module.pipeline().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is of a DDPMPipeline, not of a GBMPipeline"):
        GBMPipeline.from_pretrained(tmp_path / "other")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "other")) is DDPMPipeline


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"output_type": "jpg"}, "output_type must be one of 'pil', 'np', 'pt'"),
        ({"class_labels": 3}, "class_labels must be from 0 to 2, got 3 to 3"),
        ({"guidance_scale": -1.0}, "guidance_scale must be >= 0"),
        ({"num_inference_steps": 0}, "num_inference_steps must be >= 1"),
    ],
)
def test_wrong_arguments_of_the_pipeline(checkpoint, arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_diffusion(checkpoint).pipeline()(**arguments)


def test_checkpoints_of_something_else_are_refused(checkpoint, tmp_path):
    trainer = fit_classifier(tmp_path)
    trainer.save_checkpoint(tmp_path / "classifier.ckpt")
    with pytest.raises(ValueError, match="classifier.ckpt holds no diffusion model of lightning-opt"):
        load_diffusion(tmp_path / "classifier.ckpt")

    def altered(**changes):
        content = torch.load(checkpoint, weights_only=True)
        content["diffusion"].update(changes)
        torch.save(content, tmp_path / "altered.ckpt")
        return tmp_path / "altered.ckpt"

    with pytest.raises(ValueError, match="in format 7 of diffusion checkpoints; lightning-opt .* reads format 1"):
        load_diffusion(altered(format=7))
    with pytest.raises(ValueError, match="needs the class no.such.Class, which cannot be imported"):
        load_diffusion(altered(module="no.such.Class"))
    config = {"args": "touch owned"}
    with pytest.raises(ValueError, match="names subprocess.Popen as its ModelMixin, which it is not"):
        load_diffusion(altered(denoiser={"class_path": "subprocess.Popen", "config": config}))


def fit_classifier(folder):
    class Model(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return fit(Model(MLP(in_features=64, hidden=[4])), folder, max_steps=1, limit_val_batches=0)


def test_a_denoiser_that_is_no_model_of_diffusers_is_loaded_in_python(tmp_path):
    module = Trained(Told(lambda state, _: 0 * state))
    trainer = fit(module, tmp_path, max_steps=1, limit_val_batches=0)
    trainer.save_checkpoint(tmp_path / "told.ckpt")
    with pytest.raises(ValueError, match=r"which is no model of diffusers.*load_from_checkpoint\(path, denoiser=...\)"):
        load_diffusion(tmp_path / "told.ckpt")
    with pytest.raises(ValueError, match="a pipeline holds a model of diffusers, and the denoiser is a Told"):
        module.pipeline()
    again = GBMDiffusion.load_from_checkpoint(tmp_path / "told.ckpt", denoiser=Told(lambda state, _: 0 * state))
    assert torch.equal(
        again.sample(2, num_inference_steps=2, generator=generator()),
        module.sample(2, num_inference_steps=2, generator=generator()),
    )
    assert again.image_shape == tuple(IMAGES.shape[1:])
    assert len(LABELS) == 48
