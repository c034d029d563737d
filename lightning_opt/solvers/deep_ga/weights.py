"""The trainable parameters of a module as one vector, and of a population as one matrix."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that evolve, by name; those with ``requires_grad=False`` do not.

    Raises:
        ValueError: If there are none.
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(f"{type(module).__name__} has no trainable parameters")
    return parameters


def flatten(module: nn.Module | dict[str, nn.Parameter]) -> Tensor:
    """The trainable parameters, or those of a dict, as a new vector ``[P]``: float32, or float64 if one of them is.

    Example:
        >>> flatten(nn.Linear(3, 2)).shape
        torch.Size([8])
    """
    parameters = list((trainable(module) if isinstance(module, nn.Module) else module).values())
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
    return torch.cat([p.detach().flatten().to(dtype) for p in parameters])


@torch.no_grad()
def write(module: nn.Module, weights: Tensor) -> None:
    """Copy a vector ``[P]`` into the trainable parameters.

    Raises:
        ValueError: If it has another number of weights.
    """
    for name, value in unflatten(module, weights[None]).items():
        module.get_parameter(name).copy_(value[0])


def unflatten(module: nn.Module, weights: Tensor) -> dict[str, Tensor]:
    """The parameters of a population, each ``[n, *shape]`` and in its own dtype.

    Args:
        module: Gives names, shapes and dtypes.
        weights: ``[n, P]``.

    Raises:
        ValueError: If P is not the number of the module's trainable weights.

    Example:
        >>> {name: list(p.shape) for name, p in unflatten(nn.Linear(3, 2), torch.zeros(5, 8)).items()}
        {'weight': [5, 2, 3], 'bias': [5, 2]}
    """
    parameters = trainable(module)
    sizes = [p.numel() for p in parameters.values()]
    if weights.shape[1] != sum(sizes):
        raise ValueError(f"{type(module).__name__} has {sum(sizes)} trainable weights, got {weights.shape[1]}")
    parts = weights.split(sizes, dim=1)
    return {
        name: part.reshape(len(weights), *p.shape).to(p.dtype)
        for (name, p), part in zip(parameters.items(), parts, strict=True)
    }


def call_each(module: nn.Module, weights: Tensor, *inputs: Any) -> Any:
    """What a module returns with each of several vectors of weights, on the same inputs, at once.

    Args:
        module: Its own weights are left alone.
        weights: ``[n, P]``.
        inputs: What it is called with.

    Returns:
        Its outputs, each tensor with a first dimension of n. Random numbers are the same for all n.

    Raises:
        RuntimeError: If ``torch.vmap`` cannot run the module, for example because it looks at values.

    Example:
        >>> call_each(nn.Linear(3, 2), torch.zeros(5, 8), torch.ones(4, 3)).shape
        torch.Size([5, 4, 2])
    """
    each = torch.vmap(partial(torch.func.functional_call, module), in_dims=(0, None), randomness="same")
    return each(unflatten(module, weights), inputs)
