import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from diffusers import SchedulerMixin  # noqa: F401  # diffusers looks for it here when it loads a pipeline
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

from ._log_state_scheduler import Generator, LogStateScheduler
from ._schedule_place import whole
from .log_stepping import log_step
from .parametrization import PredictionType, wide
from .reverse import SAMPLERS, reverse_step
from .time_grid import Spacing, noise_levels

AMBIENT_FLOOR = 1e-4


@dataclass
class GBMSchedulerOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: The next log state.
        pred_original_sample: The denoised logarithm, E[log x0], as predicted at this step.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class _Step(NamedTuple):
    """Coefficients of one network call.

    The increment of the logarithm is ``pull * (denoised - log_x) + shift + noise * standard_normal``; with ``ito``, of
    ``ambient``, 1 + ``ito`` + that is the factor of x. ``ahead``, of ``multistep``, says how far ``denoised`` is moved
    on in the direction it came from.
    """

    pull: float
    shift: float
    noise: float
    ito: float = 0.0
    ahead: float = 0.0


class _Preset(NamedTuple):
    step: float
    inner_steps: int
    noise_anneal: float


# The fit of the log-normal start by the authors, (mean, standard deviation), and their step sizes.
_START: dict[str, tuple[Any, Any]] = {
    "mnist": (0.15651744604110718, 0.8352777361869812),
    "fashion_mnist": (0.27712640166282654, 0.8428290486335754),
    "kmnist": (0.2140171080827713, 0.8290426135063171),
    "cifar10": ([0.4075, 0.3785, 0.3693], [0.8016, 0.8004, 0.8005]),
}
_PRESETS: dict[tuple[str, str], _Preset] = {
    ("mnist", "dale"): _Preset(0.0006165454545454547, 1, 0.995),
    ("mnist", "ambient"): _Preset(0.000143844988828766, 4, 0.995),
    ("fashion_mnist", "dale"): _Preset(0.0005862727272727274, 1, 0.995),
    ("kmnist", "dale"): _Preset(0.00021131578947368424, 3, 0.995),
    ("kmnist", "ambient"): _Preset(0.00021131578947368424, 3, 1.0),
    ("cifar10", "dale"): _Preset(0.00011421052631578947, 6, 0.9995),
    ("cifar10", "ambient"): _Preset(0.000143844988828766, 5, 0.9995),
}
_PAPER_SIGMA, _PAPER_STEPS = 0.8, 1000


@register(
    "tool", summary="Samplers of the multiplicative diffusion model, as a diffusers scheduler", paper="2510.02730"
)
class GBMScheduler(LogStateScheduler):
    r"""Samples the multiplicative diffusion model: noise that multiplies, positive data, no clipping.

    The sample in the loop is the logarithm :math:`y = \log x` of the positive image, so that its exponential is taken
    once, at the end, by :meth:`to_images`. Start from :meth:`sample_prior`, and call the network on
    ``scale_model_input(sample, t)`` and ``t``. From the time t down to s, with the noise :math:`\varepsilon` that the
    network predicts, :math:`\Delta v = v(t) - v(s)` and :math:`\Delta m = m(t) - m(s)`, a step is

    ============= ======================================================================================================
    sampler       step
    ============= ======================================================================================================
    ``dale``      :math:`y - \Delta m - (\Delta v / \rho_t)\,\varepsilon + \sqrt{\Delta v}\,Z`: the paper's
    ``ambient``   :math:`y + \log(1 - \Delta m + \Delta v / 2 - (\Delta v / \rho_t)\,\varepsilon + \sqrt{\Delta v}\,Z)`
    ``exp_euler`` :math:`y - \Delta m - 2 (\rho_t - \rho_s)\,\varepsilon + \sqrt{\Delta v}\,Z`
    ``ode``       :math:`y - \Delta m - (\rho_t - \rho_s)\,\varepsilon`: deterministic
    ``multistep`` :math:`m_s + k\,(y - m_t) + (1 - k)\,\hat D + \rho_s \sqrt{1 - k}\,Z`, :math:`k = \rho_s^2 / \rho_t^2`
    ============= ======================================================================================================

    ``ambient`` is the paper's unconstrained rule. Its factor may fall to zero or below in large steps: it is kept at
    1e-4 or more, and :attr:`num_nonpositive` counts the entries that were not positive. ``multistep`` carries the
    denoised logarithm D of the step before on to the middle of this one, :math:`\hat D = D + (D - D_{before})\,h / 2
    h_{before}` with :math:`h = \log \rho_t / \rho_s`: the second-order stochastic solver of DPM-Solver++, in the
    logarithm, and the one to take for few steps. The others are of first order.

    Args:
        num_train_timesteps: Scale of the timesteps of ``prediction_type="stein"``.
        sigma: Volatility, positive.
        mu: Drift; None is ``sigma**2 / 2``.
        sigma_schedule: ``"constant"`` or ``"geometric"``, see :class:`GeometricBrownianMotion`.
        rho_min: Smallest noise level at which the network is called.
        rho_max: Largest noise level; None is ``sigma``. At 0.8, the paper's, noised images still differ from the prior;
            at 4 and above they are forgotten.
        sampler: One of the above.
        prediction_type: What the network predicts, see :class:`Parametrization`.
        log_mean: Mean of log x0, from :func:`log_moments`, or a list with one for each channel.
        log_std: Standard deviation of log x0, positive, or a list.
        to_positive: ``"shift"``, ``"exp"`` or ``"identity"``, see :class:`DataMap`.
        shift: Of the map ``"shift"``.
        exp_scale: Of the map ``"exp"``.
        clip_sample: Whether :meth:`to_images` clamps to [0, 1].
        timestep_spacing: ``"t"``, ``"rho"`` or ``"log"``, see :func:`noise_levels`.
        spacing_order: Its order; the default, ``"t"`` and 2, is the quadratic grid, better than the uniform one, of
            order 1, where steps are few.
        denoise_final: Whether the last step gives the denoised logarithm; otherwise it is a step of the sampler to time
            0, like any other.
        step_scale: Factor of every time step, with the network called at the same times.
        inner_steps: Network calls at each time, each followed by a step.
        noise_anneal: The noise of the i-th time (from 0) is multiplied by this power i.
        fused: Whether a step is one pass over memory with the noise drawn in the kernel (:func:`log_step`), where there
            is one for the device and dtype: quicker for large batches on a CPU, and one launch on a GPU. A seed then
            gives one noise on every device, but another than without. Not for ``ambient`` and ``multistep``; a list of
            generators draws by torch.

    Raises:
        ValueError: If a value is out of its range. From ``step``: if ``set_timesteps`` was not called, the timestep is
            not the one that is due, or the network's output has another shape than the sample or is not finite.

    Cost: With noise 6 passes over the sample beside drawing it, or with ``fused`` one and the check that it is finite.
    A GPU is waited for once, behind the last step, where that check is read.

    Source: arXiv:2510.02730 (``dale``, ``ambient``); arXiv:2211.01095, SDE-DPM-Solver++(2M) (``multistep``);
    ``exp_euler``, ``ode`` and the grids are ours.

    Example:
        >>> import torch
        >>> scheduler = GBMScheduler(sampler="ode", prediction_type="epsilon")
        >>> scheduler.set_timesteps(4)
        >>> generator = torch.Generator().manual_seed(0)
        >>> noise = torch.randn(2, 1, 8, 8, generator=generator)
        >>> sample = scheduler.to_log(torch.full((2, 1, 8, 8), 0.25)) + 0.8 * noise
        >>> for t in scheduler.timesteps:
        ...     sample = scheduler.step(noise, t, sample).prev_sample
        >>> round(scheduler.to_images(sample).mean().item(), 4)
        0.25
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        sigma: float = 0.8,
        mu: float | None = None,
        sigma_schedule: Literal["constant", "geometric"] = "constant",
        rho_min: float = 0.01,
        rho_max: float | None = None,
        sampler: Literal["dale", "ambient", "exp_euler", "ode", "multistep"] = "dale",
        prediction_type: PredictionType = "edm",
        log_mean: float | list[float] = 0.0,
        log_std: float | list[float] = 1.0,
        to_positive: Literal["shift", "exp", "identity"] = "shift",
        shift: float = 1.0,
        exp_scale: float = 0.35,
        clip_sample: bool = True,
        timestep_spacing: Spacing = "t",
        spacing_order: float = 2.0,
        denoise_final: bool = True,
        step_scale: float = 1.0,
        inner_steps: int = 1,
        noise_anneal: float = 1.0,
        fused: bool = False,
    ) -> None:
        check_choice("sampler", sampler, (*SAMPLERS, "multistep"))
        check_interval("step_scale", step_scale, 0, closed="()")
        check_interval("noise_anneal", noise_anneal, 0, 1)
        check_choice("fused", fused, (False, True))
        if fused and sampler in ("ambient", "multistep"):
            raise ValueError(f"fused must be False with sampler={sampler!r}, got True")
        if sampler == "multistep":
            for name, value in (("step_scale", step_scale), ("inner_steps", inner_steps)):
                if value != 1:
                    raise ValueError(f"{name} must be 1 with sampler='multistep', got {value}")
        self.order = whole("inner_steps", inner_steps)
        self._configure()
        self._num_nonpositive: Tensor | int = 0
        self._cached_moments: tuple[Any, tuple[Any, Any]] | None = None

    @classmethod
    def paper(
        cls,
        dataset: Literal["mnist", "fashion_mnist", "kmnist", "cifar10"],
        sampler: Literal["dale", "ambient"] = "dale",
        **changes: Any,
    ) -> "GBMScheduler":
        """The authors' setting for one of their datasets: call ``set_timesteps(1000)`` and start from the prior.

        The Stein score, a constant volatility of 0.8, a uniform grid, and the step size, the number of steps at each
        time and the decay of the noise that the authors tuned. The start is their fit; give the ``log_mean`` and
        ``log_std`` of :func:`log_moments` to compute it. Their last step goes to time 0 with noise, and so does this.

        The authors' code calls the network from index 999 down to 0, an index which it never trains; here it is called
        from 1000 down to 1.

        Args:
            dataset: Name.
            sampler: ``"dale"`` or ``"ambient"``; the latter not for Fashion-MNIST, where the authors' step of 1.5e-3,
                three times at each of a thousand times, is four times the length of the process.
            **changes: Values that differ.

        Raises:
            ValueError: If there is no such setting.

        Source: The sampling configurations of the authors' repository, Madhavaprasath23/Dale-Meets-Langevin.

        Example:
            >>> GBMScheduler.paper("kmnist").config.inner_steps
            3
        """
        check_choice("dataset", dataset, _START)
        known = [name for data, name in _PRESETS if data == dataset]
        check_choice(f"sampler of {dataset!r}", sampler, known)
        preset = _PRESETS[dataset, sampler]
        mean, std = _START[dataset]
        own = [(s**2 - _PAPER_SIGMA**2) ** 0.5 for s in (std if isinstance(std, list) else [std])]
        settings: dict[str, Any] = {
            "num_train_timesteps": _PAPER_STEPS,
            "sigma": _PAPER_SIGMA,
            "rho_min": _PAPER_SIGMA * _PAPER_STEPS**-0.5,  # the time 1 / 1000
            "sampler": sampler,
            "prediction_type": "stein",
            "log_mean": mean,
            "log_std": own if isinstance(std, list) else own[0],
            "timestep_spacing": "t",
            "spacing_order": 1.0,
            "denoise_final": False,
            "step_scale": preset.step * _PAPER_STEPS,
            "inner_steps": preset.inner_steps,
            "noise_anneal": preset.noise_anneal,
        }
        return cls(**{**settings, **changes})

    @property
    def num_nonpositive(self) -> int:
        """How often ``ambient`` met a factor that is not positive, since ``set_timesteps``."""
        return int(self._num_nonpositive)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose the schedule.

        Args:
            num_inference_steps: Times at which the network is called (``inner_steps`` times each).
            device: Where the timesteps are to be.
            sigmas: Noise levels in place of the grid of the config, decreasing; a last 0 may be left out.

        Raises:
            ValueError: If not exactly one of the two is given, or they are not as said.
        """
        if (num_inference_steps is None) == (sigmas is None):
            raise ValueError(f"give num_inference_steps or sigmas, got {num_inference_steps} and {sigmas}")
        c = self.config
        if sigmas is None:
            count = whole("num_inference_steps", num_inference_steps)
            rhos = noise_levels(self.process, count, c.timestep_spacing, c.spacing_order)
        else:
            rhos = [float(rho) for rho in sigmas]
            rhos += [] if rhos[-1:] == [0.0] else [0.0]
            if len(rhos) < 2 or not (rhos[0] < math.inf and all(a > b for a, b in itertools.pairwise(rhos))):
                raise ValueError(f"sigmas must be positive, finite and decrease, got {list(sigmas)}")
        self.sigmas = torch.tensor(rhos, dtype=torch.float32)
        self._begin([rho for rho in rhos[:-1] for _ in range(self.order)], device)
        self._steps = [
            self._coefficients(i, rho, next_rho, rhos[i - 1] if i else math.inf)
            for i, (rho, next_rho) in enumerate(itertools.pairwise(rhos))
            for _ in range(self.order)
        ]
        if not self.parametrization.per_channel:
            p = self.parametrization
            self._denoisers = [self._denoiser(i, p.log_mean, p.log_std) for i in range(len(self._steps))]
        if c.denoise_final:
            self._steps[-1] = _Step(1.0, 0.0, 0.0)
        self._recent: dict[int, Tensor] = {}
        self._num_nonpositive = 0

    def _coefficients(self, index: int, rho: float, next_rho: float, rho_before: float) -> _Step:
        c = self.config
        t, s = self.process.time(rho), self.process.time(next_rho)
        if c.sampler == "multistep":
            kept = (next_rho / rho) ** 2
            shift = self.process.mean_shift(s) - kept * self.process.mean_shift(t)
            ahead = 0.5 * math.log(rho / next_rho) / math.log(rho_before / rho) if next_rho > 0 else 0.0
            return _Step(1 - kept, shift, next_rho * math.sqrt(1 - kept) * c.noise_anneal**index, ahead=ahead)
        step = reverse_step(self.process, c.sampler, t, s, c.step_scale)
        pull = -step.epsilon / rho  # epsilon = (y - m - denoised) / rho
        ito = 0.5 * step.noise**2 if c.sampler == "ambient" else 0.0
        return _Step(pull, step.shift + pull * self.process.mean_shift(t), step.noise * c.noise_anneal**index, ito)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> GBMSchedulerOutput | tuple[Tensor, Tensor]:
        """Go from one time to the next.

        Args:
            model_output: The network's output for ``scale_model_input(sample, timestep)``, of the shape of ``sample``.
            timestep: The entry of ``timesteps`` that is due.
            sample: Log states. The result has their dtype; half precision is computed in float32.
            generator: A generator, or one for each sample; None is torch's own, as in diffusers.
            return_dict: Whether to return an object rather than a tuple of its two entries.

        Raises:
            ValueError: See the class.
        """
        index = self._place(model_output, timestep, sample)
        if self.config.fused:
            next_log_x, denoised = self._fused_step(model_output, sample, index, generator)
        else:
            next_log_x, denoised = self._unfused_step(model_output, sample, index, generator)
        self._advance(index, next_log_x, model_output, sample)
        if not return_dict:
            return next_log_x, denoised
        return GBMSchedulerOutput(next_log_x, denoised)

    def _unfused_step(
        self, model_output: Tensor, sample: Tensor, index: int, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        step = self._steps[index]
        log_x = sample if sample.dtype in (torch.float32, torch.float64) else sample.float()
        denoised = self._denoised(model_output.to(log_x.dtype), log_x, index)
        next_log_x = torch.lerp(log_x, self._ahead(denoised, index), step.pull)
        if step.shift:
            next_log_x.add_(step.shift)
        if step.noise:
            next_log_x.add_(_standard_normal(log_x, generator), alpha=step.noise)
        if step.ito:
            factor = torch.sub(next_log_x, log_x).add_(1 + step.ito)
            if factor.device.type != "cpu" or factor.min() < AMBIENT_FLOOR:
                self._num_nonpositive = self._num_nonpositive + (factor <= 0).sum()
                factor.clamp_(min=AMBIENT_FLOOR)
            next_log_x = factor.log().add_(log_x)
        if log_x.dtype != sample.dtype:
            return next_log_x.to(sample.dtype), denoised.to(sample.dtype)
        return next_log_x, denoised

    def _ahead(self, denoised: Tensor, index: int) -> Tensor:
        """Where the denoised logarithm will be in the middle of the step, by that of the step before."""
        if self.config.sampler != "multistep":
            return denoised
        before = self._recent.get(index - 1)  # None at the first step, and where a run begins later
        self._recent = {key: value for key, value in self._recent.items() if key == index - 1}
        self._recent[index] = denoised.clone()  # what is returned may be changed
        if before is None or not self._steps[index].ahead:
            return denoised
        if before.shape != denoised.shape or before.dtype != denoised.dtype:
            raise ValueError(
                f"the sample is {denoised.dtype} of the shape {tuple(denoised.shape)}, but that of the step before was"
                f" {before.dtype} of {tuple(before.shape)}; call set_timesteps to begin with another batch"
            )
        return torch.lerp(before, denoised, 1 + self._steps[index].ahead)

    def _fused_step(
        self, model_output: Tensor, sample: Tensor, index: int, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        step, noise = self._steps[index], None
        if step.noise:
            noise = _standard_normal(sample, generator) if isinstance(generator, list) else _own(generator, sample)
        if self.parametrization.prediction_type == "stein":
            model_output = model_output.to(wide(sample.dtype)) * sample.to(wide(sample.dtype)).exp()
        if self.parametrization.per_channel:
            skip, gain, constant = self._denoiser(index, *(_row(m) for m in self._moments(sample)))
        else:
            skip, gain, constant = self._denoisers[index]
        return log_step(
            sample,
            model_output,
            noise,
            skip=skip,
            gain=gain,
            constant=constant,
            pull=step.pull,
            shift=step.shift,
            scale=step.noise,
        )

    def _denoised(self, model_output: Tensor, log_x: Tensor, index: int) -> Tensor:
        """The denoised logarithm that the output stands for."""
        if self.parametrization.prediction_type == "stein":
            model_output = model_output * log_x.exp()
        if self.parametrization.per_channel:
            skip, out, constant = self._denoiser(index, *self._moments(log_x))
            return skip * log_x + out * model_output + constant
        skip, out, constant = self._denoisers[index]
        denoised = log_x * skip if skip != 1 else log_x
        denoised = torch.add(denoised, model_output, alpha=out)
        return denoised.add_(constant) if constant else denoised

    def _denoiser(self, index: int, mean: Any, std: Any) -> tuple[Any, Any, Any]:
        """The denoised logarithm as ``skip * log_x + out * output + constant``."""
        mean_shift, rho = self._levels[index]
        state, output, constant = self.parametrization.affine(mean_shift, rho, mean, std)
        return 1 - rho * state, -rho * output, -mean_shift - rho * constant

    def _moments(self, log_x: Tensor) -> tuple[Any, Any]:
        """The moments of the channels, kept on the device."""
        key = (log_x.device, log_x.dtype, log_x.ndim)
        if self._cached_moments is None or self._cached_moments[0] != key:
            self._cached_moments = key, self.parametrization.moments(log_x)
        return self._cached_moments[1]


def _standard_normal(like: Tensor, generator: Generator) -> Tensor:
    """Noise of the shape, dtype and device of a tensor."""
    if isinstance(generator, torch.Generator) and generator.device == like.device:
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def _own(generator: torch.Generator | None, like: Tensor) -> torch.Generator:
    """The generator, or torch's own of the device of a tensor."""
    if generator is not None:
        return generator
    return torch.default_generator if like.device.type == "cpu" else torch.cuda.default_generators[like.device.index]


def _row(moment: float | Tensor) -> float | Tensor:
    """A moment of each channel with a first dimension for the samples."""
    return moment[None] if isinstance(moment, Tensor) else moment
