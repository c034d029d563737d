"""The state of torchmetrics objects inside a module, which are by default in no checkpoint."""

from collections.abc import Collection
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from torch import nn
from torchmetrics import Metric, MetricCollection


def metric_states(module: nn.Module, skip: Collection[int] = ()) -> dict[str, dict[str, Any]]:
    """The accumulated state of every metric in ``module``, by name.

    Args:
        module: Where to look for metrics.
        skip: Ids of metrics to leave out.
    """
    for child in module.modules():
        if isinstance(child, MetricCollection):
            list(child.values(copy_state=False))  # lets all metrics of a compute group see the state of the first
    return {
        name: {"update_count": metric.update_count, "state": dict(metric.metric_state)}
        for name, metric in _metrics(module)
        if id(metric) not in skip
    }


def load_metric_states(module: nn.Module, states: dict[str, dict[str, Any]]) -> None:
    """Take back what :func:`metric_states` returned; metrics without an entry are reset."""
    for name, metric in _metrics(module):
        metric.reset()
        if name in states:
            for attribute, value in states[name]["state"].items():
                stays = isinstance(value, list) and metric.compute_on_cpu
                setattr(metric, attribute, value if stays else move_data_to_device(value, metric.device))
            metric._update_count = states[name]["update_count"]


def _metrics(module: nn.Module) -> list[tuple[str, Metric]]:
    return [(name, child) for name, child in module.named_modules() if isinstance(child, Metric)]
