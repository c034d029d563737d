"""Initialisation and parameter groups for networks under Dale's law (Shetty et al., 2025, arXiv:2510.02730)."""

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_opt._checks import check_interval


def lognormal_init_(
    module: nn.Module,
    mean_std_ratio: float = 1.5,
    gain: str | float = "relu",
    mode: Literal["fan_in", "fan_out"] = "fan_out",
    skip: Sequence[str] = (),
    generator: torch.Generator | None = None,
) -> nn.Module:
    r"""Draw the weights of a network from a log-normal distribution with random signs, in place.

    Magnitudes have standard deviation :math:`\mathrm{gain} / \sqrt{\mathrm{fan}\,(1 + r^2)}` and mean r times that,
    so the variance with signs is :math:`\mathrm{gain}^2 / \mathrm{fan}`, as Kaiming initialisation has it.

    Args:
        module: Its parameters of two or more dimensions are drawn anew; biases and norms are left alone.
        mean_std_ratio: r, positive: mean over standard deviation of the magnitudes.
        gain: A number, or a nonlinearity as in ``torch.nn.init.calculate_gain``.
        mode: Which fan to use.
        skip: Names of parameters or modules to leave alone, for example the last layer.
        generator: Source of random numbers; None is torch's global one.

    Returns:
        The module.

    Example:
        >>> layer = lognormal_init_(nn.Linear(400, 300), generator=torch.Generator().manual_seed(0))
        >>> round((layer.weight.var() / (2 / 300)).item(), 1)
        1.0
    """
    check_interval("mean_std_ratio", mean_std_ratio, 0.0, closed="(]")
    scale = nn.init.calculate_gain(cast(Any, gain)) if isinstance(gain, str) else gain
    for name, p in module.named_parameters():
        if p.ndim < 2 or any(name == s or name.startswith(s + ".") for s in skip):
            continue
        fan = nn.init._calculate_correct_fan(p, mode)
        std = scale / math.sqrt(fan) / math.sqrt(1 + mean_std_ratio**2)
        sigma = math.sqrt(math.log1p(mean_std_ratio**-2))
        mu = math.log(mean_std_ratio * std) - sigma**2 / 2
        with torch.no_grad():
            p.log_normal_(mu, sigma, generator=generator)
            p.mul_(torch.randint(0, 2, p.shape, generator=generator, device=p.device).mul_(2).sub_(1))
    return module


def split_bias_(module: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    r"""Replace every bias by the sum of a positive and a negative part, in place.

    So sign-preserving steps can train a bias that must change its sign.
    The parts are drawn from U(0, B) and U(-B, 0) with :math:`B = \sqrt{2 / \mathrm{fan\_in}}`, or 1.4e-4 for
    normalization layers; they are the parameters ``parametrizations.bias.original0`` and ``original1`` of the layer.

    Args:
        module: Any module.
        generator: Source of random numbers; None is torch's global one.

    Returns:
        The module.

    Example:
        >>> layer = split_bias_(nn.Linear(3, 2))
        >>> bool((layer.parametrizations.bias.original0 >= 0).all())
        True
    """
    for layer in list(module.modules()):
        bias = getattr(layer, "bias", None)
        if isinstance(bias, nn.Parameter):
            weight = getattr(layer, "weight", None)
            fan_in = weight[0].numel() if isinstance(weight, Tensor) and weight.ndim > 1 else 1e8
            bound = math.sqrt(2 / fan_in)
            parametrize.register_parametrization(layer, "bias", _Split(bound, generator))
    return module


def eg_param_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups for the exponentiated optimizers: multiplicative weights, additive biases and norms.

    A multiplicative step can never move an exact zero, so parameters that are zero throughout are additive, and so
    are all of fewer than two dimensions but the parts of a bias that :func:`split_bias_` has split.

    Args:
        module: Any module; parameters that do not require gradients are left out.

    Returns:
        One or two groups of named parameters; the additive one has ``additive=True`` and no weight decay.

    Example:
        >>> [[name for name, _ in group["params"]] for group in eg_param_groups(nn.Linear(3, 2))]
        [['weight'], ['bias']]
    """
    multiplicative: list[tuple[str, nn.Parameter]] = []
    additive: list[tuple[str, nn.Parameter]] = []
    for name, p in module.named_parameters():
        if p.requires_grad:
            grows = (p.ndim > 1 or ".bias.original" in name) and bool(p.any())
            (multiplicative if grows else additive).append((name, p))
    groups: list[dict[str, Any]] = [
        {"params": multiplicative, "additive": False},
        {"params": additive, "additive": True, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class _Split(nn.Module):
    """A bias as the sum of a positive and a negative part."""

    def __init__(self, bound: float, generator: torch.Generator | None) -> None:
        super().__init__()
        self._draw = (bound, generator)

    def forward(self, positive: Tensor, negative: Tensor) -> Tensor:
        return positive + negative

    def right_inverse(self, bias: Tensor) -> tuple[Tensor, Tensor]:
        bound, generator = self._draw
        self._draw = (bound, None)  # a generator can be neither copied nor pickled
        positive = torch.empty_like(bias).uniform_(0, bound, generator=generator)
        negative = torch.empty_like(bias).uniform_(-bound, 0, generator=generator)
        return positive, negative
