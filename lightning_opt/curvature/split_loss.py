"""A loss in two parts, the network's outputs and what the loss makes of them, as a Gauss-Newton matrix needs it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ._errors import NonFiniteCurvatureError

Forward = Callable[[Any], tuple[Tensor, Any]]
OutputLoss = Callable[[Tensor, Any], Tensor]


def split_at_outputs(module: nn.Module, loss: Callable[[Any], Tensor]) -> tuple[Forward, OutputLoss]:
    """Divide a loss that calls a module once at the outputs of the module.

    Nothing about the loss need be known: it runs once with the module's ``forward`` watched, and once with ``forward``
    giving the outputs at hand. What the loss computes from parameters beside the outputs, such as a penalty, is not
    part of the Gauss-Newton matrix.

    Args:
        module: It returns a tensor, and is called as ``module(...)`` or ``module.forward(...)``.
        loss: Maps a micro-batch to the mean loss of its samples, a scalar.

    Returns:
        ``forward`` and ``loss`` of :class:`GGNOperator`. The first raises ``ValueError`` if the loss calls the module
        not exactly once, or the module returns no tensor; and :class:`NonFiniteCurvatureError` for a loss that is not
        finite and calls it never.

    Cost:
        The part of the loss behind the outputs is evaluated twice.

    Example:
        >>> import torch
        >>> from lightning_opt.curvature import GGNOperator, split_at_outputs
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> forward, loss = split_at_outputs(net, lambda batch: ((net(batch[0]) - batch[1]) ** 2).mean() / 2)
        >>> GGNOperator(forward, loss, net.parameters(), [(x, y)]).to_dense()
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])
    """

    def forward(batch: Any) -> tuple[Tensor, Any]:
        plain, outputs = module.forward, []

        def watched(*args: Any, **kwargs: Any) -> Any:
            outputs.append(plain(*args, **kwargs))
            return outputs[-1]

        with _forward_is(module, watched):
            value = loss(batch)
        name = type(module).__name__
        if not outputs and not bool(value.isfinite().all()):
            raise NonFiniteCurvatureError("the loss is not finite, and there are no outputs")
        if len(outputs) != 1:
            raise ValueError(
                f"the loss must call {name} once, as a function of its inputs, it called it {len(outputs)} times: what"
                " the outputs are is not known"
            )
        if not isinstance(outputs[0], Tensor):
            raise ValueError(f"{name} must return a tensor of outputs, got {type(outputs[0]).__name__}")
        return outputs[0], batch

    def output_loss(outputs: Tensor, batch: Any) -> Tensor:
        with _forward_is(module, lambda *args, **kwargs: outputs):
            return loss(batch)

    return forward, output_loss


@contextlib.contextmanager
def _forward_is(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    attributes = vars(module)
    before = {name: attributes[name] for name in ("forward",) if name in attributes}  # compiled modules have their own
    attributes["forward"] = function
    try:
        yield
    finally:
        attributes.pop("forward", None)
        attributes.update(before)
