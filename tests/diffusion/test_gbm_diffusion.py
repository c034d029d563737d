"""GBMDiffusion: its loss against the sheet's equations, what it measures, its noise, and the exact resume."""

import copy
import datetime
import math

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_opt.callbacks import ResumeState
from lightning_opt.cli import PeriodicCheckpoint
from lightning_opt.diffusion import GaussianDiffusion, GBMDiffusion, GBMScheduler, load_diffusion
from lightning_opt.testing._callback_checks.state import Saver
from lightning_opt.testing._callback_checks.subject import require_equal
from lightning_opt.testing._ranks import on_two_ranks
from tests.diffusion.small_models import IMAGES, LABELS, Told, Trained, fit, loader, small_unet

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec"),
]
MEAN, STD, RHO_MIN, RHO_MAX = 0.2, 0.25, 0.02, 3.0


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def naive_loss(prediction, weight, images, network, seed):
    """The multiplicative score-matching loss of the sheet, item by item in float64: lambda (x s - target)^2."""
    draw = generator(seed)
    level = torch.rand(len(images), generator=draw)
    noise = torch.randn(images.shape, generator=draw).double()
    losses = []
    for image, eps, u in zip(images.double(), noise, level.double(), strict=True):
        rho = RHO_MIN * (RHO_MAX / RHO_MIN) ** u
        log_x0 = (image + 1).log()
        log_x = log_x0 + rho * eps  # mu = sigma^2 / 2, so m = 0
        scale = (rho**2 + STD**2).sqrt()
        t = (rho / 0.8) ** 2 * 1000 / (RHO_MAX / 0.8) ** 2 if prediction == "stein" else 125 * rho.log() + 600
        read = log_x.exp() if prediction == "stein" else (log_x - MEAN) / scale
        out = network(read[None].float(), t[None].float())[0].double()
        if prediction == "edm":
            z = log_x - MEAN
            denoised = STD**2 / scale**2 * z + rho * STD / scale * out
            h = -1 - (z - denoised) / rho**2
        else:
            h = {"epsilon": -1 - out / rho, "hyvarinen": out, "stein": log_x.exp() * out}[prediction]
        target = -1 - eps / rho
        lam = {"edm": rho**2 * (rho**2 + STD**2) / STD**2, "v": rho**2, "v2": rho**4}[weight]
        losses.append((lam * (h - target) ** 2).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("prediction", ["edm", "epsilon", "hyvarinen", "stein"])
@pytest.mark.parametrize("weight", ["edm", "v", "v2"])
def test_the_loss_is_that_of_the_paper(prediction, weight):
    def network(state, times):
        return torch.tanh(state) + times[:, None, None, None] / 1000

    scheduler = GBMScheduler(rho_min=RHO_MIN, rho_max=RHO_MAX, prediction_type=prediction)
    module = GBMDiffusion(Told(network), scheduler, loss_weight=weight, log_moments=(MEAN, STD))
    losses = module.losses(IMAGES[:9], None, generator(5))
    expected = naive_loss(prediction, weight, IMAGES[:9], network, 5)
    # float32 against float64: noise and scores of up to 1 / rho = 50 with rounding 6e-8 each
    torch.testing.assert_close(losses.loss.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(losses.level, torch.rand(9, generator=generator(5)))


def test_nothing_better_than_zero_can_be_said_of_gaussian_logarithms():
    """Of normal log x0 the posterior mean is c_skip z, the output zero; then each target has variance one."""
    scheduler = GBMScheduler(rho_max=4.0, to_positive="identity")
    module = GBMDiffusion(Told(lambda state, _: 0 * state), scheduler, log_moments=(0.3, 0.5))
    images = (0.3 + 0.5 * torch.randn(500, 1, 8, 8, generator=generator())).exp()
    losses = module.losses(images, None, generator(1)).loss
    # the mean of 32,000 squared standard normals has the standard deviation sqrt(2 / 32,000) = 0.0079
    assert abs(losses.mean().item() - 1) < 4 * 0.0079


def test_training_data_are_measured_once_and_written_down(tmp_path):
    module = Trained(small_unet())
    saver = Saver(tmp_path)
    fit(module, tmp_path, saver, max_steps=1)
    logs = (IMAGES.double() + 1).log()
    config = module.scheduler.config
    # the module adds float32 logarithms of size 0.7 in float64: 2,448 roundings of 3e-8 average out
    assert config.log_mean == pytest.approx(logs.mean().item(), abs=1e-7)
    assert config.log_std == pytest.approx(logs.std(correction=0).item(), abs=1e-7)
    assert module.scheduler.parametrization.log_mean == config.log_mean
    checkpoint = torch.load(next(iter(saver.files.values()))[0], weights_only=True)
    assert checkpoint["diffusion"]["scheduler"]["config"]["log_mean"] == config.log_mean
    assert checkpoint["diffusion"]["image_shape"] == [1, 8, 8]
    other = GBMDiffusion.load_from_checkpoint(next(iter(saver.files.values()))[0], denoiser=small_unet())
    assert dict(other.scheduler.config)["log_std"] == config.log_std


def test_measuring_leaves_the_order_of_the_data_and_random_states_alone(tmp_path):
    class Keeps(Trained):
        def on_train_start(self):
            states.append(torch.get_rng_state())

        def losses(self, images, *rest):
            seen[-1].append(images)
            return super().losses(images, *rest)

    seen, states = [], []
    for moments in (None, (0.2, 0.2)):
        seen.append([])
        torch.manual_seed(3)
        fit(Keeps(small_unet(), log_moments=moments), tmp_path, limit_val_batches=0)
    assert torch.equal(*(torch.cat(batches) for batches in seen))
    assert torch.equal(*states)


def test_several_channels_have_moments_of_their_own(tmp_path):
    colored = torch.cat([IMAGES, IMAGES / 2, IMAGES / 3], dim=1)
    module = Trained(small_unet(in_channels=3, out_channels=3))
    fit(module, tmp_path, data=loader(images=colored), max_steps=1, limit_val_batches=0)
    expected = (colored.double() + 1).log().mean(dim=(0, 2, 3)).tolist()
    assert module.scheduler.config.log_mean == pytest.approx(expected, abs=1e-7)
    assert module.sample(2, num_inference_steps=2, generator=generator()).shape == (2, 3, 8, 8)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(IMAGES)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (DataLoader(Stream(), 8), r"needs a dataset with a length.*give log_moments=\[mean, standard deviation\]"),
        (DataLoader(TensorDataset(IMAGES * 2 - 1, LABELS), 8), r"images must be in \[0, 1\].*from -1.0 to 0.999"),
        (DataLoader(TensorDataset(torch.full((9, 1, 8, 8), torch.nan), LABELS[:9]), 8), r"values from nan to nan"),
        (DataLoader(TensorDataset(torch.ones(9, 1, 8, 8), LABELS[:9]), 8), "all pixels are alike"),
    ],
)
def test_data_that_cannot_be_measured_are_refused_before_the_first_step(tmp_path, data, complaint):
    module = Trained(small_unet())
    with pytest.raises(MisconfigurationException, match=complaint):
        fit(module, tmp_path, data=data)
    assert module.image_shape is None


def test_a_stream_trains_with_given_moments(tmp_path):
    module = Trained(small_unet(), log_moments=(0.2, 0.2))
    fit(module, tmp_path, data=DataLoader(Stream(), 8), max_steps=2)
    assert module.image_shape == (1, 8, 8)


@pytest.mark.parametrize("to_positive", ["shift", "exp"])
@pytest.mark.parametrize("bad", [-0.01, 1.01, math.nan])
def test_a_batch_outside_the_range_is_refused(to_positive, bad):
    module = GBMDiffusion(small_unet(), GBMScheduler(to_positive=to_positive), log_moments=(0.2, 0.2))
    images = IMAGES[:4].clone()
    images[2, 0, 3, 3] = bad
    with pytest.raises(ValueError, match=r"images must be in \[0, 1\]"):
        module.losses(images, None, generator())


@pytest.mark.parametrize("model", [GBMDiffusion, GaussianDiffusion])
def test_on_an_accelerator_the_first_batch_of_an_epoch_is_checked(model, monkeypatch):
    """To check each would wait for the device in every step."""
    module = model(small_unet())
    monkeypatch.setattr(model, "device", torch.device("meta"))
    for step in (module.training_step, module.validation_step):
        with pytest.raises(ValueError, match=r"images must be in \[0, 1\].* to 1.98"):
            step((2 * IMAGES[:4], None), 0)


def test_zero_and_negative_data_are_refused_where_no_map_makes_them_positive():
    module = GBMDiffusion(small_unet(), GBMScheduler(to_positive="identity"), log_moments=(0.2, 0.2))
    images = IMAGES[:4] + 0.1
    images[0, 0, 0, :2] = torch.tensor([0.0, -0.5])
    with pytest.raises(ValueError, match=r"must be positive, got 2 of 256 entries that are not; the smallest is -0.5"):
        module.losses(images, None, generator())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"loss_weight": "edn"}, "loss_weight must be one of .*Did you mean 'edm'"),
        ({"log_moments": (0.0, 0.0)}, "log_std must be > 0"),
        ({"label_dropout": 1.0}, r"label_dropout must be in \[0, 1\)"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"num_classes": 0}, "num_classes must be >= 1"),
        ({"num_classes": 10}, r"num_classes=10 needs UNet2DModel\(num_class_embeds=11\).*got None"),
        ({"denoiser": small_unet(num_class_embeds=4)}, "num_class_embeds=4 and wants labels: give num_classes=3"),
    ],
)
def test_wrong_arguments(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        GBMDiffusion(**{"denoiser": small_unet(), **arguments})


def test_noise_depends_on_seed_step_micro_batch_and_stage_alone(tmp_path):
    states = torch.get_rng_state()
    module = GBMDiffusion(small_unet(), log_moments=(0.2, 0.2))
    module.log = lambda *args, **kwargs: None
    first = module.training_step((IMAGES, LABELS), 0)
    assert torch.equal(module.training_step((IMAGES, LABELS), 0), first)
    assert not torch.equal(module.training_step((IMAGES, LABELS), 1), first)
    other = GBMDiffusion(small_unet(), log_moments=(0.2, 0.2), seed=1)
    other.log = module.log
    assert not torch.equal(other.training_step((IMAGES, LABELS), 0), first)
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0)]
    drawn = torch.stack([torch.rand(4, generator=module._generator(*key)) for key in keys])
    assert len(drawn.unique()) == 16
    module.training_step(IMAGES, 0)  # images alone
    assert torch.equal(torch.get_rng_state(), states)


def test_evaluation_is_the_same_in_every_epoch_and_by_quarters_of_the_level(tmp_path):
    module = Trained(small_unet())
    trainer = fit(module, tmp_path)
    results = [trainer.validate(module, loader(16, shuffle=False), verbose=False)[0] for _ in range(2)]
    assert results[0] == results[1]
    losses = [module.losses(IMAGES[i : i + 16], None, module._generator(1, i // 16)) for i in (0, 16, 32)]
    loss, level = (torch.cat(parts) for parts in zip(*losses, strict=True))
    # sums of 48 float32 numbers of size 1, in another order
    assert results[0]["val/loss"] == pytest.approx(loss.mean().item(), rel=1e-6)
    for quarter in range(4):
        inside = (level >= quarter / 4) & (level < (quarter + 1) / 4)
        assert results[0][f"val/loss_q{quarter}"] == pytest.approx(loss[inside].mean().item(), rel=1e-6)


def test_a_killed_run_with_accumulation_and_averaged_weights_resumes_bit_for_bit(tmp_path):
    """Killed within an accumulation window, at the end of an epoch, and between."""

    def run(folder, **options):
        module = Trained(small_unet(num_class_embeds=4, dropout=0.1), num_classes=3)
        saver = Saver(folder)
        average = EMAWeightAveraging(decay=0.9)
        trainer = fit(module, folder, ResumeState(), average, saver, max_epochs=2, accumulate_grad_batches=2, **options)
        averaged = {name: value.clone() for name, value in module.state_dict().items()}
        optimizer = copy.deepcopy(trainer.optimizers[0].state_dict())
        return trainer.logger.rows, averaged, optimizer, saver, module.scheduler.config

    rows, averaged, optimizer, saver, config = run(tmp_path / "whole")
    assert any(name == "val/loss_q0" for name, _ in rows)
    for batch in (3, 6, 8):  # the middle of a window, the end of an epoch, the end of a window
        path, step = saver.files[batch]
        torch.manual_seed(99)
        resumed = run(tmp_path / f"resumed{batch}", ckpt_path=path)
        what = f"resumed behind batch {batch}"
        require_equal(resumed[1], averaged, f"{what}: averaged weights")
        require_equal(resumed[2], optimizer, f"{what}: optimizer")
        later = {key: value for key, value in rows.items() if key[1] >= step}
        require_equal({key: resumed[0].get(key) for key in later}, later, f"{what}: logged values")
        assert dict(resumed[4]) == dict(config)


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_a_finished_run_with_averaged_weights_is_extended_exactly(tmp_path):
    """When training ends the callback puts the average into the module; the checkpoint must still have both."""

    def run(name, **options):
        checkpoint = PeriodicCheckpoint()
        checkpoint.dirpath = str(tmp_path / name)
        module = Trained(small_unet())
        callbacks = ResumeState(), EMAWeightAveraging(decay=0.9), checkpoint
        trainer = fit(module, tmp_path, *callbacks, limit_val_batches=0, **options)
        return module.state_dict(), trainer.optimizers[0].state_dict(), checkpoint.best_model_path

    whole = run("whole", max_epochs=2)
    *_, path = run("half", max_epochs=1)
    extended = run("extended", max_epochs=2, ckpt_path=path)
    require_equal(extended[0], whole[0], "averaged weights")
    require_equal(extended[1], whole[1], "optimizer")


def test_averaged_weights_are_sampled_and_saved(tmp_path):
    module = Trained(small_unet())
    saver = Saver(tmp_path)
    fit(module, tmp_path, EMAWeightAveraging(decay=0.5), saver)
    checkpoint = torch.load(saver.files[6][0], weights_only=True)
    name = "denoiser.conv_in.weight"
    assert not torch.equal(checkpoint["state_dict"][name], checkpoint["current_model_state"][name])
    assert torch.equal(checkpoint["state_dict"][name], module.state_dict()[name])  # copied when training ended


def _on_rank(folder: str) -> dict[str, object]:
    """What one rank of two measures and draws; its first levels of noise."""
    module = Trained(small_unet(num_class_embeds=4), num_classes=3)
    drawn = []
    losses = module.losses
    module.losses = lambda *args: (drawn.append(losses(*args)), drawn[-1])[1]
    strategy = DDPStrategy(process_group_backend="gloo", timeout=datetime.timedelta(seconds=60))
    trainer = fit(module, folder, devices=2, strategy=strategy, data=loader(12))
    return {
        "moments": [module.scheduler.config.log_mean, module.scheduler.config.log_std],
        "level": drawn[0].level.detach(),
        "weight": module.denoiser.conv_in.weight.detach(),
        "val": float(trainer.callback_metrics["val/loss_q1"]),
    }


def test_two_ranks_measure_the_same_and_draw_different_noise(tmp_path):
    first, second = on_two_ranks(_on_rank, str(tmp_path))
    assert first["moments"] == second["moments"]
    assert first["moments"][0] == pytest.approx((IMAGES.double() + 1).log().mean().item(), abs=1e-7)
    assert not torch.isin(first["level"], second["level"]).any()
    assert torch.equal(first["weight"], second["weight"])
    assert first["val"] == second["val"]


def test_labels_are_dropped_in_training_alone():
    network = Told(lambda state, times, labels: 0 * state)
    module = GBMDiffusion(network, log_moments=(0.2, 0.2), num_classes=3, label_dropout=0.25)
    module.log = lambda *args, **kwargs: None
    images, labels = IMAGES[:1].expand(2000, -1, -1, -1), torch.arange(2000) % 3
    module.training_step((images, labels), 0)
    trained = network.calls[-1][2]
    dropped = trained == 3
    # of 2,000, each with probability 1/4: standard deviation 19.4
    assert abs(int(dropped.sum()) - 500) < 4 * 19.4
    assert torch.equal(trained[~dropped], labels[~dropped])
    module.validation_step((images, labels), 0)
    assert torch.equal(network.calls[-1][2], labels)
    with pytest.raises(ValueError, match="num_classes=3 needs batches of images and labels"):
        module.training_step(images, 0)


def test_mixed_precision_keeps_logarithms_and_residuals_in_float32(tmp_path):
    module = Trained(small_unet())
    inputs = []
    module.denoiser.register_forward_pre_hook(lambda _, args: inputs.append(args))
    trainer = fit(module, tmp_path, precision="bf16-mixed", max_steps=2, limit_val_batches=0)
    plain = fit(Trained(small_unet()), tmp_path, max_steps=2, limit_val_batches=0)
    assert all(state.dtype == torch.float32 and times.dtype == torch.float32 for state, times in inputs)
    # the network's output has 8 bits, so the loss, of size 1, some hundredths
    for key, value in plain.logger.rows.items():
        assert trainer.logger.rows[key] == pytest.approx(value, rel=0.05)
    assert trainer.logger.rows != plain.logger.rows


def test_a_compiled_denoiser_is_loaded_as_the_plain_one(tmp_path):
    module = Trained(torch.compile(small_unet(), backend="eager"))
    saver = Saver(tmp_path)
    fit(module, tmp_path, saver, max_steps=1, limit_val_batches=0)
    loaded = load_diffusion(saver.files[1][0])
    for name, value in loaded.denoiser.state_dict().items():
        assert torch.equal(value, module.denoiser._orig_mod.state_dict()[name])
