import copy
import io
import math
import os

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from lightning_opt.metrics import FrechetDistance, KernelDistance, extract_features, frechet_distance, kernel_distance
from lightning_opt.testing._ranks import on_two_ranks
from tests.reference import image_metrics as naive


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def with_moments(mean, covariance, count, seed=0):
    """Rows whose sample mean and covariance are exactly these."""
    x = draw(count, len(mean), seed=seed)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    return mean + white @ torch.linalg.cholesky(covariance).T


def random_gaussian(d, seed):
    root = draw(d, d, seed=seed)
    return draw(d, seed=seed + 100), root @ root.T + 0.1 * torch.eye(d, dtype=torch.float64)


class Pixels(nn.Flatten):
    """Features that are the pixels."""

    num_features = 4


# ------------------------------------------------------------------------------------------------- Frechet distance


def test_frechet_distance_of_gaussians_has_its_closed_form():
    """Two well-conditioned matrices: accurate to a few hundred roundings."""
    (m1, c1), (m2, c2) = random_gaussian(6, 1), random_gaussian(6, 2)
    expected = naive.gaussian_frechet(*(t.numpy() for t in (m1, c1, m2, c2)))
    ours = frechet_distance(with_moments(m1, c1, 50, 3), with_moments(m2, c2, 50, 4), features=None)
    assert ours == pytest.approx(expected, rel=1e-11)


def test_frechet_distance_of_commuting_covariances():
    """Diagonal ones: sum of (s1 - s2)^2, standard deviations, and the shift squared."""
    s1, s2 = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 2.0, 1.5]).double()
    shift = torch.tensor([0.0, 2.0, -1.0]).double()
    x = with_moments(torch.zeros(3).double(), s1.square().diag(), 30, 1)
    y = with_moments(shift, s2.square().diag(), 30, 2)
    assert frechet_distance(x, y, features=None) == pytest.approx(4 + 0 + 1 + 5, rel=1e-12)
    assert frechet_distance(y, x, features=None) == pytest.approx(10, rel=1e-12)


def test_frechet_distance_of_one_feature_and_of_the_same_set():
    assert frechet_distance(3 * draw(50, 1), draw(50, 1), features=None) == pytest.approx(
        float(4 * draw(50, 1).var() + (2 * draw(50, 1).mean()) ** 2), rel=1e-12
    )
    x = draw(100, 8)
    assert abs(frechet_distance(x, x, features=None)) < 1e-11 * float(x.var(0).sum())


def test_frechet_distance_agrees_with_scipy_in_the_features_of_digits(digits):
    train, held_out, _ = digits
    x, y = extract_features(train[:360]), extract_features(held_out)
    alive = (x.var(0) > 0) & (y.var(0) > 0)  # scipy's root needs them; the others differ in mean and variance alone
    rest = (x.mean(0) - y.mean(0)).square() + (x.std(0) - y.std(0)).square()
    expected = naive.frechet(x[:, alive].numpy(), y[:, alive].numpy()) + float(rest[~alive].sum())
    assert frechet_distance(train[:360], held_out) == pytest.approx(expected, rel=1e-8)
    assert expected > 0.1


def test_frechet_distance_grows_with_fewer_images_of_one_distribution():
    """About d^2 / 2n + 2 d / n for two sets of n in d features of variance 1."""
    d = 16
    for n in (100, 400):
        x, y = draw(20, n, d, seed=5), draw(20, n, d, seed=6)
        mean = np.mean([frechet_distance(a, b, features=None) for a, b in zip(x, y, strict=True)])
        assert mean == pytest.approx(d * d / (2 * n) + 2 * d / n, rel=0.15)  # the next order is d / n


def test_float32_images_far_from_zero_lose_nothing():
    """A spread of 1e-3 about 1000: sums of float32 squares would lose it all."""
    x, y = 1000 + 1e-3 * draw(200, 3, seed=1), 1000 + 2e-3 * draw(200, 3, seed=2)
    assert frechet_distance(x, y, features=None) == pytest.approx(naive.frechet(x.numpy(), y.numpy()), rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*covariance is singular")
def test_singular_covariances_cost_no_accuracy():
    """20 rows in 300 features. Of rank one: the covariances s aa' and s bb' have the trace of the root s |a'b|."""
    x = draw(20, 300)
    assert abs(frechet_distance(x, x, features=None)) < 1e-12 * float(x.var(0).sum())
    a, b = draw(2, 300, seed=1)
    steps = torch.linspace(-1, 1, 20).double().unsqueeze(1)
    ours = frechet_distance(steps * a, steps * b, features=None)
    expected = float(steps.var() * (a @ a + b @ b - 2 * abs(a @ b)))
    assert ours == pytest.approx(expected, rel=1e-12)


# -------------------------------------------------------------------------------------------------- kernel distance


def test_kernel_distance_follows_its_definition():
    x, y = draw(12, 3, seed=1), 0.5 + draw(12, 3, seed=2)
    assert kernel_distance(x, y, features=None) == pytest.approx(naive.kernel(x.numpy(), y.numpy()), rel=1e-12)


def test_kernel_distance_is_unbiased():
    """Splits of one distribution: 0 for small ones too, where the Frechet distance is not."""
    values = {}
    for n in (20, 80):
        splits = draw(2, 300, n, 4, seed=n)
        values[n] = torch.tensor([kernel_distance(a, b, features=None) for a, b in zip(*splits, strict=True)])
        assert abs(float(values[n].mean())) < 3 * float(values[n].std()) / 300**0.5
    biased = naive.kernel(*(draw(20, 4, seed=s).numpy() for s in (1, 1)))  # two copies of one set are not two draws
    assert biased < -float(values[20].std())


def test_kernel_distance_of_a_shift_does_not_depend_on_the_number_of_images():
    small, large = (
        torch.tensor(
            [kernel_distance(a + 1, b, features=None) for a, b in zip(*draw(2, 200, n, 4, seed=n), strict=True)]
        )
        for n in (20, 80)
    )
    error = float((small.var() / 200 + large.var() / 200).sqrt())
    assert abs(float(small.mean() - large.mean())) < 3 * error
    assert float(large.mean()) > 20 * error


def test_subsets_are_drawn_from_their_seed_alone():
    x, y = draw(60, 3, seed=1), draw(60, 3, seed=2)
    state = torch.get_rng_state()
    options = {"features": None, "subsets": 5, "subset_size": 30}
    first = kernel_distance(x, y, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert kernel_distance(x, y, **options) == first
    assert kernel_distance(x, y, **options, seed=1) != first
    assert kernel_distance(x, y, features=None) != first


# ------------------------------------------------------------------------------------------------- as torchmetrics


class Model(pl.LightningModule):
    """Compares its batches, darkened, with the batches."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.frechet = FrechetDistance("digits8")
        self.kernel = KernelDistance("digits8", subsets=3, subset_size=100)

    def training_step(self, batch):
        return self.layer(batch.new_ones(1, 1, dtype=self.layer.weight.dtype)).sum()

    def validation_step(self, batch):
        for metric in (self.frechet, self.kernel):
            metric.update(batch, real=True)
            metric.update(0.5 * batch, real=False)
        self.log("frechet", self.frechet)
        self.log("kernel", self.kernel)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
}


def loader(images, batch_size=64):
    return DataLoader(images, batch_size=batch_size)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*number of training batches")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_metrics_in_a_model_give_what_the_functions_give_in_every_precision(digits, precision):
    _, held_out, _ = digits
    trainer = pl.Trainer(max_epochs=2, num_sanity_val_steps=0, precision=precision, **QUIET)
    model = Model()
    images = held_out[:128].bfloat16().float()  # so that Lightning's cast of the batch loses nothing
    trainer.fit(model, loader(images), loader(images))
    expected = frechet_distance(0.5 * images, images)
    assert float(trainer.callback_metrics["frechet"]) == pytest.approx(expected, rel=1e-6)  # logged in float32
    expected = kernel_distance(0.5 * images, images, subsets=3, subset_size=100)
    assert float(trainer.callback_metrics["kernel"]) == pytest.approx(expected, rel=1e-5)


def test_metrics_add_nothing_to_a_models_checkpoint_or_optimizer():
    model = Model()
    assert set(model.state_dict()) == {"layer.weight", "layer.bias"}
    assert len(list(model.parameters())) == 2


@pytest.mark.parametrize("metric", [FrechetDistance, KernelDistance])
def test_casting_a_model_leaves_its_metrics_alone(digits, metric):
    train, held_out, _ = digits
    plain, cast = metric("digits8"), metric("digits8")
    for m in (plain, cast):
        m.update(held_out, real=True)
    nn.ModuleList([cast]).to(torch.bfloat16)
    for m in (plain, cast):
        m.update(train[:360], real=False)
    assert float(cast.compute()) == float(plain.compute())


@pytest.mark.parametrize("metric", [FrechetDistance, KernelDistance])
def test_metrics_reset_copy_and_pickle(digits, metric):
    train, held_out, _ = digits
    m = metric("digits8", reset_real_features=False)
    m.update(held_out, real=True)
    m.update(train[:360], real=False)
    value = float(m.compute())
    stream = io.BytesIO()
    torch.save(m, stream)
    stream.seek(0)
    for other in (copy.deepcopy(m), torch.load(stream, weights_only=False)):
        other.reset()
        other.update(train[:200], real=False)
        other.update(train[200:360], real=False)
        assert float(other.compute()) == pytest.approx(value, rel=1e-9)


def share_of_ranks(images):
    """Both distances of two sets of which each rank holds a part, parts of unequal size."""
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    real, samples = images
    share = [slice(0, 50), slice(50, 128)][dist.get_rank()]
    values = []
    for metric in (FrechetDistance("digits8"), KernelDistance("digits8", subsets=4, subset_size=60)):
        metric.update(real[share], real=True)
        metric.update(samples[share], real=False)
        values.append(metric.compute())
    return torch.stack(values)


def test_two_ranks_give_what_one_gives(digits):
    train, held_out, _ = digits
    real, samples = held_out[:128], train[:128]
    values = on_two_ranks(share_of_ranks, (real, samples))
    assert torch.equal(values[0], values[1])
    assert float(values[0][0]) == pytest.approx(frechet_distance(samples, real), rel=1e-9)
    assert float(values[0][1]) == pytest.approx(kernel_distance(samples, real, subsets=4, subset_size=60), rel=1e-9)


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
@pytest.mark.parametrize(
    ("samples", "reference", "message"),
    [
        (torch.rand(9, 1, 8, 8), torch.rand(8, 1, 8, 8), "equally many images, at least 2, got 9 and 8"),
        (torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8), "at least 2, got 1 and 1"),
        (
            torch.rand(9, 1, 8, 8) * 2,
            torch.rand(9, 1, 8, 8),
            r"samples must be in \[0, 1\] and finite, got values from",
        ),
        (torch.rand(9, 1, 8, 8), torch.rand(9, 1, 8, 8) - 1, r"reference must be in \[0, 1\]"),
        (torch.full((9, 1, 8, 8), math.nan), torch.rand(9, 1, 8, 8), "samples must be in .* got values from nan"),
        (
            torch.zeros(9, 1, 8, 8, dtype=torch.uint8),
            torch.rand(9, 1, 8, 8),
            "floating-point tensor .* got torch.uint8",
        ),
        (torch.rand(9, 8, 8), torch.rand(9, 8, 8), r"of shape \[N, C, H, W\], got \[9, 8, 8\]"),
        (torch.rand(9, 3, 8, 8), torch.rand(9, 3, 8, 8), r"features='auto', got \[9, 3, 8, 8\]; for other images"),
        (
            torch.rand(9, 1, 8, 8),
            torch.rand(9, 1, 9, 9),
            r"reference must be of shape \[N, 1, 8, 8\], got \[9, 1, 9, 9\]",
        ),
        (torch.rand(0, 1, 8, 8), torch.rand(0, 1, 8, 8), "samples must hold at least one image"),
    ],
)
def test_wrong_images_are_named(distance, samples, reference, message):
    with pytest.raises(ValueError, match=message):
        distance(samples, reference)


def test_wrong_features_are_named():
    with pytest.raises(ValueError, match=r"reference must be of shape \[N, 3\] for features=None, got \[9, 4\]"):
        frechet_distance(torch.rand(9, 3), torch.rand(9, 4), features=None)
    with pytest.raises(ValueError, match="samples must be finite, got 1 values that are not"):
        frechet_distance(torch.tensor([[1.0], [math.inf]]), torch.rand(2, 1), features=None)
    with pytest.raises(ValueError, match=r"subset_size must be in \[2, 9\], got 10"):
        kernel_distance(torch.rand(9, 3), torch.rand(9, 3), features=None, subset_size=10)


def test_fewer_images_than_features_are_warned_of(digits):
    _, held_out, _ = digits
    with pytest.warns(UserWarning, match="32 images in 32 features: their covariance is singular"):
        frechet_distance(held_out[:32], held_out[32:64])
    frechet_distance(held_out[:33], held_out[33:66])


def test_metrics_refuse_unequal_counts_and_wrong_images():
    for metric in (FrechetDistance("digits8"), KernelDistance("digits8")):
        metric.update(torch.rand(9, 1, 8, 8), real=True)
        metric.update(torch.rand(8, 1, 8, 8), real=False)
        with pytest.raises(ValueError, match="got 8 and 9"):
            metric.compute()
        with pytest.raises(ValueError, match=r"images must be in \[0, 1\]"):
            metric.update(-torch.rand(9, 1, 8, 8), real=True)
        with pytest.raises(ValueError, match=r"images must be of shape \[N, 1, 8, 8\], got \[9, 1, 28, 28\]"):
            metric.update(torch.rand(9, 1, 28, 28), real=True)
    metric = KernelDistance("digits8", subset_size=20)
    for real in (True, False):
        metric.update(torch.rand(9, 1, 8, 8), real=real)
    with pytest.raises(ValueError, match=r"subset_size must be in \[2, 9\], the number of images, got 20"):
        metric.compute()
    with pytest.raises(ValueError, match="subsets must be >= 1"):
        KernelDistance("digits8", subsets=0)


def test_a_module_of_ones_own():
    x, y = torch.rand(50, 1, 2, 2, generator=generator(1)), torch.rand(50, 1, 2, 2, generator=generator(2))
    expected = naive.frechet(x.flatten(1).double().numpy(), y.flatten(1).double().numpy())
    assert frechet_distance(x, y, Pixels()) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="num_features, an int; Flatten has none"):
        frechet_distance(x, y, nn.Flatten())
