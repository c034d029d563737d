"""What must not pass silently: networks, labels, batches, configs and checkpoints that do not fit."""

import math

import diffusers
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_opt.diffusion import (
    DEISScheduler,
    GaussianDiffusion,
    GBMDEISScheduler,
    GBMDiffusion,
    GBMPipeline,
    GBMScheduler,
    load_diffusion,
)
from lightning_opt.diffusion.sampling import sample, sampling_scheduler
from tests.diffusion.small_models import Told, Trained, TrainedGaussian, fit, loader, small_unet

MODULES = (GBMDiffusion, GaussianDiffusion)
IMAGES = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """Gives what a function makes of its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, state, time, class_labels=None):
        return self.function(state)


def losses(module):
    return module.losses(IMAGES, None, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cls", MODULES)
@pytest.mark.parametrize("function", [lambda x: x[:, :1], lambda x: x[..., :1], lambda x: x[:1]])
def test_a_network_output_that_would_broadcast_is_refused(cls, function):
    with pytest.raises(ValueError, match=r"Network returned the shape \[.*\] for an input of \[4, 3, 6, 6\]"):
        losses(cls(Network(function)))


@pytest.mark.parametrize("cls", MODULES)
@pytest.mark.parametrize("function", [lambda x: (x,), lambda x: None])
def test_a_network_output_that_is_no_tensor_is_refused(cls, function):
    with pytest.raises(ValueError, match="Network must return a tensor"):
        losses(cls(Network(function)))


@pytest.mark.parametrize("cls", MODULES)
def test_steps_are_a_whole_number(cls):
    module = cls(Network(torch.zeros_like))
    module.image_shape = (1, 4, 4)  # as after a fit
    with pytest.raises(ValueError, match="num_inference_steps must be a whole number"):
        module.sample(1, num_inference_steps=2.5)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("cls", [Trained, TrainedGaussian])
def test_losses_that_are_no_numbers_end_the_run_before_a_checkpoint_is_written(cls, tmp_path):
    network = Told(lambda state, _: state * (math.nan if len(network.calls) == 3 else 1.0))
    saved = ModelCheckpoint(tmp_path, filename="{epoch}")
    with pytest.raises(FloatingPointError, match=rf"{cls.__name__}: a loss of epoch 1 was not finite"):
        fit(cls(network), tmp_path, saved, max_epochs=3, limit_train_batches=2, limit_val_batches=0)
    assert [file.name for file in tmp_path.glob("*.ckpt")] == ["epoch=0.ckpt"]


def test_a_network_without_parameters_samples():
    images = sample(Network(torch.zeros_like), GBMScheduler(), (2, 1, 4, 4), num_inference_steps=2)
    assert images.shape == (2, 1, 4, 4)


@pytest.mark.parametrize("cls", MODULES)
@pytest.mark.parametrize("label", [-1, 3, 7])
def test_a_label_out_of_range_is_not_taken_for_no_class(cls, label):
    module = cls(Network(torch.zeros_like), num_classes=3)
    with pytest.raises(ValueError, match="class_labels must be from 0 to 2"):
        module.training_step((IMAGES, torch.full((4,), label)), 0)


@pytest.mark.parametrize("cls", MODULES)
def test_batches_of_images_alone_and_of_something_else(cls):
    module = cls(Network(lambda x: x))
    assert module._read([IMAGES])[1] is None  # what TensorDataset(images) gives
    with pytest.raises(ValueError, match="must be images, or images and labels, got a dict"):
        module._read({"image": IMAGES})


@pytest.mark.parametrize("cls", [GBMScheduler, GBMDEISScheduler])
@pytest.mark.parametrize("other", ["DDPMScheduler", "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_configs_of_added_noise_are_no_configs_of_multiplicative_noise(cls, other):
    with pytest.raises(
        ValueError, match=f"{cls.__name__} samples from multiplicative noise, and the config is of added"
    ):
        cls.from_config(getattr(diffusers, other)().config)


def test_a_config_of_multiplicative_noise_is_none_of_added_noise():
    with pytest.raises(ValueError, match="multiplicative noise"):
        DEISScheduler.from_config(GBMScheduler(prediction_type="epsilon").config)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "ScoreSdeVeScheduler"])
def test_a_scheduler_without_the_betas_of_the_training_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} has no betas"):
        sampling_scheduler(diffusers.DDPMScheduler(beta_end=0.05), name)


def test_values_that_diffusers_cannot_take_are_named():
    with pytest.raises(ValueError, match="DDIMScheduler cannot be built with {'beta_end': 'a'}"):
        sampling_scheduler(diffusers.DDPMScheduler(), "DDIMScheduler", {"beta_end": "a"})


def checkpoint(cls=GBMDiffusion):
    module, content = cls(small_unet()), {}
    content["state_dict"] = module.state_dict()
    module.on_save_checkpoint(content)
    return content


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut"])
def test_a_file_that_is_no_checkpoint_is_named(content, tmp_path):
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.ckpt is no checkpoint, or is damaged"):
        load_diffusion(tmp_path / "a.ckpt")


def test_a_checkpoint_that_is_cut_short_is_named(tmp_path):
    torch.save(checkpoint(), tmp_path / "a.ckpt")
    whole = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "a.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a.ckpt is no checkpoint, or is damaged"):
        load_diffusion(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c["diffusion"].pop("denoiser"),
        lambda c: c["diffusion"]["scheduler"]["config"].update(newer=1),
        lambda c: c["diffusion"]["arguments"].update(newer=1),
        lambda c: c.pop("state_dict"),
        lambda c: c["state_dict"].popitem(),
    ],
)
def test_a_checkpoint_that_does_not_fit_this_version_is_named(damage, tmp_path):
    content = checkpoint()
    damage(content)
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="does not fit lightning-opt"):
        load_diffusion(tmp_path / "a.ckpt")


def test_a_checkpoint_of_another_kind_is_not_continued():
    with pytest.raises(ValueError, match="holds a GaussianDiffusion, and this is a GBMDiffusion"):
        GBMDiffusion(small_unet()).on_load_checkpoint(checkpoint(GaussianDiffusion))
    with pytest.raises(ValueError, match="holds no diffusion model, and this is a GaussianDiffusion"):
        GaussianDiffusion(small_unet()).on_load_checkpoint({})


def test_a_checkpoint_brings_the_noise_it_was_trained_with():
    """By Lightning's own loading too, whose arguments do not say it; what sampling may choose stays."""
    own = GBMScheduler(rho_max=3.0, prediction_type="epsilon", to_positive="exp", sampler="ode", log_mean=0.3)
    gaussian = diffusers.DDPMScheduler(beta_end=0.05, prediction_type="sample")
    for trained, other, names in (
        (GBMDiffusion(small_unet(), own), GBMDiffusion(small_unet()), ("rho_max", "to_positive", "log_mean")),
        (GaussianDiffusion(small_unet(), gaussian), GaussianDiffusion(small_unet()), ("beta_end",)),
    ):
        checkpoint = {}
        trained.on_save_checkpoint(checkpoint)
        sampler = other.scheduler.config.get("sampler")
        other.on_load_checkpoint(checkpoint)
        for name in (*names, "prediction_type"):
            assert other.scheduler.config[name] == trained.scheduler.config[name]
        assert other.scheduler.config.get("sampler") == sampler


@pytest.mark.parametrize(
    "make",
    [
        lambda: GBMDiffusion(small_unet(), diffusers.DDPMScheduler()),
        lambda: GBMDiffusion(small_unet(), "GBMScheduler"),
        lambda: GBMPipeline(small_unet(), diffusers.DDPMScheduler()),
        lambda: GaussianDiffusion(small_unet(), GBMScheduler()),
        lambda: GaussianDiffusion(small_unet(), diffusers.FlowMatchEulerDiscreteScheduler()),
    ],
)
def test_a_scheduler_of_another_noise_is_refused(make):
    with pytest.raises(ValueError, match="scheduler must be a"):
        make()


def test_moments_are_two():
    for wrong in (0.3, (0.3, 1.0, 2.0)):
        with pytest.raises(ValueError, match=r"log_moments must be \[mean, standard deviation\]"):
            GBMDiffusion(small_unet(), log_moments=wrong)


@pytest.mark.parametrize("cls", MODULES)
def test_images_without_channels_are_refused(cls):
    with pytest.raises(ValueError, match=r"images must be of shape \[B, C, H, W\], got \[4, 6, 6\]; images\[:, None\]"):
        cls(Network(torch.zeros_like)).training_step(IMAGES[:, 0], 0)


@pytest.mark.filterwarnings("ignore")  # of Lightning, about precision and predict loaders
def test_what_the_trainer_cannot_do_is_said_before_the_first_step(tmp_path):
    for precision in ("bf16-true", "64-true"):
        with pytest.raises(MisconfigurationException, match=f"precision must be .*, got {precision}"):
            fit(TrainedGaussian(small_unet()), tmp_path, precision=precision)
    with pytest.raises(MisconfigurationException, match="GaussianDiffusion predicts nothing"):
        pl.Trainer(accelerator="cpu", logger=False).predict(GaussianDiffusion(small_unet()), loader())


def test_labels_are_checked_in_evaluation_on_an_accelerator(monkeypatch):
    module = GBMDiffusion(Network(torch.zeros_like), num_classes=3)
    monkeypatch.setattr(GBMDiffusion, "device", torch.device("meta"))
    monkeypatch.setattr(module, "check_images", lambda images: None)
    monkeypatch.setattr(module, "losses", lambda *_: pytest.fail("went on"))
    labels = torch.tensor([0, 1, 2, 3])
    monkeypatch.setattr(module, "_read", lambda batch: (IMAGES, labels))
    for validate in (module.validation_step, module.test_step):
        with pytest.raises(ValueError, match="class_labels must be from 0 to 2"):
            validate((IMAGES, labels), 0)
