from torch import Tensor, nn

from lightning_opt._checks import check_interval
from lightning_opt.ode import NeuralODE
from lightning_opt.registry import register

from .classifier import Classifier
from .time_dependent_mlp import TimeDependentMLP


@register("module", summary="Image classification by a neural ODE", paper="2303.02262")
class NeuralODEClassifier(Classifier):
    """A classifier whose flattened image is the initial state of a neural ODE; a linear layer reads its final state.

    The dynamics are a :class:`TimeDependentMLP`, integrated over times from 0 to 1. It defines no optimizer and takes
    no learning rate. Batches, and what is logged, are those of :class:`Classifier`; ``val/nfe`` and ``test/nfe`` are
    the function evaluations of a batch, which is solved with one step size for all its images.

    Tolerances below about 1e-6 need ``Trainer(precision="64-true")``: in float32 the error estimate is rounding noise.

    Args:
        in_features: Values of an image, C * H * W.
        hidden: Widths of the hidden layers of the dynamics.
        num_classes: Number of classes.
        pool: Average over squares of this many pixels a side first; the state has ``in_features / pool ** 2`` values.
        method: Solver, as :class:`lightning_opt.ode.NeuralODE` takes it.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        adjoint: Get gradients from the adjoint equation instead of from the solver's steps.
        label_smoothing: Share of a label that is spread evenly over all classes, in training only.

    Raises:
        ValueError: If a number is out of its range, or ``pool ** 2`` does not divide ``in_features``.

    Example:
        >>> import torch
        >>> model = NeuralODEClassifier(in_features=64, hidden=(16,)).eval()
        >>> model(torch.zeros(5, 1, 8, 8)).shape, model.ode.last_solve.nfe_forward >= 8
        (torch.Size([5, 10]), True)
    """

    def __init__(
        self,
        in_features: int = 784,
        hidden: tuple[int, ...] = (100,),
        num_classes: int = 10,
        *,
        pool: int = 1,
        method: str = "tsit5",
        rtol: float = 1e-6,
        atol: float = 1e-6,
        adjoint: bool = False,
        label_smoothing: float = 0.0,
    ) -> None:
        check_interval("pool", pool, 1)
        check_interval("in_features", in_features, 1)
        if in_features % pool**2:
            raise ValueError(f"pool must be such that its square divides in_features={in_features}, got {pool}")
        features = in_features // pool**2
        ode = NeuralODE(TimeDependentMLP(features, hidden), method=method, rtol=rtol, atol=atol, adjoint=adjoint)
        pooling = nn.AvgPool2d(pool) if pool > 1 else nn.Identity()
        super().__init__(
            nn.Sequential(pooling, nn.Flatten(), ode, nn.Linear(features, num_classes)), num_classes, label_smoothing
        )

    @property
    def ode(self) -> NeuralODE:
        """The neural ODE; its ``last_solve`` tells evaluations and steps."""
        return self.net[2]  # type: ignore[index, return-value]

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Loss, accuracy and function evaluations of a batch."""
        super().validation_step(batch)
        self._log_evaluations("val", len(batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Loss, accuracy and function evaluations of a batch."""
        super().test_step(batch)
        self._log_evaluations("test", len(batch[1]))

    def _log_evaluations(self, stage: str, images: int) -> None:
        assert self.ode.last_solve is not None
        evaluations = float(self.ode.last_solve.nfe_forward)
        self.log(f"{stage}/nfe", evaluations, batch_size=images, sync_dist=True)
