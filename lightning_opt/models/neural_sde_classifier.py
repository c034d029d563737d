from typing import Literal

from torch import Tensor, nn

from lightning_opt._checks import check_interval
from lightning_opt.ode import NeuralSDE
from lightning_opt.registry import register

from ._autonomous import Autonomous
from .classifier import Classifier


@register("module", summary="Image classification by a neural SDE", paper="2303.02262")
class NeuralSDEClassifier(Classifier):
    """A classifier that maps an image linearly to the start of a neural SDE; a linear layer reads its final state.

    The drift is a perceptron with one hidden layer, tanh after both layers; the diffusion is diagonal, and its diagonal
    is linear in the whole state. It is the network of the paper's MNIST neural SDE (32 entries of state, 64 hidden),
    integrated over times from 0 to 1. It defines no optimizer and takes no learning rate. Batches, and what is logged,
    are those of :class:`Classifier`; ``val/nfe`` and ``test/nfe`` are the evaluations of the drift for a batch, which
    is solved with one step size for all its images.

    Every training step draws new noise; evaluation has the same noise every time, so that its results repeat.

    Args:
        in_features: Values of an image, C * H * W.
        dim: Entries of the state.
        hidden: Width of the hidden layer of the drift.
        num_classes: Number of classes.
        sde_type: How the stochastic integral is meant, ``"ito"`` or ``"stratonovich"``.
        method: Solver, as :class:`lightning_opt.ode.NeuralSDE` takes it.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        dt: Size of the first step.
        adjoint: Get gradients from the stochastic adjoint instead of from the solver's steps.
        label_smoothing: Share of a label that is spread evenly over all classes, in training only.
        seed: Of the noise.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> import torch
        >>> model = NeuralSDEClassifier(in_features=64).eval()
        >>> model(torch.zeros(5, 1, 8, 8)).shape, model.sde.last_solve.nfe_forward > 2
        (torch.Size([5, 10]), True)
    """

    def __init__(
        self,
        in_features: int = 784,
        dim: int = 32,
        hidden: int = 64,
        num_classes: int = 10,
        *,
        sde_type: Literal["ito", "stratonovich"] = "ito",
        method: str | None = None,
        rtol: float = 1e-2,
        atol: float = 1e-2,
        dt: float = 0.2,
        adjoint: bool = False,
        label_smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:
        for name, size in {"in_features": in_features, "dim": dim, "hidden": hidden}.items():
            check_interval(name, size, 1)
        drift = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, dim), nn.Tanh())
        sde = NeuralSDE(
            Autonomous(drift),
            Autonomous(nn.Linear(dim, dim)),
            sde_type=sde_type,
            method=method,
            rtol=rtol,
            atol=atol,
            dt=dt,
            adjoint=adjoint,
            seed=seed,
        )
        net = nn.Sequential(nn.Flatten(), nn.Linear(in_features, dim), sde, nn.Linear(dim, num_classes))
        super().__init__(net, num_classes, label_smoothing)

    @property
    def sde(self) -> NeuralSDE:
        """The neural SDE; its ``last_solve`` tells evaluations and steps."""
        return self.net[2]  # type: ignore[index, return-value]

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Loss, accuracy and evaluations of a batch."""
        super().validation_step(batch)
        self._log_evaluations("val", len(batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Loss, accuracy and evaluations of a batch."""
        super().test_step(batch)
        self._log_evaluations("test", len(batch[1]))

    def _log_evaluations(self, stage: str, images: int) -> None:
        assert self.sde.last_solve is not None
        evaluations = float(self.sde.last_solve.nfe_forward)
        self.log(f"{stage}/nfe", evaluations, batch_size=images, sync_dist=True)
