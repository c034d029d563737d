import dataclasses

from lightning_opt._checks import check_interval

from .linear_stability import noise_factor


@dataclasses.dataclass(frozen=True)
class Stability:
    """How near a run is to the edge of stability; :func:`stability` makes it.

    Attributes:
        lr: Learning rate.
        momentum: Heavy-ball momentum.
        batch_size: Samples of a step, over micro-batches and ranks.
        noise: Variance of a batch's mean as a share of a sample's: 1 / batch size with replacement.
        trace: Of the curvature G.
        trace_stderr: Standard error of the estimate of the trace.
        lambda_max: Largest eigenvalue of G.
    """

    lr: float
    momentum: float
    batch_size: float
    noise: float
    trace: float
    trace_stderr: float
    lambda_max: float

    @property
    def rho_tr(self) -> float:
        """Share of the edge that the trace takes; above 1 the minimum cannot be kept."""
        return self._of_trace * self.trace

    @property
    def rho_tr_stderr(self) -> float:
        """Standard error of ``rho_tr``, and of ``rho_mix``."""
        return self._of_trace * self.trace_stderr

    @property
    def rho_top(self) -> float:
        """Share of the edge of gradient descent; above 1 the minimum cannot be kept."""
        return self.lr / (2 * (1 + self.momentum)) * self.lambda_max

    @property
    def rho_mix(self) -> float:
        """Noise and top eigenvalue together: at most 1 suffices if all gradients have one norm."""
        return self.rho_tr + (1 - self.noise) * self.rho_top

    @property
    def lr_ceiling(self) -> float:
        """The rate at which ``rho_mix`` is 1; infinite on a flat loss."""
        return self.lr / self.rho_mix if self.rho_mix > 0 else float("inf")

    @property
    def _of_trace(self) -> float:
        return self.lr / (1 - self.momentum) * self.noise / 2


def stability(
    trace: float,
    lambda_max: float,
    *,
    lr: float,
    batch_size: float,
    momentum: float = 0.0,
    dataset_size: int | None = None,
    trace_stderr: float = 0.0,
) -> Stability:
    r"""Relate trace and top eigenvalue of the curvature to learning rate and batch size.

    For the loss :math:`\frac{1}{2n} \sum_i (f(x_i) - y_i)^2` at a minimum that fits every sample, with
    :math:`\nu = 1 / B`, or :math:`(n - B) / (B (n - 1))` where batches are drawn without replacement:

    - ``rho_tr`` :math:`= \frac{\eta}{2} \nu \operatorname{tr} G \le 1` and ``rho_top``
      :math:`= \frac{\eta}{2} \lambda_{\max} \le 1` are necessary to stay there;
    - ``rho_mix`` :math:`= \frac{\eta}{2} (\nu \operatorname{tr} G + (1 - \nu) \lambda_{\max}) \le 1` is sufficient if
      all :math:`|g_i|` are equal, and the edge is near 1 in any case.

    The bare test :math:`\operatorname{tr} G \le 2 / \eta` holds for batches of one only. With momentum
    :math:`\beta` the rate is :math:`\eta / (1 - \beta)` in the noise and :math:`\eta / (1 + \beta)` in the top
    eigenvalue, which is standard and not from the paper. Away from such a minimum, and for other losses (take the
    generalized Gauss-Newton matrix for G), all of it is a heuristic.

    Args:
        trace: Of :math:`G`, in the normalization above: half the squared error, summed over outputs, mean over samples.
        lambda_max: Largest eigenvalue of :math:`G`.
        lr: :math:`\eta`.
        batch_size: :math:`B`, over micro-batches and ranks.
        momentum: :math:`\beta`, in [0, 1).
        dataset_size: :math:`n`, if an epoch passes through the data without replacement; None for independent samples.
        trace_stderr: Standard error of the trace.

    Raises:
        ValueError: If a number is out of its range.

    Source: arXiv:2305.17490, theorem 3.3 for B = 1; other batches are derived and tested here.

    Example:
        >>> s = stability(trace=3.6, lambda_max=0.5, lr=1.0, batch_size=8)
        >>> round(s.rho_tr, 3), s.rho_top, round(s.rho_mix, 4), round(s.lr_ceiling, 3)
        (0.225, 0.25, 0.4437, 2.254)
    """
    check_interval("lr", lr, 0)
    check_interval("batch_size", batch_size, 1)
    check_interval("momentum", momentum, 0, 1, closed="[)")
    noise = noise_factor(batch_size, dataset_size)
    return Stability(lr, momentum, batch_size, noise, trace, trace_stderr, lambda_max)
