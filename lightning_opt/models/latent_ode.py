import math

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from lightning_opt._checks import check_interval
from lightning_opt.ode import NeuralODE
from lightning_opt.registry import register

from .time_dependent_mlp import TimeDependentMLP


@register("module", summary="Latent ODE: a variational autoencoder of irregular time series", paper="1907.03907")
class LatentODE(pl.LightningModule):
    r"""A variational autoencoder of irregularly observed series, whose latent state follows a neural ODE.

    A recurrent network (GRU) reads the observations of a series backward in time, each with its mask and the gap to
    the one read before, and gives mean and variance of the latent state at the first time. A neural ODE carries a draw
    from it through all times, and a linear layer reads the channels. The loss is the negative evidence lower bound,

    .. math:: \sum_{observed} -\log N(x; \hat x, \sigma^2) + w_k\, KL(q(z_0) \| N(0, 1)), \quad
        w_k = \max(0, 1 - 0.99^{k - kl\_start}),

    at step k, over the number of places of the grid. Evaluation and prediction take the mean instead of a draw.

    It defines no optimizer and takes no learning rate. Batches are ``(times, values, observed)``: ``[B, T]``, all rows
    the same and increasing, ``[B, T, C]`` and bool ``[B, T, C]``, as :class:`lightning_opt.data.CoupledOscillators`
    gives them. Draws depend on ``seed``, the step and the rank alone: no global random state is used.

    Logs ``train/loss`` and ``train/kl`` by step; ``val/loss``, ``val/mse`` (of observed values), ``val/nfe`` (function
    evaluations of a batch) by epoch, and the same of ``test``. Prediction gives the channels ``[B, T, C]`` at all
    times.

    Source: Rubanova, Chen, Duvenaud (arXiv 1907.03907), with the encoder, likelihood and annealing that arXiv
    2303.02262 trains on Physionet.

    Args:
        channels: Channels of a series.
        latent: Size of the latent state.
        encoder_hidden: Size of the recurrent network's state.
        hidden: Widths of the hidden layers of the dynamics.
        sigma: Standard deviation of an observation.
        kl_start: Step at which the weight of the divergence begins to grow.
        method: Solver, as :class:`lightning_opt.ode.NeuralODE` takes it.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        adjoint: Get gradients from the adjoint equation instead of from the solver's steps.
        seed: Seed of the draws.

    Raises:
        ValueError: If a number is out of its range; in a step, if the rows of ``times`` differ.

    Example:
        >>> from lightning_opt.data import CoupledOscillators
        >>> data = CoupledOscillators(train_size=10, test_size=5, num_times=6)
        >>> data.setup()
        >>> LatentODE(channels=4, latent=3).eval().predict_step(next(iter(data.test_dataloader()))).shape
        torch.Size([5, 6, 4])
    """

    def __init__(
        self,
        channels: int,
        latent: int = 8,
        encoder_hidden: int = 32,
        hidden: tuple[int, ...] = (32,),
        *,
        sigma: float = 0.05,
        kl_start: int = 100,
        method: str = "tsit5",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        adjoint: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, size in {"channels": channels, "latent": latent, "encoder_hidden": encoder_hidden}.items():
            check_interval(name, size, 1)
        check_interval("sigma", sigma, 0, closed="()")
        check_interval("kl_start", kl_start, 0)
        check_interval("seed", seed, 0)
        self.encoder = nn.GRU(2 * channels + 1, encoder_hidden, batch_first=True)
        self.to_posterior = nn.Linear(encoder_hidden, 2 * latent)
        self.ode = NeuralODE(TimeDependentMLP(latent, hidden), method=method, rtol=rtol, atol=atol, adjoint=adjoint)
        self.decoder = nn.Linear(latent, channels)
        self.sigma, self.kl_start, self.seed = sigma, kl_start, seed

    def encode(self, times: Tensor, values: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance, ``[B, latent]`` each, of the latent state at the first time."""
        gaps = times.diff(dim=1, append=times[:, -1:])
        mask = observed.to(values)
        inputs = torch.cat([values * mask, mask, gaps.to(values)[..., None]], dim=-1)
        states, _ = self.encoder(inputs.flip(1))
        mean, log_variance = self.to_posterior(states[:, -1]).chunk(2, dim=-1)
        return mean, log_variance

    def decode(self, start: Tensor, times: Tensor) -> Tensor:
        """Channels ``[B, T, C]`` at times ``[T]`` from the latent state ``[B, latent]`` at the first of them."""
        return self.decoder(self.ode(start, times=times)).transpose(0, 1)

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Channels ``[B, T, C]`` at all times of a batch, from the mean of the latent state."""
        times, values, observed = batch
        return self.decode(self.encode(times, values, observed)[0], shared_times(times))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Negative evidence lower bound of a batch, mean over its series."""
        times, values, observed = batch
        mean, log_variance = self.encode(times, values, observed)
        noise = torch.randn(mean.shape, generator=self._generator(batch_idx), dtype=mean.dtype, device=mean.device)
        start = mean + (0.5 * log_variance).exp() * noise
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)
        loss = self._misfit(self.decode(start, shared_times(times)), values, observed)
        loss = loss + self.kl_weight() * divergence.mean() / values[0].numel()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(values))
        self.log("train/kl", divergence.mean(), batch_size=len(values))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        """Loss, squared error and function evaluations of a batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        """Loss, squared error and function evaluations of a batch."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Channels ``[B, T, C]`` at all times of a batch, observed or not."""
        return self(batch)

    def kl_weight(self) -> float:
        """The weight of the divergence at this step."""
        return max(0.0, 1 - 0.99 ** (self.global_step - self.kl_start))

    def _evaluate(self, batch: tuple[Tensor, Tensor, Tensor], stage: str) -> None:
        _, values, observed = batch
        channels, series = self(batch), len(values)
        error = (channels - values).square()[observed].mean()
        assert self.ode.last_solve is not None
        nfe = float(self.ode.last_solve.nfe_forward)
        self.log(f"{stage}/loss", self._misfit(channels, values, observed), batch_size=series, sync_dist=True)
        self.log(f"{stage}/mse", error, prog_bar=True, batch_size=int(observed.sum()), sync_dist=True)
        self.log(f"{stage}/nfe", nfe, batch_size=series, sync_dist=True)

    def _misfit(self, channels: Tensor, values: Tensor, observed: Tensor) -> Tensor:
        """Negative log-likelihood of the observed values over the number of places of the grid."""
        squares = ((channels - values) / self.sigma).square()
        terms = 0.5 * (squares + math.log(2 * math.pi * self.sigma**2))
        return torch.where(observed, terms, 0.0).mean()

    def _generator(self, batch_idx: int) -> torch.Generator:
        """Noise that depends on the seed, the place in the run and the rank alone, so that a resume repeats it."""
        key = (self.seed, self.global_rank, self.global_step, batch_idx)
        words = np.random.SeedSequence(key).generate_state(1, np.uint64)
        return torch.Generator(self.device).manual_seed(int(words[0] >> 1))


def shared_times(times: Tensor) -> Tensor:
    """The one grid ``[T]`` of the times ``[B, T]`` of a batch; ``ValueError`` where rows differ."""
    if not (times == times[0]).all():
        raise ValueError("times must be the same for all series of a batch; mark what is missing in observed")
    return times[0]
