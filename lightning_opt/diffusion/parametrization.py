import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_opt._checks import check_choice, check_interval

PredictionType = Literal["edm", "epsilon", "hyvarinen", "stein"]
LossWeight = Literal["edm", "v", "v2"]
PREDICTION_TYPES = ("edm", "epsilon", "hyvarinen", "stein")
LOSS_WEIGHTS = ("edm", "v", "v2")


class Preconditioning(NamedTuple):
    """The scales of a network's input and output at a noise level."""

    c_skip: float | Tensor
    c_out: float | Tensor
    c_in: float | Tensor


class AffineEpsilon(NamedTuple):
    """The noise as ``state * log_x + output * network_output + constant``."""

    state: float | Tensor
    output: float | Tensor
    constant: float | Tensor


def preconditioning(rho: float | Tensor, log_std: float | Tensor) -> Preconditioning:
    r"""Scales that give a network inputs and targets of unit variance at every noise level.

    .. math::
        c_{skip} = \frac{s^2}{\rho^2 + s^2}, \qquad c_{out} = \frac{\rho s}{\sqrt{\rho^2 + s^2}}, \qquad
        c_{in} = \frac{1}{\sqrt{\rho^2 + s^2}}

    Args:
        rho: Noise level.
        log_std: :math:`s`, standard deviation of log x0.

    Source: arXiv:2206.00364, table 1, applied to the logarithm.

    Example:
        >>> preconditioning(3.0, 4.0)
        Preconditioning(c_skip=0.64, c_out=2.4, c_in=0.2)
    """
    total = rho**2 + log_std**2
    return Preconditioning(log_std**2 / total, rho * log_std / total**0.5, 1 / total**0.5)


def hyvarinen_from_epsilon(epsilon: Tensor, rho: float | Tensor) -> Tensor:
    r""":math:`h = x \nabla \log p_t(x) = -1 - \varepsilon / \rho`."""
    return -1 - epsilon / rho


def epsilon_from_hyvarinen(hyvarinen: Tensor, rho: float | Tensor) -> Tensor:
    r""":math:`\varepsilon = -(1 + h) \rho`."""
    return -(1 + hyvarinen) * rho


def denoised_log(epsilon: Tensor, log_state: Tensor, mean_shift: float | Tensor, rho: float | Tensor) -> Tensor:
    r""":math:`E[\log x_0 | x_t] = \log x_t - m - \rho\,\varepsilon`, where the noise is its conditional mean.

    The exponential of it is below the conditional mean of x0, by Jensen's inequality: good for display, dark as a mean.
    """
    return log_state - mean_shift - rho * epsilon


@dataclass(frozen=True)
class Parametrization:
    r"""What a network reads and predicts, and the noise that its output stands for.

    With :math:`z = \log x_t - m - \text{log\_mean}`, the noise level :math:`\rho` and the scales of
    :func:`preconditioning`:

    ============== ============================ =============================================================
    prediction     the network reads            the network's output F stands for
    ============== ============================ =============================================================
    ``edm``        :math:`c_{in} z`             denoised :math:`z_0 = c_{skip} z + c_{out} F`; targets of unit scale
    ``epsilon``    :math:`c_{in} z`             the noise :math:`\varepsilon`
    ``hyvarinen``  :math:`c_{in} z`             Hyvarinen's score :math:`h = x \nabla \log p_t(x)`
    ``stein``      :math:`x_t`                  the Stein score :math:`\nabla \log p_t(x)`, as in the paper
    ============== ============================ =============================================================

    Hyvarinen's score grows as :math:`1 / \rho` and the range of :math:`x_t` as :math:`e^{4 \rho}`: ``edm`` trains
    best, ``stein`` is there for fidelity. All are affine in each other, so that any network's output becomes any of
    them without loss. Noise levels, shifts and logarithms are floats or tensors that broadcast.

    Args:
        prediction_type: One of the above.
        log_mean: Mean of log x0, or a list with one for each channel (dimension 1).
        log_std: Standard deviation of log x0, positive, or a list.

    Raises:
        ValueError: If the type is unknown, a standard deviation not positive, or the lists differ in length.

    Source: arXiv:2510.02730 (Stein and Hyvarinen scores), arXiv:2206.00364 (preconditioning).

    Example:
        >>> noise, rho = torch.tensor([0.3, -1.2]), 0.5
        >>> edm = Parametrization("edm", log_mean=0.2, log_std=0.4)
        >>> log_state = 0.1 + rho * noise
        >>> target = edm.output(noise, log_state, mean_shift=0.0, rho=rho)
        >>> edm.epsilon(target, log_state, mean_shift=0.0, rho=rho)
        tensor([ 0.3000, -1.2000])
    """

    prediction_type: PredictionType = "edm"
    log_mean: float | Sequence[float] = 0.0
    log_std: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        means, stds = (list(m) if isinstance(m, Sequence) else [m] for m in (self.log_mean, self.log_std))
        for mean in means:
            if not math.isfinite(mean):
                raise ValueError(f"log_mean must be finite, got {self.log_mean}")
        for std in stds:
            check_interval("log_std", std, 0, closed="()")
        if len(means) != len(stds) and isinstance(self.log_mean, Sequence) and isinstance(self.log_std, Sequence):
            raise ValueError(
                f"log_mean and log_std must have one entry for each channel, got {len(means)} and {len(stds)}"
            )

    @property
    def per_channel(self) -> bool:
        """Whether the channels have different moments."""
        return isinstance(self.log_mean, Sequence) or isinstance(self.log_std, Sequence)

    def moments(self, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """``log_mean`` and ``log_std``, shaped to broadcast over a batch.

        Raises:
            ValueError: If there are as many as channels and the batch has another number.
        """
        mean, std = (
            torch.tensor(m, device=like.device, dtype=wide(like.dtype)).view(-1, *(1,) * (like.ndim - 2))
            if isinstance(m, Sequence)
            else m
            for m in (self.log_mean, self.log_std)
        )
        for m in (mean, std):
            if isinstance(m, Tensor) and like.ndim > 1 and len(m) != like.shape[1]:
                raise ValueError(f"log_mean and log_std have {len(m)} channels, but the sample has {like.shape[1]}")
        return mean, std

    def network_input(self, log_state: Tensor, mean_shift: float | Tensor, rho: float | Tensor) -> Tensor:
        """What the network reads, of the dtype of ``log_state``."""
        dtype, log_state = log_state.dtype, log_state.to(wide(log_state.dtype))
        if self.prediction_type == "stein":
            return log_state.exp().to(dtype)
        mean, std = self.moments(log_state)
        return ((log_state - (mean_shift + mean)) * preconditioning(rho, std).c_in).to(dtype)

    def affine(
        self, mean_shift: float | Tensor, rho: float | Tensor, mean: float | Tensor, std: float | Tensor
    ) -> AffineEpsilon:
        """The noise as an affine function of the log state and the output (for ``stein``, of x times the output).

        Args:
            mean_shift: m.
            rho: Noise level.
            mean: The first of :meth:`moments`.
            std: The second.
        """
        if self.prediction_type == "epsilon":
            return AffineEpsilon(0.0, 1.0, 0.0)
        if self.prediction_type != "edm":
            return AffineEpsilon(0.0, -rho, -rho)
        c_in = preconditioning(rho, std).c_in
        state = rho * c_in**2  # of (z - D) / rho, without the cancellation of 1 - c_skip
        return AffineEpsilon(state, -std * c_in, -state * (mean_shift + mean))

    def epsilon(self, output: Tensor, log_state: Tensor, mean_shift: float | Tensor, rho: float | Tensor) -> Tensor:
        """The noise that a network's output stands for."""
        state, scale, constant = self.affine(mean_shift, rho, *self.moments(log_state))
        if self.prediction_type == "stein":
            output = output * log_state.exp()
        return state * log_state + scale * output + constant

    def output(self, epsilon: Tensor, log_state: Tensor, mean_shift: float | Tensor, rho: float | Tensor) -> Tensor:
        """The network's output that stands for a noise; of the noise that was added, the regression target."""
        state, scale, constant = self.affine(mean_shift, rho, *self.moments(log_state))
        output = (epsilon - state * log_state - constant) / scale
        return output * (-log_state).exp() if self.prediction_type == "stein" else output


def loss_weight(name: LossWeight, rho: float | Tensor, log_std: float | Tensor) -> float | Tensor:
    r"""The weight of the squared error of the noise, :math:`\lambda / v`, for a weight of Hyvarinen's score.

    ======= ============================= ============================= ==========================================
    name    :math:`\lambda`               :math:`\lambda / v`           for
    ======= ============================= ============================= ==========================================
    ``edm`` :math:`v (v + s^2) / s^2`     :math:`(v + s^2) / s^2`       the plain square of the ``edm`` output
    ``v``   :math:`v`                     1                             the plain square of the noise
    ``v2``  :math:`v^2`                   :math:`v`                     the authors' residual
    ======= ============================= ============================= ==========================================

    Args:
        name: One of the above.
        rho: Noise level, :math:`v = \rho^2`.
        log_std: :math:`s`.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> loss_weight("edm", 3.0, 4.0), loss_weight("v2", 3.0, 4.0)
        (1.5625, 9.0)
    """
    check_choice("loss_weight", name, LOSS_WEIGHTS)
    if name == "edm":
        return (rho**2 + log_std**2) / log_std**2
    return rho**2 if name == "v2" else rho**0


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32 for half precision."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
