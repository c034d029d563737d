"""Drawing images from a trained denoiser: the one loop of the modules, the pipeline, the callback and the command."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lightning_opt._checks import check_interval, nearest

from ._schedule_place import whole


class SamplingError(RuntimeError):
    """The network gave what no image can be made of; the message names the step."""


@torch.no_grad()
def sample(
    denoiser: nn.Module,
    scheduler: Any,
    shape: Sequence[int],
    *,
    num_inference_steps: int = 50,
    generator: torch.Generator | None = None,
    class_labels: Tensor | None = None,
    null_label: int | None = None,
    guidance_scale: float = 1.0,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> Tensor:
    r"""Draw images with a denoiser and any scheduler of diffusers' manner.

    A scheduler that has its own prior and data map (:class:`GBMScheduler` and its like) starts from that prior and says
    what the images are. Any other starts from Gaussian noise and ends with an image from -1 to 1.

    With guidance the network is called for the class and for no class, and its outputs are combined as
    :math:`F_\varnothing + s (F_c - F_\varnothing)` (arXiv:2207.12598); every parametrization is affine in the noise,
    so that this is guidance of the noise whatever the network predicts.

    Args:
        denoiser: Called with the state ``[B, C, H, W]``, times ``[B]`` and, for classes, ``class_labels`` ``[B]``.
            Returns a tensor of the state's shape, or an object whose ``sample`` is one. It runs in evaluation mode,
            and is put back.
        scheduler: Its time steps are set here. It must be for the noise that the denoiser was trained with.
        shape: ``[B, C, H, W]``.
        num_inference_steps: As the scheduler counts them; methods of several stages call the network more often.
        generator: Of all noise; by default the global one.
        class_labels: int64 ``[B]``, for a denoiser of classes.
        null_label: The label that stands for no class; needed for guidance.
        guidance_scale: 1 is the class alone; above 1 exaggerates it.
        progress: Wraps the time steps, for example ``tqdm``.

    Returns:
        Images ``[B, C, H, W]``, float32, from 0 to 1, on the denoiser's device.

    Raises:
        ValueError: If a number is out of its range, or guidance is asked for without classes.
        SamplingError: If the network returns another shape, or numbers that are not finite.

    Cost: a call of the network for each time step, twice the batch with guidance.
    """
    whole("num_inference_steps", num_inference_steps)
    check_interval("guidance_scale", guidance_scale, 0)
    parameter = next(denoiser.parameters(), torch.empty(0))  # a function may be wrapped, with none
    device, dtype = parameter.device, parameter.dtype
    labels = None if class_labels is None else class_labels.to(device)
    guided = guidance_scale != 1.0
    if guided:
        if labels is None or null_label is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs class_labels and null_label")
        labels = torch.cat([labels, torch.full_like(labels, null_label)])
    scheduler.set_timesteps(num_inference_steps, device=device)
    state = _prior(scheduler, shape, generator, device)
    step_options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    with evaluating(denoiser):
        for number, time in enumerate(progress(scheduler.timesteps)):
            network_input = scheduler.scale_model_input(state, time).to(dtype)
            if guided:
                network_input = torch.cat([network_input, network_input])
            output = call_denoiser(denoiser, network_input, time.to(device), labels)
            where = f"step {number + 1} of {len(scheduler.timesteps)}: {type(denoiser).__name__}"
            if output.shape != network_input.shape:
                raise SamplingError(
                    f"{where} returned the shape {list(output.shape)} for an input of {list(network_input.shape)}"
                )
            output = output.float()
            if guided:
                of_class, of_none = output.chunk(2)
                output = of_none + guidance_scale * (of_class - of_none)
            if not torch.isfinite(output).all():
                bad = int((~torch.isfinite(output)).sum())
                raise SamplingError(f"{where} returned {bad} of {output.numel()} numbers that are not finite")
            state = scheduler.step(output, time, state, **step_options).prev_sample
    return scheduler.to_images(state) if hasattr(scheduler, "to_images") else (state / 2 + 0.5).clamp(0, 1)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; behind, every part is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def call_denoiser(denoiser: nn.Module, state: Tensor, time: Tensor, class_labels: Tensor | None) -> Tensor:
    """The output of a denoiser, for one time or for one of each image, with or without classes."""
    times = time.expand(len(state))
    output = denoiser(state, times) if class_labels is None else denoiser(state, times, class_labels=class_labels)
    output = output if isinstance(output, Tensor) else getattr(output, "sample", output)
    if not isinstance(output, Tensor):
        name, kind = type(denoiser).__name__, type(output).__name__
        raise ValueError(f"{name} must return a tensor, or an object whose `sample` is one; got a {kind}")
    return output


def sampling_scheduler(trained: Any, name: str | None = None, arguments: dict[str, Any] | None = None) -> Any:
    """A new scheduler to sample with: that of the training, or another one with its settings.

    Args:
        trained: The scheduler of the training; left as it is.
        name: Class of the new one: of this package, of diffusers, or a dotted path. ``None`` for that of the training.
        arguments: What is to be different from the settings of the training.

    Returns:
        A scheduler. One of the same class has all settings of the training; another one those that training fixed: the
        noise, the data map and what the network predicts.

    Raises:
        ValueError: If there is no such scheduler, it is for another kind of noise, or has no such argument.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> sampling_scheduler(DDPMScheduler(beta_end=0.05), "DDIMScheduler").config.beta_end
        0.05
    """
    cls = type(trained) if name is None else _scheduler_class(name)
    multiplicative = hasattr(type(trained), "to_images")
    if hasattr(cls, "to_images") != multiplicative:
        kind, other = ("multiplicative", "added") if multiplicative else ("added", "multiplicative")
        raise ValueError(
            f"{cls.__name__} samples from {other} noise, and the model was trained with {kind} noise"
            f" ({type(trained).__name__})"
        )
    accepted = [key for key in inspect.signature(cls.__init__).parameters if key not in ("self", "kwargs")]
    if "beta_start" in trained.config and "beta_start" not in accepted:
        raise ValueError(f"{cls.__name__} has no betas, which are the noise of the model ({type(trained).__name__})")
    for key in arguments or {}:
        if key not in accepted:
            near = nearest(key, accepted)
            hint = f" Did you mean {' or '.join(near)}?" if near else f" It takes {', '.join(accepted)}."
            raise ValueError(f"{cls.__name__} has no argument {key!r}.{hint}")
    same = cls is type(trained)
    settings = {key: value for key, value in trained.config.items() if key in accepted and (same or key in FIXED)}
    try:
        return cls(**{**settings, **(arguments or {})})
    except (TypeError, NotImplementedError) as error:  # diffusers does not look at the values
        raise ValueError(f"{cls.__name__} cannot be built with {arguments}: {error}") from error


#: What training fixes, and sampling may not change.
FIXED = (
    *("num_train_timesteps", "prediction_type"),
    *("sigma", "mu", "sigma_schedule", "rho_min", "rho_max", "log_mean", "log_std"),
    *("to_positive", "shift", "exp_scale", "clip_sample"),
    *("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
)


def _prior(scheduler: Any, shape: Sequence[int], generator: torch.Generator | None, device: torch.device) -> Tensor:
    if hasattr(scheduler, "sample_prior"):
        return scheduler.sample_prior(shape, generator=generator, device=device, dtype=torch.float32)
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(tuple(shape), generator=generator, device=device) * scheduler.init_noise_sigma


def _scheduler_class(name: str) -> type[Any]:
    import diffusers

    ours = import_module(__package__)
    found = None
    if "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(import_module(module), attribute, None)
        except ImportError:
            found = None
    else:
        found = getattr(ours, name, None) if name in dir(ours) else getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        names = [n for n in (*dir(ours), *dir(diffusers)) if n.endswith("Scheduler")]
        near = nearest(name.rpartition(".")[2], names)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"there is no scheduler named {name!r}.{hint}")
    return found
