from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_opt._checks import check_interval

from .weights import flatten, trainable


def fan_in_init(
    module: nn.Module | dict[str, nn.Parameter], std: float = 1.0, output_std: float = 0.1
) -> Callable[[int], Tensor]:
    """The paper's initial weights of a module, as a function of a seed.

    A tensor of two or more dimensions is ``N(0, 1) * std / sqrt(fan_in)``, where ``fan_in`` is the product of all its
    dimensions but the first. The last of them in the order of the module, the output layer, takes ``output_std``.
    Biases are 0. Other vectors, such as the scales of a normalization, keep the values that the module has.

    Source: the authors' code for arXiv:1712.06567 (its Atari networks).

    Args:
        module: Its trainable parameters, or those of a dict by name, give names and shapes.
        std: Scale of hidden layers.
        output_std: Scale of the output layer.

    Returns:
        A function from a seed to weights ``[P]``, as :func:`decode` takes it.

    Raises:
        ValueError: If a scale is not positive, or the module has nothing to train.

    Example:
        >>> init = fan_in_init(nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 10)))
        >>> weights = init(0)
        >>> abs(weights[:5000].std() * 10 - 1).item() < 0.1, weights[5000:5050].abs().sum().item()
        (True, 0.0)
    """
    check_interval("std", std, 0, closed="()")
    check_interval("output_std", output_std, 0, closed="()")
    parameters = trainable(module) if isinstance(module, nn.Module) else module
    given = flatten(parameters).cpu()
    device = next(iter(parameters.values())).device
    matrices = [name for name, p in parameters.items() if p.ndim >= 2]
    parts: list[tuple[str, int, float]] = []
    for name, p in parameters.items():
        scale = (output_std if matrices[-1:] == [name] else std) / max(p[0].numel(), 1) ** 0.5 if p.ndim >= 2 else 0.0
        parts.append((name, p.numel(), scale))

    def init(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        weights = given.clone()
        for part, (name, size, scale) in zip(weights.split([size for _, size, _ in parts]), parts, strict=True):
            if scale:
                part.copy_(torch.randn(size, dtype=given.dtype, generator=generator).mul_(scale))
            elif "bias" in name.rpartition(".")[2]:
                part.zero_()
        return weights.to(device)

    return init
