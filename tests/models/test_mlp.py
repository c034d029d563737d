import pytest
import torch
from torch import nn

from lightning_opt.models import MLP


def test_computes_linear_layers_with_relu_between() -> None:
    net = MLP(in_features=6, hidden=(5, 4), num_classes=3).double()
    images = torch.randn(7, 1, 2, 3, dtype=torch.float64)
    (w1, b1), (w2, b2), (w3, b3) = ((m.weight, m.bias) for m in net.modules() if isinstance(m, nn.Linear))
    expected = images.view(7, 6) @ w1.T + b1
    expected = expected.clamp(min=0) @ w2.T + b2
    expected = expected.clamp(min=0) @ w3.T + b3
    torch.testing.assert_close(net(images), expected, rtol=1e-12, atol=1e-12)  # sums of at most 6 terms of order 1
    assert (expected.detach() < 0).any()  # the output has no ReLU


@pytest.mark.parametrize(
    ("hidden", "parameters"),
    [((), 784 * 10 + 10), ((256, 128), 784 * 256 + 256 + 256 * 128 + 128 + 128 * 10 + 10)],
)
def test_has_the_widths_asked_for(hidden: tuple[int, ...], parameters: int) -> None:
    assert sum(p.numel() for p in MLP(hidden=hidden).parameters()) == parameters


def test_dropout_acts_on_every_hidden_layer_in_training_alone() -> None:
    net = MLP(in_features=4, hidden=(3, 3), dropout=0.5)
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    images = torch.randn(50, 4)
    assert not torch.equal(net(images), net(images))
    net.eval()
    assert torch.equal(net(images), net(images))


@pytest.mark.parametrize(
    ("name", "value"),
    [("in_features", 0), ("hidden", (8, 0)), ("num_classes", 0), ("dropout", 1.0), ("dropout", -0.1)],
)
def test_a_wrong_value_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be "):
        MLP(**{name: value})
