"""What has been logged so far in an epoch: Lightning gathers it to the epoch's end and saves none of it."""

import builtins
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync


def logged_values_state(trainer: pl.Trainer) -> dict[str, Any]:
    """The values gathered for the end of the training epoch, and the metrics that callbacks and schedulers see.

    Values logged with a ``sync_dist_group`` are left out: a process group cannot be saved.
    """
    connector = trainer._logger_connector
    results = trainer.fit_loop.epoch_loop._results
    return {
        "gathered": {
            key: _result_state(result)
            for key, result in results.items()
            if not result.has_reset and result.meta.sync.group is None
        },
        "current_fx": connector._current_fx,
        "callback_metrics": dict(connector._callback_metrics),
        "logged_metrics": dict(connector._logged_metrics),
        "progress_bar_metrics": dict(connector._progress_bar_metrics),
    }


def load_logged_values(trainer: pl.Trainer, state: dict[str, Any], *, epoch_ended: bool) -> None:
    """Take back what :func:`logged_values_state` returned; the loop's progress must be loaded before."""
    connector = trainer._logger_connector
    epoch_loop = trainer.fit_loop.epoch_loop
    results = epoch_loop._results
    results.clear()
    for key, saved in state["gathered"].items():
        results[key] = _result(trainer, saved)
    connector._current_fx = state["current_fx"]
    # the first batch of an epoch resets what is logged again; None stands for "no batch under way"
    connector._first_loop_iter = None if epoch_ended else epoch_loop.batch_progress.current.ready <= 1
    connector._callback_metrics = dict(state["callback_metrics"])
    connector._logged_metrics = dict(state["logged_metrics"])
    connector._progress_bar_metrics = dict(state["progress_bar_metrics"])


def metrics_reset_after_validation(trainer: pl.Trainer) -> set[int]:
    """Ids of the torchmetrics objects that Lightning resets behind the ``on_validation_end`` hooks."""
    results = trainer.fit_loop.epoch_loop.val_loop._results
    return {id(result.value) for result in results.values() if not result.is_tensor}


def _result_state(result: _ResultMetric) -> dict[str, Any]:
    meta = result.meta
    state = {
        "meta": {
            "fx": meta.fx,
            "name": meta.name,
            "prog_bar": meta.prog_bar,
            "logger": meta.logger,
            "on_step": meta.on_step,
            "on_epoch": meta.on_epoch,
            "enable_graph": meta.enable_graph,
            "add_dataloader_idx": meta.add_dataloader_idx,
            "dataloader_idx": meta.dataloader_idx,
            "metric_attribute": meta.metric_attribute,
        },
        # self.log takes reduce_fx=max as well as "max", which is torch.max, and compares it at every call
        "reduce_fx": meta.reduce_fx.__name__,
        "reduce_fx_is_builtin": meta.reduce_fx in (builtins.max, builtins.min, builtins.sum),
        "sync": {"_should": meta.sync.should, "rank_zero_only": meta.sync.rank_zero_only},
        "is_tensor": result.is_tensor,
        "update_count": result._update_count,
        "forward_cache": result._forward_cache,
    }
    if result.is_tensor:
        state["value"] = result.value
        state["cumulated_batch_size"] = getattr(result, "cumulated_batch_size", None)
    return state


def _result(trainer: pl.Trainer, state: dict[str, Any]) -> _ResultMetric:
    meta = _Metadata(
        **state["meta"], reduce_fx=getattr(builtins if state["reduce_fx_is_builtin"] else torch, state["reduce_fx"])
    )
    meta.sync = _Sync(fn=trainer.strategy.reduce, **state["sync"])
    result = _ResultMetric(meta, state["is_tensor"])
    if result.is_tensor:
        result.value = state["value"]
        if state["cumulated_batch_size"] is not None:
            result.cumulated_batch_size = state["cumulated_batch_size"]
    else:
        assert meta.metric_attribute is not None  # Lightning insists on it when the metric is logged
        result.value = trainer.lightning_module.get_submodule(meta.metric_attribute)
    result._update_count = state["update_count"]
    result._forward_cache = state["forward_cache"]
    return result
