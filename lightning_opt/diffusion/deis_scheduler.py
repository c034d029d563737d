import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from diffusers import (
    DDPMScheduler,
    SchedulerMixin,  # noqa: F401  # diffusers looks for it here when it loads a pipeline
)
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput
from torch import Tensor

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

from ._integrator import Plan
from ._schedule_place import SchedulePlace, whole
from .deis import ALGORITHMS, TABLEAUS, Warmup
from .noise_schedule import FlowMatching, NoiseSchedule, VarianceExploding, VariancePreserving
from .parametrization import wide
from .process import per_sample
from .time_grid import SPACINGS, Spacing, noise_levels

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction", "score")
_UNSUPPORTED = {
    "thresholding": "thresholds the prediction",
    "use_beta_sigmas": "asks for the beta grid",
    "invert_sigmas": "runs time backwards",
    "shift_terminal": "stretches the grid to a terminal level",
    "stochastic_sampling": "asks for a stochastic sampler",
    "sigma_data": "is of a model with EDM's preconditioning",
}


@register(
    "tool",
    summary="DEIS for diffusers pipelines (VP, VE, flow): tAB, rhoAB, log-rho AB, rhoRK, iPNDM",
    paper="2204.13902",
    card="deis",
)
class DEISScheduler(SchedulePlace):
    r"""Samples variance-preserving, variance-exploding and flow-matching models in few network calls.

    A drop-in for the schedulers of a diffusers pipeline: ``pipe.scheduler =
    DEISScheduler.from_config(pipe.scheduler.config)``. It has what diffusers' ``DEISMultistepScheduler`` lacks: the
    paper's polynomials in t and in rho, its Runge-Kutta methods, iPNDM and order 4. Times are floats and never repeat
    by rounding; the coefficients are exact; every network call moves the sample, the last one to the data.

    Args:
        num_train_timesteps: Times that the network was trained on.
        beta_start: First beta of VP models.
        beta_end: Last beta of VP models.
        beta_schedule: ``"linear"``, ``"scaled_linear"``, ``"squaredcos_cap_v2"`` or another of ``DDPMScheduler``.
        trained_betas: The betas themselves.
        rescale_betas_zero_snr: Rescale the betas to no signal at the last time (of which 2**-12 is left).
        prediction_type: ``"epsilon"``, ``"sample"`` (x_0), ``"v_prediction"``, ``"flow_prediction"`` (eps - x_0), or
            ``"score"`` (:math:`-\epsilon / s`, of score-SDE models).
        noise_schedule: ``"vp"``; ``"ve"``: :math:`x_0 + \sigma \epsilon`, conditioned on sigma; ``"flow"``:
            :math:`(1 - s) x_0 + s \epsilon`, conditioned on ``num_train_timesteps * s``.
        use_flow_sigmas: The same as ``noise_schedule="flow"``, by diffusers' name.
        flow_shift: Factor of the noise levels s / (1 - s) of the grid of flow models.
        use_dynamic_shifting: Take the shift from the ``mu`` of ``set_timesteps``.
        time_shift_type: The shift is ``exp(mu)`` under ``"exponential"``, ``mu`` under ``"linear"``.
        sigma_min: Smallest noise level, for VP and VE models. None is that of the first trained time; 0.01 for VE.
        sigma_max: Largest noise level. None is that of the last trained time; 80 for VE.
        deis_type: ``"t_ab"``, ``"rho_ab"``, ``"logrho_ab"``, ``"ipndm"`` or ``"rk_<name>"`` with a name of
            :data:`~lightning_opt.diffusion.deis.TABLEAUS`.
        solver_order: Order of the multistep methods, 1 to 4; the number of predictions that a step uses.
        warmup: ``"low_order"``, ``"heun"`` or ``"kutta"``, see :func:`network_calls`; the latter make a few calls more.
        lower_order_final: End with lower orders, down to 1 in the last step.
        final_sigmas_type: ``"zero"``: the last call's step ends at the data; ``"sigma_min"``: at the smallest level.
        timestep_spacing: ``"linspace"``, ``"leading"`` or ``"trailing"`` times, as in diffusers but not rounded.
        steps_offset: Added to the times of ``"leading"``.
        use_karras_sigmas: The same as ``spacing="rho"`` with the order 7.
        use_exponential_sigmas: The same as ``spacing="log"``.
        spacing: A grid in place of ``timestep_spacing``: ``"t"``, ``"rho"`` or ``"log"``, see :func:`noise_levels`.
        spacing_order: Its order.

    Raises:
        ValueError: If a value is out of its range. From ``step``: if ``set_timesteps`` was not called, the timestep is
            not the one that is due, the batch's shape changed, or the network's output has another shape than the
            sample or is not finite.

    Cost: ``solver_order`` + 3 passes over the sample; keeps ``solver_order`` predictions in float32.

    Source: arXiv:2204.13902; log-rho polynomials as in diffusers.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> scheduler = DEISScheduler.from_config(DDPMScheduler().config, deis_type="t_ab", spacing="t")
        >>> scheduler.set_timesteps(10)
        >>> sample = noise = torch.ones(2, 3)
        >>> for t in scheduler.timesteps:  # a network that finds all of the noise
        ...     sample = scheduler.step(noise, t, sample).prev_sample
        >>> bool(sample.abs().max() < 0.01)
        True
    """

    _compatibles = [
        *(e.name for e in KarrasDiffusionSchedulers),
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "ScoreSdeVeScheduler",
    ]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        noise_schedule: Literal["vp", "ve", "flow"] = "vp",
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        deis_type: str = "ipndm",
        solver_order: int = 3,
        warmup: Warmup = "low_order",
        lower_order_final: bool = True,
        final_sigmas_type: Literal["zero", "sigma_min"] = "zero",
        timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace",
        steps_offset: int = 0,
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        spacing: Spacing | None = None,
        spacing_order: float = 7.0,
    ) -> None:
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        check_choice("noise_schedule", noise_schedule, ("vp", "ve", "flow"))
        check_interval("flow_shift", flow_shift, 0, closed="()")
        check_choice("time_shift_type", time_shift_type, ("exponential", "linear"))
        check_choice("deis_type", deis_type, ALGORITHMS)
        check_interval("solver_order", solver_order, 1, 4)
        check_choice("warmup", warmup, get_args(Warmup))
        check_choice("final_sigmas_type", final_sigmas_type, ("zero", "sigma_min"))
        check_choice("timestep_spacing", timestep_spacing, ("linspace", "leading", "trailing"))
        check_choice("spacing", spacing, (None, *SPACINGS))
        check_interval("spacing_order", spacing_order, 0, closed="()")
        count = whole("num_train_timesteps", num_train_timesteps)
        if use_flow_sigmas or noise_schedule == "flow":
            self.register_to_config(noise_schedule="flow", use_flow_sigmas=True)
        self.noise: NoiseSchedule
        if self.config.noise_schedule == "flow":
            self.noise = FlowMatching(count)
        elif self.config.noise_schedule == "ve":
            self.noise = VarianceExploding(
                0.01 if sigma_min is None else sigma_min, 80.0 if sigma_max is None else sigma_max
            )
        else:
            table = DDPMScheduler(
                count, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr=rescale_betas_zero_snr
            ).alphas_cumprod  # of diffusers, in float32: these are the levels that the network was trained at
            if rescale_betas_zero_snr:
                table = table.clamp_min(2**-24)  # as diffusers' Euler sampler: a level that is not infinite
            self.noise = VariancePreserving(table, sigma_min, sigma_max)
        #: Network calls in a step: 1, or the stages of a Runge-Kutta method.
        self.order = len(TABLEAUS[deis_type.removeprefix("rk_")].weights) if deis_type.startswith("rk_") else 1
        self._no_schedule()

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Take the config of another scheduler: of a VP model, of ``ScoreSdeVeScheduler``, or of a flow-matching one.

        Args:
            config: A scheduler's ``config``.
            return_unused_kwargs: Whether to return what was not used, too.
            **kwargs: Values that differ.

        Raises:
            ValueError: If the config asks for what this scheduler cannot do.
        """
        if isinstance(config, dict) and "rho_min" in config:
            raise ValueError("the config is of multiplicative noise: GBMDEISScheduler samples from it")
        if isinstance(config, dict) and "deis_type" not in config:
            for key, what in _UNSUPPORTED.items():
                if config.get(key):
                    raise ValueError(f"the config {what} ({key}={config[key]}), which DEISScheduler cannot do")
            if config.get("timestep_type") == "continuous":
                raise ValueError("the config conditions on log sigma, which DEISScheduler cannot do")
            if "shift" in config and "beta_start" not in config:  # FlowMatchEulerDiscreteScheduler and its kin
                model = {"noise_schedule": "flow", "prediction_type": "flow_prediction", "flow_shift": config["shift"]}
                kwargs = model | kwargs
            elif "correct_steps" in config:  # ScoreSdeVeScheduler
                levels = {key: config[key] for key in ("sigma_min", "sigma_max")}
                kwargs = {"noise_schedule": "ve", "prediction_type": "score"} | levels | kwargs
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # --- noise ---

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise to start from."""
        return self.noise.largest_rho if self.config.noise_schedule == "ve" else 1.0

    def rho_at(self, timesteps: Any) -> Any:
        """The noise level, noise over signal, of a timestep, a float or a tensor."""
        return self.noise.rho(timesteps)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noised samples.

        Args:
            original_samples: x_0.
            noise: Standard normal, of the same shape.
            timesteps: One for all, or one for each sample.
        """
        dtype = wide(original_samples.dtype)
        rho = per_sample(self.noise.rho(timesteps.to(original_samples.device, dtype)), original_samples)
        noised = self.noise.signal(rho) * (original_samples.to(dtype) + rho * noise.to(original_samples.device, dtype))
        return noised.to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """:meth:`add_noise` by the name that the pipelines of flow models call."""
        return self.add_noise(sample, noise, timestep)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the network reads: the sample itself."""
        return sample

    # --- sampling ---

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Choose the schedule, and forget the predictions of a run before.

        Args:
            num_inference_steps: Steps. Network calls are ``len(timesteps)``: ``order`` times as many, and a few more
                with another ``warmup`` than the default.
            device: Where the timesteps are to be.
            sigmas: Levels of the steps in place of the grid, decreasing, in the meaning of diffusers: noise over signal
                for VP and VE models, s for flow models (before the shift). A last 0 may be left out.
            mu: The shift, with ``use_dynamic_shifting``.
            timesteps: Times of the steps in place of the grid, decreasing.

        Raises:
            ValueError: If it is not said how many steps, or twice and differently, there are fewer than the solver's
                order, or levels do not decrease.
        """
        c = self.config
        if sigmas is not None and timesteps is not None:
            raise ValueError("give sigmas or timesteps, not both")
        own = sigmas if sigmas is not None else timesteps
        if own is None and num_inference_steps is None:
            raise ValueError("give num_inference_steps, sigmas or timesteps")
        if own is not None and num_inference_steps not in (None, len(own)):
            raise ValueError(f"num_inference_steps is {num_inference_steps}, but there are {len(own)} levels")
        if c.use_dynamic_shifting and mu is None and c.noise_schedule == "flow":
            raise ValueError("mu must be given with use_dynamic_shifting=True")
        if sigmas is not None:
            rho = self._closed([self._rho_of_sigma(float(sigma)) for sigma in sigmas if sigma > 0])
        elif timesteps is not None:
            rho = self._closed([self.noise.rho(float(t)) for t in timesteps])
        else:
            rho = self._grid(whole("num_inference_steps", num_inference_steps))
        levels = torch.tensor(rho, dtype=torch.float64) * self._shift(mu)
        self._plan = Plan(
            levels,
            scale=self.noise.signal,
            shift=_zero,
            algorithm=c.deis_type,
            order=c.solver_order,
            warmup=c.warmup,
            lower_order_final=c.lower_order_final,
            denoise=c.final_sigmas_type == "zero",
            time=self.noise.time,
        )
        calls = self._plan.calls
        self._affine = [self._epsilon_of(call.rho) for call in calls]
        self._take_schedule([self.noise.time(call.rho) for call in calls], device)
        sigmas = [call.rho for call in calls] + [calls[-1].rho_next]
        self.sigmas = torch.tensor([self._sigma_of_rho(rho) for rho in sigmas], dtype=torch.float32)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Go on behind a network call.

        Args:
            model_output: The network's output, of the shape of ``sample``.
            timestep: The entry of ``timesteps`` that is due. A run whose first call is at a later one begins there,
                with no predictions yet, as does one after ``set_begin_index``.
            sample: The sample at this call. The result has its dtype; half precision is computed in float32.
            generator: Of no effect: the sampler is deterministic.
            return_dict: Whether to return an object rather than a tuple of its entry.

        Raises:
            ValueError: See the class.
        """
        if self._step_index is None and self._begin_index is None and self.num_inference_steps is not None:
            self._begin_index = self._first_call_at(timestep)
        index = self._place(model_output, timestep, sample)
        if self._step_index is None:
            self._first, self._integrator = index, self._plan.begin(index)
        x, output = sample.to(wide(sample.dtype)), model_output.to(wide(sample.dtype))
        state, scale = self._affine[index]
        epsilon = torch.mul(output, scale)  # a copy in any case: a compiled network may write its next output over this
        if state:
            epsilon.add_(x, alpha=state)
        prev_sample = self._integrator.update(index - self._first, x, epsilon).to(sample.dtype)
        self._advance(index, prev_sample, model_output, sample)
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def _first_call_at(self, timestep: float | Tensor) -> int | None:
        """The place of the first stage at a timestep; None where none is."""
        if self._is_due(timestep):
            return 0
        firsts = [i for i, call in enumerate(self._plan.calls) if call.stage == 0]
        return next((i for i in firsts if abs(self._timestep_list[i] - float(timestep)) <= 1e-3), None)

    def _epsilon_of(self, rho: float) -> tuple[float, float]:
        """The noise as ``first * sample + second * output``."""
        signal = self.noise.signal(rho)
        noise, norm = signal * rho, signal * math.hypot(1, rho)
        return {
            "epsilon": (0.0, 1.0),
            "score": (0.0, -noise),
            "sample": (1 / noise, -1 / rho),
            "v_prediction": (noise / norm**2, signal / norm),  # of the sample scaled to norm 1
            "flow_prediction": (1 / (signal + noise), signal / (signal + noise)),
        }[self.config.prediction_type]

    # --- the grid ---

    def _grid(self, count: int) -> list[float]:
        """Levels of N + 1 points, down to the smallest."""
        c = self.config
        spacing, order = c.spacing, c.spacing_order
        if spacing is None:
            if c.use_karras_sigmas:
                spacing, order = "rho", 7.0
            elif c.use_exponential_sigmas:
                spacing = "log"
            elif c.noise_schedule == "ve":
                spacing = "rho"
            elif c.timestep_spacing != "leading":  # linspace and trailing differ by rounding alone
                spacing, order = "t", 1.0
        if spacing is not None:
            return noise_levels(self.noise, count + 1, spacing, order)[:-1]
        stride = c.num_train_timesteps / (count + 1)
        return self._closed([self.noise.rho(i * stride + c.steps_offset) for i in range(count, 0, -1)])

    def _closed(self, levels: list[float]) -> list[float]:
        """Levels of N points, and the smallest; half of the last where that is not smaller."""
        return [*levels, self.noise.rho_min if self.noise.rho_min < levels[-1] else levels[-1] / 2]

    def _shift(self, mu: float | None) -> float:
        c = self.config
        if c.noise_schedule != "flow":
            return 1.0
        if not c.use_dynamic_shifting or mu is None:
            return c.flow_shift
        return math.exp(mu) if c.time_shift_type == "exponential" else mu

    def _rho_of_sigma(self, sigma: float) -> float:
        if self.config.noise_schedule != "flow":
            return sigma
        return min(sigma / (1 - sigma), self.noise.largest_rho) if sigma < 1 else self.noise.largest_rho

    def _sigma_of_rho(self, rho: float) -> float:
        return rho / (1 + rho) if self.config.noise_schedule == "flow" else rho


def _zero(rho: float) -> float:
    return 0.0
