import copy
import math

import pytest
import torch
from torch import nn

from lightning_opt.optim import ExponentiatedSGD, eg_param_groups, lognormal_init_, split_bias_


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
@pytest.mark.parametrize("ratio", [0.5, 1.5])
def test_lognormal_weights_have_the_moments_of_the_sheet(mode, ratio):
    layer = lognormal_init_(nn.Linear(600, 500), mean_std_ratio=ratio, gain="relu", mode=mode, generator=generator())
    w = layer.weight.detach().double()
    std = math.sqrt(2) / math.sqrt({"fan_in": 600, "fan_out": 500}[mode]) / math.sqrt(1 + ratio**2)
    sigma = math.sqrt(math.log(1 + 1 / ratio**2))
    logs = w.abs().log()
    # 300,000 samples: standard errors of 0.2% of sigma; magnitudes of tail index e^sigma^2 a little more
    assert logs.std().item() == pytest.approx(sigma, rel=0.01)
    assert logs.mean().item() == pytest.approx(math.log(ratio * std) - sigma**2 / 2, abs=0.01 * sigma)
    assert w.abs().mean().item() == pytest.approx(ratio * std, rel=0.02)
    assert w.abs().std().item() == pytest.approx(std, rel=0.1)
    assert (w > 0).double().mean().item() == pytest.approx(0.5, abs=0.004)
    cubes = ((logs - logs.mean()) / logs.std()) ** 3
    assert abs(cubes.mean().item()) < 0.03  # the logarithm is symmetric
    # signs do not depend on magnitudes
    assert abs((w.sign() * (logs - logs.mean())).mean().item() / logs.std().item()) < 0.01


def test_lognormal_init_uses_its_generator_only_and_skips():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 2))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    state = torch.get_rng_state()
    assert lognormal_init_(net, skip=["4"], generator=generator()) is net
    assert torch.equal(torch.get_rng_state(), state)
    changed = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"0.weight", "3.weight"}
    again = lognormal_init_(nn.Conv2d(2, 3, 3), generator=generator())
    assert torch.equal(again.weight, net[0].weight)
    assert net[0].weight.requires_grad


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.nan])
def test_lognormal_init_names_a_wrong_ratio(ratio):
    with pytest.raises(ValueError, match="mean_std_ratio must be > 0.0 and finite"):
        lognormal_init_(nn.Linear(2, 2), mean_std_ratio=ratio)


def test_split_bias_is_a_positive_and_a_negative_part():
    net = nn.Sequential(nn.Conv2d(4, 400, 3), nn.BatchNorm2d(400), nn.Linear(5, 3, bias=False))
    split_bias_(net, generator=generator())
    bound = math.sqrt(2 / 36)
    parts = net[0].parametrizations.bias
    assert 0 <= parts.original0.min() < 0.02 * bound
    assert 0.98 * bound < parts.original0.max() <= bound
    assert -bound <= parts.original1.min() < -0.98 * bound
    assert -0.02 * bound < parts.original1.max() <= 0
    assert torch.equal(net[0].bias, parts.original0 + parts.original1)
    assert 0 < net[1].parametrizations.bias.original0.max() <= math.sqrt(2) * 1e-4
    assert net[2].bias is None
    assert [name for name, _ in net[0].named_parameters()] == [
        "weight",
        "parametrizations.bias.original0",
        "parametrizations.bias.original1",
    ]


def test_split_bias_can_be_copied_and_changes_its_sign_in_training():
    layer = split_bias_(nn.Linear(3, 1), generator=generator())
    nn.init.constant_(layer.parametrizations.bias.original0, 0.1)
    nn.init.constant_(layer.parametrizations.bias.original1, -0.2)
    optimizer = ExponentiatedSGD(eg_param_groups(layer), lr=0.5, fused=False)
    assert len(optimizer.param_groups) == 1  # all of it is multiplicative
    for _ in range(50):
        optimizer.zero_grad()
        (layer(torch.zeros(1, 3)) - 0.3).square().sum().backward()
        optimizer.step()
    assert layer.bias.item() == pytest.approx(0.3, abs=1e-3)
    assert torch.equal(copy.deepcopy(layer).bias, layer.bias)


def test_groups_put_zeros_and_vectors_into_the_additive_one():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2), nn.Linear(2, 2))
    nn.init.zeros_(net[2].weight)
    net[3].weight.requires_grad_(False)
    groups = eg_param_groups(net)
    assert [[name for name, _ in g["params"]] for g in groups] == [
        ["0.weight"],
        ["0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "3.bias"],
    ]
    assert [(g["additive"], g.get("weight_decay")) for g in groups] == [(False, None), (True, 0.0)]
    assert len(eg_param_groups(nn.LayerNorm(3))) == 1  # no empty group
