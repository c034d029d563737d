"""What can go wrong with a curvature product."""

from collections.abc import Iterator
from contextlib import contextmanager


class NonFiniteCurvatureError(ArithmeticError):
    """A product with the operator holds NaN or infinity, so nothing can be computed from it."""


class NotTwiceDifferentiableError(RuntimeError):
    """The loss has a gradient, but autograd cannot differentiate that gradient."""


# what torch says where a backward function has no derivative: compiled graphs, fused kernels, custom functions, cuDNN
_SIGNS = ("double backward", "derivative for", "once_differentiable", "differentiate twice")


@contextmanager
def differentiating_twice() -> Iterator[None]:
    """Say what to do where torch says only that a derivative does not exist."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in _SIGNS):
            raise
        raise NotTwiceDifferentiableError(
            f"autograd cannot differentiate the gradient of this loss ({str(error).splitlines()[0]}). "
            "Use the module without torch.compile, switch fused kernels off (cuDNN's recurrent layers with "
            "torch.backends.cudnn.flags(enabled=False)), or pass method='finite_difference', "
            "which needs gradients only."
        ) from error
