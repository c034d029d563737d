import copy
import importlib.resources
import pickle

import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_opt.data import MNIST
from lightning_opt.metrics import FeatureNet, extract_features, frechet_distance, load_features

NETS = {"digits8": (8, 32, 11), "grey28": (28, 48, 30)}


def images(size, count=20):
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("name", NETS)
def test_a_shipped_net(name):
    size, features, classes = NETS[name]
    net = FeatureNet.load(name)
    assert net.image_shape == (1, size, size)
    assert net(images(size)).shape == (20, features)
    assert net.classify(net(images(size))).shape == (20, classes) == (20, len(net.classes))
    assert (importlib.resources.files("lightning_opt.metrics") / "weights" / f"{name}.pt").stat().st_size <= 300_000


def test_digits8_has_the_accuracy_that_it_states_on_images_that_it_was_not_trained_on(digits):
    _, held_out, labels = digits
    net = FeatureNet.load("digits8")
    accuracy = float((net.classify(net(held_out)).argmax(dim=1) == labels).double().mean())
    assert accuracy == pytest.approx(net.accuracy["digits"], abs=1 / 360 + 1e-4)  # a tie may fall otherwise elsewhere
    assert accuracy > 0.97


def test_features_are_in_units_of_the_datas_spread(digits):
    train, _, _ = digits
    features = extract_features(train)
    assert float(features.var(dim=0).sum()) == pytest.approx(32, rel=0.01)


def test_grey28_tells_rows_of_a_sheet_of_digits_apart(digits):
    """Digits of 8x8 blown up: of another data set, yet most are seen as that digit of MNIST."""
    _, held_out, labels = digits
    large = nn.functional.pad(nn.functional.interpolate(held_out, size=(20, 20), mode="bilinear"), (4, 4, 4, 4))
    net = FeatureNet.load("grey28")
    logits = net.classify(net(large))
    assert float((logits[:, :10].argmax(dim=1) == labels).double().mean()) > 0.7
    assert MNIST.classes == tuple(name.removeprefix("mnist/") for name in net.classes[:10])


def test_nothing_is_trained_and_nothing_is_saved():
    net = FeatureNet.load("digits8")
    assert not list(net.parameters())
    assert not net.state_dict()
    x = images(8).requires_grad_()
    net(x).sum().backward()
    assert float(x.grad.abs().sum()) > 0


def test_features_are_float32_whatever_is_around_them():
    net, x = FeatureNet.load("digits8"), images(8).bfloat16()
    expected = net(x)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x), expected)
        assert net.classify(expected).dtype == torch.float32
    assert torch.equal(net.to(torch.bfloat16)(x), expected)
    assert torch.equal(nn.Sequential(net).double().train()[0](x.double()), expected)


def test_loading_and_copying_give_the_same_net():
    x, state = images(8), torch.get_rng_state()
    net = FeatureNet.load("digits8")
    assert torch.equal(torch.get_rng_state(), state)
    for other in (FeatureNet.load("digits8"), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), net(x))


def test_serves_torchmetrics_own_metric(digits):
    train, held_out, _ = digits
    metric = FrechetInceptionDistance(feature=FeatureNet.load("digits8"), normalize=True)
    metric.update(held_out, real=True)
    metric.update(train[:360], real=False)
    assert float(metric.compute()) == pytest.approx(frechet_distance(train[:360], held_out), rel=1e-6)


def test_batches_make_no_difference(digits):
    train, _, _ = digits
    # sums of 512 products in float32 in another order, of values near 1
    torch.testing.assert_close(
        extract_features(train[:50], batch_size=7), extract_features(train[:50]), rtol=0, atol=1e-5
    )


def test_unknown_names():
    with pytest.raises(
        ValueError, match="name must be one of 'digits8', 'grey28'; got 'gray28'. Did you mean 'grey28'"
    ):
        FeatureNet.load("gray28")
    with pytest.raises(ValueError, match="features must be one of 'digits8', 'grey28', 'inception'; got 'vgg'"):
        load_features("vgg")
    with pytest.raises(ValueError, match=r"images must be of shape \[N, 1, 28, 28\], got \[20, 1, 8, 8\]"):
        extract_features(images(8), "grey28")
    with pytest.raises(ValueError, match="batch_size must be >= 1"):
        extract_features(images(8), batch_size=0)


# -------------------------------------------------------------------------------------------------------- Inception


def test_inception_without_torch_fidelity_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install torch-fidelity; or set features='grey28'"):
        frechet_distance(images(8), images(8), "inception")


class StandIn(nn.Module):
    """In the place of the network whose weights must be fetched: it takes what that takes."""

    def __init__(self, name, features_list):
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])

    def forward(self, x):
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        return x.float().flatten(1).repeat(1, 40)[:, :2048]


@pytest.fixture
def _fidelity(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())


@pytest.mark.usefixtures("_fidelity")
def test_inception_takes_gray_images_of_any_size_as_bytes_of_three_channels(monkeypatch):
    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", StandIn)
    gray = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8)
    features = extract_features(gray, "inception")
    assert features.shape == (1, 2048)
    expected = (gray * 255).floor().flatten()
    assert torch.equal(features[0, :64].float(), expected)
    assert torch.equal(features[0, 64:128].float(), expected)
    with pytest.raises(ValueError, match="images must have 1 or 3 channels for features='inception', got 2"):
        extract_features(torch.rand(1, 2, 8, 8), "inception")


@pytest.mark.usefixtures("_fidelity")
def test_inception_whose_weights_cannot_be_fetched(monkeypatch):
    def unreachable(**_):
        raise OSError("no route to host")

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", unreachable)
    with pytest.raises(
        RuntimeError, match=r"could not be fetched \(no route to host\); .*weights-inception.* into .*checkpoints"
    ):
        load_features("inception")
