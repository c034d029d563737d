import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_opt.models import CharGPT

TOKENS = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(0))


def small(**kwargs: float) -> CharGPT:
    torch.manual_seed(0)
    return CharGPT(**{"vocab_size": 11, "context": 8, "width": 12, "depth": 2, "heads": 3} | kwargs)


def naive(net: CharGPT, tokens: Tensor) -> Tensor:
    """The network written out with matrices, one head and one position after the other."""

    def normalized(x: Tensor, norm: nn.LayerNorm) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias

    def linear(x: Tensor, layer: nn.Linear) -> Tensor:
        return x @ layer.weight.T + layer.bias

    length = tokens.shape[1]
    x = torch.stack([net.tokens.weight[row] + net.positions.weight[:length] for row in tokens])
    for block in net.blocks:
        query, key, value = linear(normalized(x, block.attention_norm), block.split).chunk(3, dim=-1)
        size = query.shape[-1] // block.heads
        heads = []
        for h in range(block.heads):
            q, k, v = (m[..., h * size : (h + 1) * size] for m in (query, key, value))
            scores = q @ k.transpose(1, 2) / math.sqrt(size)
            rows = [scores[:, t, : t + 1].softmax(-1) for t in range(length)]
            heads.append(torch.stack([(rows[t][:, None] @ v[:, : t + 1])[:, 0] for t in range(length)], dim=1))
        x = x + linear(torch.cat(heads, dim=-1), block.merge)
        h = linear(normalized(x, block.feedforward_norm), block.grow)
        h = 0.5 * h * (1 + (math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)).tanh())
        x = x + linear(h, block.shrink)
    return normalized(x, net.norm) @ net.tokens.weight.T


def test_computes_the_network_of_its_description() -> None:
    net = small().double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    logits = net(TOKENS)
    assert logits.shape == (3, 7, 11)
    # logits of order 10 behind a few dozen sums of at most 48 terms; float64 has 16 digits
    torch.testing.assert_close(logits, naive(net, TOKENS), rtol=1e-10, atol=1e-10)


def test_a_prediction_sees_no_later_token() -> None:
    net = small().double()
    changed = TOKENS.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 11
    first, second = net(TOKENS), net(changed)
    torch.testing.assert_close(first[:, :4], second[:, :4], rtol=1e-12, atol=1e-12)
    assert (first[:, 4:] - second[:, 4:]).abs().min(dim=-1).values.max() > 1e-6
    torch.testing.assert_close(net(TOKENS[:, :4]), first[:, :4], rtol=1e-12, atol=1e-12)


def test_has_the_parameters_asked_for_and_ties_the_output() -> None:
    v, c, d, layers = 66, 64, 96, 2
    block = 2 * 2 * d + (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d)
    assert sum(p.numel() for p in CharGPT().parameters()) == v * d + c * d + layers * block + 2 * d == 236_352
    net = small()
    before = net(TOKENS)
    with torch.no_grad():
        net.tokens.weight.zero_()
    assert before.abs().max() > 0
    assert not net(TOKENS).any()


def test_starts_close_to_the_uniform_distribution() -> None:
    loss = nn.functional.cross_entropy(small(vocab_size=66)(TOKENS).flatten(0, 1), TOKENS.flatten())
    # logits are products of a normalized vector of 12 with weights of 0.02: standard deviation 0.07
    assert abs(loss.item() - math.log(66)) < 0.2


def test_dropout_acts_in_training_alone() -> None:
    net = small(dropout=0.5)
    assert not torch.equal(net(TOKENS), net(TOKENS))
    net.eval()
    assert torch.equal(net(TOKENS), net(TOKENS))


def test_second_derivatives_with_the_attention_written_out() -> None:
    """Hessian times vector against the difference of two gradients."""
    net = small().double()
    parameters = list(net.parameters())
    vector = [torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(1)) for p in parameters]

    def gradients(create_graph: bool = False) -> list[Tensor]:
        loss = nn.functional.cross_entropy(net(TOKENS).flatten(0, 1), TOKENS.flatten())
        return list(torch.autograd.grad(loss, parameters, create_graph=create_graph))

    with sdpa_kernel(SDPBackend.MATH):
        inner = sum((g * v).sum() for g, v in zip(gradients(create_graph=True), vector, strict=True))
        product = torch.cat([h.flatten() for h in torch.autograd.grad(inner, parameters)])
        step, sides = 1e-5, []
        for sign in (1, -2):  # from 0 to +step, then to -step
            with torch.no_grad():
                for p, v in zip(parameters, vector, strict=True):
                    p.add_(v, alpha=sign * step)
            sides.append(torch.cat([g.flatten() for g in gradients()]))
    difference = (sides[0] - sides[1]) / (2 * step)
    # central differences err by step^2 times the third derivative, of order 100 to 1000 times the second here
    assert (product - difference).norm() < 1e-5 * product.norm()


def test_an_input_that_is_too_long() -> None:
    with pytest.raises(ValueError, match="the input has 9 tokens, more than context=8"):
        small()(torch.zeros(1, 9, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "value"), [*((n, 0) for n in ("vocab_size", "context", "width", "depth", "heads")), ("dropout", 1.0)]
)
def test_a_wrong_value_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be "):
        small(**{name: value})


def test_heads_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width must be a multiple of heads=5, got 12"):
        small(heads=5)
