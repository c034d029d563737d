import functools
from typing import Any, Literal, get_args

import torch
from diffusers import SchedulerMixin  # noqa: F401  # diffusers looks for it here when it loads a pipeline
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from lightning_opt._checks import check_choice, check_interval
from lightning_opt.registry import register

from ._integrator import Plan
from ._log_state_scheduler import Generator, LogStateScheduler
from ._schedule_place import whole
from .deis import ALGORITHMS, TABLEAUS, Warmup
from .gbm_scheduler import GBMSchedulerOutput
from .parametrization import PredictionType, wide
from .process import GeometricBrownianMotion
from .time_grid import Spacing, noise_levels


@register(
    "tool",
    summary="Samples the multiplicative diffusion model in few network calls, as a diffusers scheduler",
    paper="2204.13902",
    card="deis",
)
class GBMDEISScheduler(LogStateScheduler):
    r"""Samples the multiplicative diffusion model in 5 to 20 network calls, by exponential integrators of its flow.

    The sample in the loop is the logarithm :math:`y = \log x` of the positive image, as for :class:`GBMScheduler`, and
    the data maps, the prior and the predictions are the same. With :math:`z = y - m(t)` the probability flow is
    :math:`dz / d\rho = \epsilon`: there is no linear drift to be approximated, and a step multiplies the image,

    .. math:: x_{next} = x \exp\left(m(t') - m(t) + \sum_k c_k \epsilon_k\right)

    with coefficients from :func:`network_calls`. The sampler is deterministic: a prior that does not match the noised
    data shows in the result, so train with ``rho_max`` of 4 and above.

    Args:
        num_train_timesteps: Scale of the timesteps of ``prediction_type="stein"``.
        sigma: Volatility, positive.
        mu: Drift; None is ``sigma**2 / 2``.
        sigma_schedule: ``"constant"`` or ``"geometric"``, see :class:`GeometricBrownianMotion`.
        rho_min: Smallest noise level at which the network is called.
        rho_max: Largest noise level; None is ``sigma``.
        algorithm_type: ``"t_ab"``, ``"rho_ab"``, ``"logrho_ab"``, ``"ipndm"``, or ``"rk_<name>"`` with a name of
            :data:`~lightning_opt.diffusion.deis.TABLEAUS`.
        solver_order: Order of the multistep methods, 1 to 4; the number of predictions that a step uses.
        warmup: ``"low_order"``, ``"heun"`` or ``"kutta"``, see :func:`network_calls`; the latter make a few calls more.
        lower_order_final: End with lower orders, down to 1 in the last step.
        prediction_type: What the network predicts, see :class:`Parametrization`.
        log_mean: Mean of log x0, from :func:`log_moments`, or a list with one for each channel.
        log_std: Standard deviation of log x0, positive, or a list.
        to_positive: ``"shift"``, ``"exp"`` or ``"identity"``, see :class:`DataMap`.
        shift: Of the map ``"shift"``.
        exp_scale: Of the map ``"exp"``.
        clip_sample: Whether :meth:`to_images` clamps to [0, 1].
        timestep_spacing: ``"t"``, ``"rho"`` or ``"log"``, see :func:`noise_levels`.
        spacing_order: Its order.
        denoise_final: Whether the last step goes on from ``rho_min`` to the data, with the newest prediction.

    Raises:
        ValueError: If a value is out of its range. From ``step``: if ``set_timesteps`` was not called, the timestep is
            not the one that is due, the batch's shape changed, or the network's output has another shape than the
            sample or is not finite.

    Cost: ``solver_order`` + 5 passes over the sample; keeps ``solver_order`` predictions in float32.

    Source: arXiv:2204.13902, applied to the flow of arXiv:2510.02730.

    Example:
        >>> import torch
        >>> scheduler = GBMDEISScheduler(prediction_type="epsilon", rho_max=4.0)
        >>> scheduler.set_timesteps(10)
        >>> noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> sample = scheduler.to_log(torch.full((2, 1, 8, 8), 0.25)) + 4 * noise
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
        algorithm_type: str = "ipndm",
        solver_order: int = 4,
        warmup: Warmup = "low_order",
        lower_order_final: bool = True,
        prediction_type: PredictionType = "edm",
        log_mean: float | list[float] = 0.0,
        log_std: float | list[float] = 1.0,
        to_positive: Literal["shift", "exp", "identity"] = "shift",
        shift: float = 1.0,
        exp_scale: float = 0.35,
        clip_sample: bool = True,
        timestep_spacing: Spacing = "rho",
        spacing_order: float = 5.0,
        denoise_final: bool = True,
    ) -> None:
        check_choice("algorithm_type", algorithm_type, ALGORITHMS)
        check_interval("solver_order", solver_order, 1, 4)
        check_choice("warmup", warmup, get_args(Warmup))
        #: Network calls in a step: 1, or the stages of a Runge-Kutta method.
        self.order = len(TABLEAUS[algorithm_type[3:]].weights) if algorithm_type.startswith("rk_") else 1
        self._configure()

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the schedule, and forget the predictions of a run before.

        Args:
            num_inference_steps: Steps. Network calls are ``len(timesteps)``: ``order`` times as many, and a few more
                with another ``warmup`` than the default.
            device: Where the timesteps are to be.

        Raises:
            ValueError: If there are fewer steps than the multistep method's order.
        """
        c, process = self.config, self.process
        count = whole("num_inference_steps", num_inference_steps)
        levels = noise_levels(process, count + 1, c.timestep_spacing, c.spacing_order)[:-1]
        self._plan = Plan(
            torch.tensor(levels, dtype=torch.float64),
            scale=_one,
            shift=functools.partial(_mean_shift, process),
            algorithm=c.algorithm_type,
            order=c.solver_order,
            warmup=c.warmup,
            lower_order_final=c.lower_order_final,
            denoise=c.denoise_final,
            time=process.time,
        )
        self._begin([call.rho for call in self._plan.calls], device)
        p = self.parametrization
        plain = not p.per_channel and p.prediction_type != "stein"
        moments = p.moments(torch.empty(1)) if plain else (0.0, 1.0)
        self._affine: list[tuple[Any, Any, Any]] = [p.affine(m, rho, *moments) for m, rho in self._levels if plain]
        self.sigmas = torch.tensor([*levels[:-1], self._plan.calls[-1].rho_next], dtype=torch.float32)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> GBMSchedulerOutput | tuple[Tensor, Tensor]:
        """Go on behind a network call.

        Args:
            model_output: The network's output for ``scale_model_input(sample, timestep)``, of the shape of ``sample``.
            timestep: The entry of ``timesteps`` that is due.
            sample: Log states. The result has their dtype; half precision is computed in float32.
            generator: Of no effect: the sampler is deterministic.
            return_dict: Whether to return an object rather than a tuple of its two entries.

        Raises:
            ValueError: See the class.
        """
        index = self._place(model_output, timestep, sample)
        if self._step_index is None:
            self._first, self._integrator = index, self._plan.begin(index)
        log_x, output = sample.to(wide(sample.dtype)), model_output.to(wide(sample.dtype))
        epsilon = self._epsilon(index, output, log_x)
        prev_sample = self._integrator.update(index - self._first, log_x, epsilon).to(sample.dtype)
        mean_shift, rho = self._levels[index]
        denoised = torch.sub(log_x, epsilon, alpha=rho)
        denoised = (denoised.sub_(mean_shift) if mean_shift else denoised).to(sample.dtype)
        self._advance(index, prev_sample, model_output, sample)
        return GBMSchedulerOutput(prev_sample, denoised) if return_dict else (prev_sample, denoised)

    def _epsilon(self, index: int, output: Tensor, log_x: Tensor) -> Tensor:
        """The noise that the output stands for, in a tensor of its own."""
        if not self._affine:
            return self.parametrization.epsilon(output, log_x, *self._levels[index])
        state, scale, constant = self._affine[index]
        epsilon = torch.mul(output, scale)
        if state:
            epsilon.add_(log_x, alpha=state)
        return epsilon.add_(constant) if constant else epsilon


def _one(rho: float) -> float:
    return 1.0


def _mean_shift(process: GeometricBrownianMotion, rho: float) -> float:
    return process.mean_shift(process.time(rho))
