import math

import pytest
import torch

from lightning_opt.diffusion import DataMap, check_positive, log_moments

MAPS = [DataMap("shift"), DataMap("shift", shift=0.1), DataMap("exp"), DataMap("exp", scale=1.5), DataMap("identity")]


@pytest.mark.parametrize("data_map", MAPS, ids=str)
def test_there_and_back(data_map):
    images = torch.linspace(0.001, 1, 100, dtype=torch.float64).view(2, 1, 5, 10)
    log_images = data_map.to_log(images)
    torch.testing.assert_close(data_map.to_images(log_images), images, rtol=1e-12, atol=1e-14)
    assert (log_images.exp() > 0).all()


def test_the_maps_are_the_formulas():
    images = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    torch.testing.assert_close(DataMap("shift", shift=0.5).to_log(images).exp(), images + 0.5)
    torch.testing.assert_close(DataMap("exp", scale=0.35).to_log(images), 0.7 * images - 0.35)
    for data_map in MAPS[:4]:
        ends = data_map.to_log(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
        assert data_map.log_range == pytest.approx(ends, abs=1e-15)
    assert MAPS[4].log_range == (-math.inf, math.inf)


def test_samples_beyond_the_range_of_images_are_clamped_where_asked():
    log_state = torch.tensor([-3.0, 3.0])
    for kind in ("shift", "exp"):
        assert DataMap(kind).to_images(log_state).tolist() == [0.0, 1.0]
        outside = DataMap(kind, clip=False).to_images(log_state)
        assert outside[0] < 0
        assert outside[1] > 1
    torch.testing.assert_close(DataMap("identity").to_images(log_state), log_state.exp())


@pytest.mark.parametrize("kind", ["shift", "exp"])
@pytest.mark.parametrize("value", [-0.01, 1.01, 255.0, float("nan")])
def test_images_outside_the_range_are_refused(kind, value):
    images = torch.tensor([0.5, value])
    with pytest.raises(ValueError, match=r"images must be in \[0, 1\] for the map .*, got values from"):
        DataMap(kind).to_log(images)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_data_that_are_not_positive_are_refused(value):
    x = torch.tensor([1.0, value, 2.0])
    for refuse in (DataMap("identity").to_log, check_positive):
        with pytest.raises(ValueError, match="data must be positive, got 1 of 3 entries that are not"):
            refuse(x)


def test_moments_of_the_logarithm():
    generator = torch.Generator().manual_seed(0)
    logs = torch.randn(7, 3, 4, 4, generator=generator)
    mean, std = log_moments(logs)
    assert mean == pytest.approx(logs.double().mean().item(), rel=1e-12)
    assert std == pytest.approx(logs.double().std(correction=0).item(), rel=1e-12)
    means, stds = log_moments(logs, per_channel=True)
    for i in range(3):
        assert (means[i], stds[i]) == pytest.approx(log_moments(logs[:, i]), rel=1e-12)
    with pytest.raises(ValueError, match="log_images must be finite"):
        log_moments(torch.tensor([0.0, -math.inf]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "shfit"}, "Did you mean 'shift'"),
        ({"shift": 0.0}, "shift must be > 0"),
        ({"kind": "exp", "scale": -1.0}, "scale must be > 0"),
    ],
)
def test_wrong_values(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DataMap(**kwargs)
