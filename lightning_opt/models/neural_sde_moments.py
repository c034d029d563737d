from typing import Literal

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_opt._checks import check_interval
from lightning_opt.ode import NeuralSDE
from lightning_opt.registry import register

from ._autonomous import Autonomous


@register("module", summary="A neural SDE fitted to the moments of trajectories", paper="2303.02262")
class NeuralSDEMoments(pl.LightningModule):
    """Fits a neural SDE to trajectories by the method of moments: means and variances at every time are to agree.

    A batch is ``(times, trajectories)``, ``[B, T]``, the same times in each row, and ``[B, T, dim]``. As many
    trajectories are drawn from the model, from the same starts. The loss is the mean over batch-wide times and entries
    of the squared difference of means plus that of variances. The drift is a perceptron of the cubes of the state, with
    one hidden layer and tanh; the diffusion is diagonal, and its diagonal is linear in the state: the network of the
    SciML spiral example.

    It defines no optimizer and takes no learning rate. Logs ``train/loss`` by step; ``val/...`` and ``test/...`` by
    epoch: ``loss``; ``moment_error``, the root mean square of the differences of means and of standard deviations, in
    units of the state; and ``nfe``, the evaluations of the drift. Prediction gives trajectories of the model.

    Every training step draws new noise; evaluation has the same noise every time, so that its results repeat.

    Args:
        dim: Entries of the state.
        hidden: Width of the hidden layer of the drift.
        sde_type: How the stochastic integral is meant, ``"ito"`` or ``"stratonovich"``.
        method: Solver, as :class:`lightning_opt.ode.NeuralSDE` takes it.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        dt: Size of the first step.
        adjoint: Get gradients from the stochastic adjoint instead of from the solver's steps.
        seed: Of the noise.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> import torch
        >>> model = NeuralSDEMoments().eval()
        >>> batch = torch.linspace(0, 1, 4).expand(5, 4), torch.ones(5, 4, 2)
        >>> model.predict_step(batch).shape
        torch.Size([5, 4, 2])
    """

    def __init__(
        self,
        dim: int = 2,
        hidden: int = 50,
        *,
        sde_type: Literal["ito", "stratonovich"] = "ito",
        method: str | None = None,
        rtol: float = 1e-2,
        atol: float = 1e-2,
        dt: float = 0.05,
        adjoint: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_interval("dim", dim, 1)
        check_interval("hidden", hidden, 1)
        drift = nn.Sequential(_Cubes(), nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, dim))
        self.sde = NeuralSDE(
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

    def forward(self, starts: Tensor, times: Tensor) -> Tensor:
        """Trajectories ``[B, T, dim]`` from states ``[B, dim]`` at times ``[T]``."""
        return self.sde(starts, times).transpose(0, 1)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The moment loss of a batch."""
        loss, _ = self._compare(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Loss, moment error and evaluations of a batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Loss, moment error and evaluations of a batch."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Trajectories of the model from the starts of a batch."""
        times, trajectories = batch
        return self(trajectories[:, 0], times[0])

    def _compare(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        times, trajectories = batch
        drawn = self(trajectories[:, 0], times[0])
        means = (drawn.mean(dim=0) - trajectories.mean(dim=0))[1:]  # the start is given
        variances = (drawn.var(dim=0) - trajectories.var(dim=0))[1:]
        deviations = (drawn.std(dim=0) - trajectories.std(dim=0))[1:]
        error = ((means.square() + deviations.square()) / 2).mean().sqrt()
        return means.square().mean() + variances.square().mean(), error.detach()

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        loss, error = self._compare(batch)
        assert self.sde.last_solve is not None
        values = {"loss": loss, "moment_error": error, "nfe": float(self.sde.last_solve.nfe_forward)}
        for name, value in values.items():
            self.log(f"{stage}/{name}", value, batch_size=len(batch[0]), sync_dist=True)


class _Cubes(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return y**3
