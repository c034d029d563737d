import json

import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt.models import MLP
from lightning_opt.solvers.deep_ga import (
    Genome,
    GenomeDecoder,
    call_each,
    decode,
    fan_in_init,
    flatten,
    load_genome,
    load_weights,
    save_genome,
    unflatten,
    write,
)


def lineage(mutations, seed=0):
    """A genome and the weights that were built up with it, one mutation after the other."""
    random = np.random.default_rng(seed)
    init = fan_in_init(MLP(64, (16,)))
    genome = Genome((int(random.integers(2**32)),))
    weights = init(genome.seeds[0])
    for _ in range(mutations):
        gene, power = int(random.integers(2**32)), float(random.uniform(0.01, 0.1))
        genome = genome.mutated(gene, power)
        noise = torch.randn(weights.shape, generator=torch.Generator().manual_seed(gene))
        weights = weights + noise * genome.powers[-1]
    return genome, weights, init


def test_decoding_gives_the_bits_that_were_built_up():
    genome, weights, init = lineage(139)
    assert torch.equal(decode(genome, init), weights)
    decoder = GenomeDecoder(init)
    assert torch.equal(decoder.weights(genome), weights)
    decoder.remember([genome.parent])
    assert torch.equal(decoder.weights(genome), weights)
    assert torch.equal(decoder.stack([genome, genome.parent])[0], weights)
    decoder.remember([genome])
    decoder.weights(genome).zero_()  # a copy
    assert torch.equal(decoder.weights(genome), weights)


def test_the_noise_is_standard_normal_times_the_power():
    genome, n = Genome((3,), (0.25,)), 100_000
    noise = decode(genome, torch.zeros(n, dtype=torch.float64)) / 0.25
    # standard errors: 1 / sqrt(n) of the mean, sqrt(2 / n) of the variance
    assert abs(noise.mean()) < 4 / n**0.5
    assert abs(noise.var() - 1) < 4 * (2 / n) ** 0.5


@pytest.mark.parametrize("genome", [Genome(), Genome((2**32 - 1,)), Genome((1, 2), (0.1, 1e-5)), lineage(5)[0]])
def test_bytes(genome):
    data = genome.to_bytes()
    assert len(data) == 8 * len(genome) + (0 if genome.init_seed is None else 4)
    assert Genome.from_bytes(data) == genome


def test_a_genome_of_150_generations_is_below_2_kB():
    assert len(lineage(149)[0].to_bytes()) == 1196


def test_torch_takes_32_bits_of_a_seed():
    """Why seeds are uint32: others would be the same noise twice."""
    draws = [torch.randn(5, generator=torch.Generator().manual_seed(s)) for s in (7, 7 + 2**32, 8)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("seeds", "powers"), [((1,), (0.1, 0.1)), ((1, 2, 3), (0.1,)), ((2**32,), ()), ((-1,), ()), ((1,), (0.0,))]
)
def test_no_genome(seeds, powers):
    with pytest.raises(ValueError, match=r"seed|power"):
        Genome(seeds, powers)


def test_init_must_fit_the_genome():
    with pytest.raises(ValueError, match="function"):
        decode(Genome((1,)), torch.zeros(3))
    with pytest.raises(ValueError, match="tensor"):
        decode(Genome((1,), (0.1,)), lambda seed: torch.zeros(3))
    with pytest.raises(ValueError, match="4 bytes"):
        Genome.from_bytes(b"abc")


def test_a_file_rebuilds_the_network(tmp_path, recwarn):
    genome, weights, init = lineage(20)
    save_genome(tmp_path / "genome.json", genome, weights)
    assert load_genome(tmp_path / "genome.json") == genome
    assert torch.equal(load_weights(tmp_path / "genome.json", init), weights)
    assert not recwarn.list
    record = json.loads((tmp_path / "genome.json").read_text())
    assert record["torch"] == str(torch.__version__)
    assert (record["dtype"], record["device"], record["n_params"]) == ("float32", "cpu", 1210)


def test_a_file_tells_when_it_does_not(tmp_path):
    genome, weights, init = lineage(3)
    path = tmp_path / "genome.json"
    save_genome(path, genome, weights)
    path.write_text(path.read_text().replace(str(torch.__version__), "1.0"))
    load_weights(path, init)  # the same bits are the same network, whatever the version
    with pytest.warns(UserWarning, match="torch 1.0 there"):
        load_weights(path, lambda seed: init(seed + 1))
    with pytest.raises(ValueError, match="1210 weights, init has 3"):
        load_weights(path, lambda seed: torch.zeros(3))
    for text in ("{}", "no json", "[]", '{"format": 1}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="is no genome"):
            load_genome(path)


def test_initial_weights_of_the_paper():
    net = nn.Sequential(nn.Conv2d(2, 50, 3), nn.LayerNorm(50), nn.Linear(50, 300), nn.Linear(300, 400))
    with torch.no_grad():
        net[1].weight.fill_(3.0)
    parts = {name: p[0] for name, p in unflatten(net, fan_in_init(net)(5)[None]).items()}
    for name, scale in (("0.weight", 18**-0.5), ("2.weight", 50**-0.5), ("3.weight", 0.1 * 300**-0.5)):
        n = parts[name].numel()
        assert abs(parts[name].std() / scale - 1) < 4 * (0.5 / n) ** 0.5  # its standard error is sqrt(1 / 2n)
    for name in ("0.bias", "1.bias", "2.bias", "3.bias"):
        assert not parts[name].any()
    assert (parts["1.weight"] == 3).all()
    assert torch.equal(fan_in_init(net)(5), fan_in_init(net)(5))
    assert not torch.equal(fan_in_init(net)(5), fan_in_init(net)(6))
    with pytest.raises(ValueError, match="output_std"):
        fan_in_init(net, output_std=0)


def test_a_module_and_its_vector():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    net[0].bias.requires_grad_(False)
    frozen = net[0].bias.clone()
    weights = torch.randn(5, flatten(net).numel(), dtype=torch.float64)
    assert weights.shape == (5, 3 * 4 + 4 * 2 + 2)
    inputs = torch.randn(7, 3, dtype=torch.float64)
    before, at_once = flatten(net), call_each(net, weights, inputs)
    assert torch.equal(flatten(net), before)
    for vector, outputs in zip(weights, at_once, strict=True):
        write(net, vector)
        assert torch.equal(flatten(net), vector)
        torch.testing.assert_close(net(inputs), outputs, rtol=1e-13, atol=1e-13)
    assert torch.equal(net[0].bias, frozen)
    with pytest.raises(ValueError, match="22 trainable weights, got 3"):
        write(net, torch.zeros(3))
    with pytest.raises(ValueError, match="no trainable"):
        flatten(nn.ReLU())
