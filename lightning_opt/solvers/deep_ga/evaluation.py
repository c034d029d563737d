"""Evaluating many copies of one module at once."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_opt._checks import check_choice

from .weights import unflatten

Step = Callable[[nn.Module], Any]
Vectorize = Literal["auto", "always", "never"]


class PopulationEvaluator:
    """Calls a function of a module for every set of weights, by ``torch.vmap`` where that is possible.

    Args:
        module: Whose trainable parameters are replaced; behind each call it has its own again.
        vectorize: ``"always"`` raises where vmap fails; ``"auto"`` falls back to a loop, for good, and says so once.

    Raises:
        ValueError: If ``vectorize`` is none of these.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> evaluate = PopulationEvaluator(net)
        >>> evaluate(torch.zeros(5, 8), lambda net: net(torch.ones(4, 3))).shape
        torch.Size([5, 4, 2])
    """

    def __init__(self, module: nn.Module, vectorize: Vectorize = "auto") -> None:
        check_choice("vectorize", vectorize, ("auto", "always", "never"))
        self.module = module
        self.vectorize = vectorize
        self.vectorized = vectorize != "never"

    @torch.no_grad()
    def __call__(self, weights: Tensor, step: Step) -> Any:
        """The results of ``step(module)`` for weights ``[n, P]``: each tensor in them gains a first dimension of n.

        Random numbers that ``step`` draws are the same for all.
        """
        parameters = {f"module.{name}": value for name, value in unflatten(self.module, weights).items()}
        wrapped = _Step(self.module, step)
        if self.vectorized:
            random_state = torch.get_rng_state()
            try:
                return torch.vmap(partial(torch.func.functional_call, wrapped), randomness="same")(parameters, ())
            except Exception as error:
                if self.vectorize == "always":
                    raise
                self.vectorized = False
                torch.set_rng_state(random_state)
                warnings.warn(
                    f"{type(self.module).__name__} is evaluated one individual after the other, because torch.vmap fails"
                    f" ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})",
                    stacklevel=2,
                )
        random_state = torch.get_rng_state()
        results = []
        for i in range(len(weights)):
            torch.set_rng_state(random_state)  # the same random numbers for all
            results.append(torch.func.functional_call(wrapped, {name: value[i] for name, value in parameters.items()}))
        return _stacked(results)


class _Step(nn.Module):
    """Lets ``functional_call`` call any function of a module."""

    def __init__(self, module: nn.Module, step: Step) -> None:
        super().__init__()
        self.module = module
        self.step = step

    def forward(self) -> Any:
        return self.step(self.module)


def _stacked(results: list[Any]) -> Any:
    first = results[0]
    if isinstance(first, Mapping):
        return {key: _stacked([result[key] for result in results]) for key in first}
    if isinstance(first, tuple | list):
        return type(first)(map(_stacked, map(list, zip(*results, strict=True))))
    return torch.stack([torch.as_tensor(result) for result in results])
