import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ._schedule_place import SchedulePlace, whole
from .data_map import DataMap
from .parametrization import Parametrization, preconditioning, wide
from .process import GeometricBrownianMotion, per_sample
from .time_grid import noise_levels

Generator = torch.Generator | list[torch.Generator] | None


def check_multiplicative(scheduler: Any) -> None:
    """Raise ValueError unless a scheduler is one of the multiplicative model."""
    if not isinstance(scheduler, LogStateScheduler):
        raise ValueError(
            f"scheduler must be a GBMScheduler or a GBMDEISScheduler, for noise that multiplies, got"
            f" a {type(scheduler).__name__}"
        )


class LogStateScheduler(SchedulePlace):
    """What the schedulers of the multiplicative model share: the log state, the timesteps, and the place in a schedule.

    A timestep is the number that the network is conditioned on: ``125 log(rho) + 600`` for a noise level rho, which is
    from 24 to 773 for rho from 0.01 to 4, or ``num_train_timesteps * t / t_end`` for ``prediction_type="stein"``, the
    paper's. Timesteps are floats, and a schedule is followed by position: they may repeat.

    A subclass calls :meth:`_configure` in its constructor, :meth:`_begin` in ``set_timesteps``, and :meth:`_place` and
    :meth:`_advance` at the ends of ``step``.
    """

    _compatibles = ["GBMScheduler", "GBMDEISScheduler"]

    process: GeometricBrownianMotion
    parametrization: Parametrization
    data_map: DataMap

    def _configure(self) -> None:
        """Build the mathematics from the registered config, and check it."""
        c = self.config
        self._num_train_timesteps = whole("num_train_timesteps", c.num_train_timesteps)
        self.process = GeometricBrownianMotion(c.sigma, c.mu, c.sigma_schedule, c.rho_min, c.rho_max)
        self.parametrization = Parametrization(c.prediction_type, c.log_mean, c.log_std)
        self.data_map = DataMap(c.to_positive, c.shift, c.exp_scale, c.clip_sample)
        noise_levels(self.process, 1, c.timestep_spacing, c.spacing_order)
        self._no_schedule()

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        rooms = importlib.import_module("lightning_opt.diffusion")
        return [getattr(rooms, name) for name in {cls.__name__, *cls._compatibles} if hasattr(rooms, name)]

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Take the config of another scheduler of the multiplicative model.

        Args:
            config: A scheduler's ``config``.
            return_unused_kwargs: Whether to return what was not used, too.
            **kwargs: Values that differ.

        Raises:
            ValueError: If it is the config of a scheduler of added noise, whose network this one cannot sample with.
        """
        own = {"sigma", "mu", "rho_min", "rho_max", "to_positive", "log_mean"}  # an older config may lack some
        if isinstance(config, dict) and "num_train_timesteps" in config and own.isdisjoint(config):
            raise ValueError(f"{cls.__name__} samples from multiplicative noise, and the config is of added noise")
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def __len__(self) -> int:
        return self._num_train_timesteps

    # --- data ---

    def to_log(self, images: Tensor) -> Tensor:
        """The log state of clean images.

        Raises:
            ValueError: If an image is outside the range of the data map.
        """
        return self.data_map.to_log(images)

    def to_images(self, log_state: Tensor) -> Tensor:
        """Images of log states, clamped to their range if ``clip_sample``."""
        return self.data_map.to_images(log_state)

    # --- timesteps and noise levels ---

    def timestep_at(self, rho: Any) -> Any:
        """The timestep of a noise level, a float or a tensor."""
        if self.parametrization.prediction_type == "stein":
            return self.process.time(rho) * (self._num_train_timesteps / self.process.t_end)
        return 125.0 * (rho.log() if isinstance(rho, Tensor) else math.log(rho)) + 600.0

    def rho_at(self, timesteps: Any) -> Any:
        """The noise level of a timestep, a float or a tensor."""
        if self.parametrization.prediction_type == "stein":
            return self.process.rho(timesteps * (self.process.t_end / self._num_train_timesteps))
        exponent = (timesteps - 600.0) / 125.0
        return exponent.exp() if isinstance(exponent, Tensor) else math.exp(exponent)

    def _level(self, timestep: float | Tensor, like: Tensor) -> tuple[Any, Any]:
        """Mean shift and noise level at timesteps, in the dtype to compute in, broadcasting over a batch."""
        if isinstance(timestep, Tensor):
            timestep = per_sample(timestep.to(like.device, wide(like.dtype)), like)
        rho = self.rho_at(timestep)
        return self.process.mean_shift(self.process.time(rho)), rho

    # --- forward ---

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the prior; :meth:`sample_prior` also has its mean."""
        return max(std for _, std in self._prior())

    def _prior(self) -> list[tuple[float, float]]:
        """Mean and standard deviation of the log state at the last time, of each channel or of all."""
        p = self.parametrization
        means, stds = (list(m) if isinstance(m, Sequence) else [m] for m in (p.log_mean, p.log_std))
        count = max(len(means), len(stds))
        shift, rho = self.process.mean_shift(self.process.t_end), self.process.largest_rho
        return [
            (mean + shift, math.hypot(std, rho))
            for mean, std in zip(means * (count // len(means)), stds * (count // len(stds)), strict=True)
        ]

    def sample_prior(
        self,
        shape: Sequence[int],
        generator: Generator = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Log states at the last time: normal, with the moments of the data's logarithms after all the noise.

        Args:
            shape: Batch, channels, and so on.
            generator: A generator, or one for each sample; None is torch's own, as in diffusers.
            device: Where to.
            dtype: torch's default dtype if None.
        """
        device = torch.device(device or "cpu")
        dtype = dtype or torch.get_default_dtype()
        noise = randn_tensor(tuple(shape), generator=generator, device=device, dtype=wide(dtype))
        mean, std = (torch.tensor(m, device=device, dtype=noise.dtype) for m in zip(*self._prior(), strict=True))
        if len(mean) > 1:
            if len(shape) < 2 or shape[1] != len(mean):
                raise ValueError(f"the moments have {len(mean)} channels, but the shape is {tuple(shape)}")
            mean, std = (m.view(-1, *(1,) * (len(shape) - 2)) for m in (mean, std))
        return (mean + std * noise).to(dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        """Log states at timesteps, ``log_x0 + m + rho * noise``.

        Args:
            original_samples: log x0, from :meth:`to_log`.
            noise: Standard normal, of the same shape.
            timesteps: One for all, or one for each sample.
        """
        mean_shift, rho = self._level(timesteps, original_samples)
        dtype = wide(original_samples.dtype)
        noised = original_samples.to(dtype) + mean_shift + rho * noise.to(original_samples.device, dtype)
        return noised.to(original_samples.dtype)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """What the network reads at a timestep; see :class:`Parametrization`.

        Args:
            sample: Log states.
            timestep: One for all, or one for each sample; None is the timestep that is due.

        Raises:
            ValueError: If no timestep is given and ``set_timesteps`` was not called.
        """
        if timestep is not None and not self._is_due(timestep):
            return self.parametrization.network_input(sample, *self._level(timestep, sample))
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before, or give a timestep")
        index = self._due_index()
        if self._inputs and sample.dtype in (torch.float32, torch.float64):
            offset, scale = self._inputs[index]
            return torch.sub(sample, offset).mul_(scale)
        return self.parametrization.network_input(sample, *self._levels[index])

    def _begin(self, rhos: Sequence[float], device: torch.device | str | None) -> None:
        """Take a schedule: the noise levels of all network calls."""
        times = [self.process.time(rho) for rho in rhos]
        self._levels = [(self.process.mean_shift(t), rho) for t, rho in zip(times, rhos, strict=True)]
        self._take_schedule([self.timestep_at(rho) for rho in rhos], device)
        # what a network reads of a log state, as (log_x - offset) * scale with numbers, where it is that
        self._inputs: list[tuple[float, Any]] = []
        mean, std = self.parametrization.log_mean, self.parametrization.log_std
        if not (isinstance(mean, Sequence) or isinstance(std, Sequence) or self.config.prediction_type == "stein"):
            self._inputs = [(shift + mean, preconditioning(rho, std).c_in) for shift, rho in self._levels]
