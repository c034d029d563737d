"""What can go wrong with a curvature product."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor


class NonFiniteCurvatureError(ArithmeticError):
    """A product with the operator holds NaN or infinity, so nothing can be computed from it."""


class NotTwiceDifferentiableError(RuntimeError):
    """The loss has a gradient, but autograd cannot differentiate that gradient."""


# what torch says where a backward function has no derivative: compiled graphs, fused kernels, custom functions, cuDNN
_SIGNS = ("double backward", "derivative for", "once_differentiable", "differentiate twice", "donated buffers")


_ADVICE = (
    "Use the module without torch.compile, switch fused kernels off (cuDNN's recurrent layers with "
    "torch.backends.cudnn.flags(enabled=False)), or pass method='finite_difference', which needs gradients only."
)


@contextmanager
def differentiating_twice() -> Iterator[None]:
    """Say what to do where torch says only that a derivative does not exist."""
    try:
        yield
    except NotTwiceDifferentiableError:
        raise
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in _SIGNS):
            raise
        raise NotTwiceDifferentiableError(
            f"autograd cannot differentiate the gradient of this loss ({str(error).splitlines()[0]}). {_ADVICE}"
        ) from error


def check_twice_differentiable(gradients: Iterable[Tensor | None]) -> None:
    """Raise if a graph of gradients went through a function marked ``once_differentiable``.

    The marker puts an error into the graph that no search for the parameters passes, so that autograd would silently
    leave the function's curvature out.

    Cost:
        A walk over the graph, some microseconds a node.
    """
    stack = [g.grad_fn for g in gradients if g is not None and g.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node.name().endswith("Error"):
            raise NotTwiceDifferentiableError(
                f"a function in this loss is marked once_differentiable: its gradient has no derivative. {_ADVICE}"
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
