import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_opt._lightning.log_rows import row_is_due, write_row
from lightning_opt.registry import register

from ._log_values import is_wanted, to_floats
from ._report_panel import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAMPLE = 2**20  # weights of a tensor that the distance to the log-normal distribution is computed from


@register(
    "callback",
    summary="Logs whether weights keep their signs and how log-normal they are",
    paper="2510.02730",
    log_prefix="dale",
    capabilities=("observer",),
)
class DaleLawMonitor(pl.Callback):
    r"""Watches Dale's law, that no weight changes its sign, and the distribution of the weights, under ``dale/``.

    - ``dale/sign_flips``: weights whose sign is the opposite of what it was when ``fit`` began; 0 for the optimizers
      that keep signs (arXiv:2510.02730), hundreds or thousands for others;
    - ``dale/frozen_fraction``: share of weights with :math:`|w|` not above the optimizer's ``min_abs`` (0 without such
      an option): those are dead or nearly so, and a growing share says that the learning rate is too large;
    - ``dale/log_abs_mean``, ``dale/log_abs_std``: mean and standard deviation of :math:`\log |w|` over the other
      weights;
    - ``dale/ks_lognormal``: Kolmogorov-Smirnov distance between :math:`\log |w|`, standardized, and the normal
      distribution, for each tensor (from at most about a million of its weights, evenly spaced), averaged by size.
      Multiplicative updates from a log-normal start keep it near 0.01; additive ones reach 0.06 and more.

    The weights are those in groups not marked ``additive`` of the exponentiated optimizers, or, with any other
    optimizer, all that have two dimensions or more and are trained. Signs at the beginning are part of the state, so
    that flips are counted from the beginning of the whole run. A :class:`RunReport` shows the histogram of :math:`\log
    |w|`.

    Nothing is computed, and nothing waits for the device, on steps that are not logged, or where nobody looks
    (``logger=False`` without a :class:`RunReport`).

    Cost: one byte a weight in memory and in checkpoints; on a logged step a sort of the weights.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[DaleLawMonitor()], logger=False, enable_checkpointing=False)
    """

    def __init__(self) -> None:
        self._signs: dict[str, Tensor] = {}
        self._stage = "fit"
        self._weights: dict[str, tuple[Tensor, float]] = {}  # with the magnitude up to which they count as frozen

    def __repr__(self) -> str:
        return "DaleLawMonitor()"

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stage = stage

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._weights = _weights(trainer, pl_module)
        if trainer.global_step == 0:
            self._signs = {}
        if not self._weights:
            rank_zero_warn("DaleLawMonitor finds no weights to watch: no trained parameter has two dimensions or more")
        for name, (weight, _) in self._weights.items():
            old = self._signs.get(name)
            if old is None or old.shape != weight.shape:
                self._signs[name] = weight.detach().sign().to(torch.int8)
            else:
                self._signs[name] = old.to(weight.device)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if row_is_due(trainer) and self._weights and is_wanted(trainer):
            values = weight_statistics(
                {name: (w, self._signs[name], limit) for name, (w, limit) in self._weights.items()}
            )
            write_row(trainer, {f"dale/{name}": value for name, value in to_floats(values).items()})

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._weights = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"signs": dict(self._signs)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage == "fit":  # validate and test restore callbacks too
            self._signs = dict(state_dict["signs"])

    def report_panels(self) -> list[Panel]:
        """The histogram of the weights at the end, for :class:`RunReport`."""
        logs = [_log_abs(weight, limit) for weight, limit in self._weights.values()]
        standard = [_standardized(x) for x in logs if x.numel() > 1]
        if not standard:
            return []
        counts, edges = torch.histogram(torch.cat(standard).cpu(), bins=60, range=(-4.0, 4.0), density=True)
        return [Panel("log |w|, standardized", _Histogram(counts.tolist(), edges.tolist()))]


def weight_statistics(weights: Mapping[str, tuple[Tensor, Tensor, float]]) -> dict[str, Tensor]:
    r"""Sign flips and distribution of weights.

    Args:
        weights: By name the weight, its signs at the beginning (int8, same shape), and the magnitude up to which a
            weight counts as frozen.

    Returns:
        0-dim tensors ``sign_flips``, ``frozen_fraction``, ``log_abs_mean``, ``log_abs_std`` and ``ks_lognormal``, as
        :class:`DaleLawMonitor` describes them.

    Example:
        >>> w = torch.tensor([[-1.0, 2.0, 0.0]])
        >>> values = weight_statistics({"w": (w, torch.tensor([[1, 1, 1]], dtype=torch.int8), 0.0)})
        >>> values["sign_flips"].item(), round(values["frozen_fraction"].item(), 3)
        (1.0, 0.333)
    """
    flips, numbers, counts, means, variances, distances = [], [], [], [], [], []
    device = next(iter(weights.values()))[0].device
    for weight, signs, limit in weights.values():
        x = _log_abs(weight, limit).to(device)
        flips.append((weight.detach().sign() * signs < 0).sum().to(device))
        numbers.append(weight.numel())
        if x.numel():
            counts.append(x.numel())
            means.append(x.mean())
            variances.append(x.var(correction=0))
            distances.append(_distance_to_normal(x[:: max(1, x.numel() // SAMPLE)]))
    share = torch.tensor(counts, dtype=torch.float32, device=device) / max(1, sum(counts))
    mean, variance, distance = (torch.stack(v) if v else share for v in (means, variances, distances))
    center = (share * mean).sum()
    return {
        "sign_flips": torch.stack(flips).sum().float(),
        "frozen_fraction": torch.tensor(1 - sum(counts) / max(1, sum(numbers)), device=device),
        "log_abs_mean": center,
        "log_abs_std": (share * (variance + (mean - center) ** 2)).sum().sqrt(),
        "ks_lognormal": (share * distance).sum(),
    }


def _weights(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, tuple[Tensor, float]]:
    """The weights to watch and the magnitude up to which each counts as frozen."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups if "additive" in group]
    exponentiated = {p: float(g.get("min_abs", 0.0)) for g in groups if not g["additive"] for p in g["params"]}
    if groups:
        return {name: (p, exponentiated[p]) for name, p in pl_module.named_parameters() if p in exponentiated}
    return {name: (p, 0.0) for name, p in pl_module.named_parameters() if p.requires_grad and p.ndim > 1}


def _log_abs(weight: Tensor, limit: float) -> Tensor:
    """Logarithm of |w| of the weights above the limit, in float32 at least."""
    size = weight.detach().abs().to(torch.promote_types(torch.float32, weight.dtype)).flatten()
    return size[size > limit].log()


def _standardized(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std(correction=0).clamp_min(torch.finfo(x.dtype).tiny)


def _distance_to_normal(x: Tensor) -> Tensor:
    """Kolmogorov-Smirnov distance between numbers, standardized, and the normal distribution."""
    below = torch.special.ndtr(_standardized(x).sort().values)
    rank = torch.arange(1, x.numel() + 1, dtype=x.dtype, device=x.device)
    return torch.maximum(rank / x.numel() - below, below - (rank - 1) / x.numel()).max()


class _Histogram:
    """Draws shares by bin beside the normal density."""

    def __init__(self, counts: list[float], edges: list[float]) -> None:
        self.counts, self.edges = counts, edges

    def __call__(self, axes: "Axes") -> None:
        axes.stairs(self.counts, self.edges, fill=True, color="#4269d0", alpha=0.45)
        normal = [math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) for x in self.edges]
        axes.plot(self.edges, normal, color="#ff725c", linewidth=1.6)
        axes.set_xlabel("standard deviations from the mean of each tensor")
        axes.annotate("normal", (1.3, 0.2), color="#ff725c")
