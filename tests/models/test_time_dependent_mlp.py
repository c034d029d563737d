import pytest
import torch
from torch import Tensor, nn

from lightning_opt.models import TimeDependentMLP


def by_concatenation(net: TimeDependentMLP, t: Tensor, y: Tensor) -> Tensor:
    """The time as one more column before every layer."""
    for number, layer in enumerate(net.layers):
        assert isinstance(layer, nn.Linear)
        y = layer(torch.cat([y.tanh() if number else y, t.expand(len(y))[:, None]], dim=1))
    return y


@pytest.mark.parametrize("hidden", [(), (7,), (7, 5)])
@pytest.mark.parametrize("t", [torch.tensor(0.3), torch.tensor([0.0, 0.5, -1.0, 2.0])], ids=["one time", "a time each"])
def test_reads_the_time_before_every_layer(hidden: tuple[int, ...], t: Tensor) -> None:
    net = TimeDependentMLP(3, hidden).double()
    y = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # sums of at most 8 terms of order 1
    torch.testing.assert_close(net(t, y), by_concatenation(net, t.double(), y), rtol=1e-12, atol=1e-12)
    shapes = [(layer.in_features, layer.out_features) for layer in net.layers]
    widths = [3, *hidden, 3]
    assert shapes == [(a + 1, b) for a, b in zip(widths, widths[1:], strict=False)]


@pytest.mark.parametrize(("name", "value"), [("features", 0), ("hidden", (4, 0))])
def test_a_wrong_value_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be "):
        TimeDependentMLP(**{"features": 3, name: value})
