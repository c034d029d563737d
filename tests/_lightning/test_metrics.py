import pickle

import pytest
import torch
from torch import nn
from torchmetrics import CatMetric, MeanMetric, MetricCollection, MinMaxMetric
from torchmetrics.classification import BinaryAUROC, BinaryF1Score, BinaryPrecision, BinaryRecall

from lightning_opt._lightning.metrics import load_metric_states, metric_states


def module():
    holder = nn.Module()
    holder.group = MetricCollection([BinaryPrecision(), BinaryRecall(), BinaryF1Score()])  # share one state
    holder.curve = BinaryAUROC(thresholds=None, compute_on_cpu=True)  # a list of tensors
    holder.cat = CatMetric()
    holder.wrapped = MinMaxMetric(MeanMetric())
    holder.untouched = MeanMetric()
    return holder


def update(holder, seed):
    generator = torch.Generator().manual_seed(seed)
    scores, target = torch.rand(8, generator=generator), torch.randint(2, (8,), generator=generator)
    holder.group.update(scores, target)
    holder.curve.update(scores, target)
    holder.cat.update(scores)
    holder.wrapped.update(scores.mean())


def results(holder):
    return [holder.group.compute(), holder.curve.compute(), holder.cat.compute(), holder.wrapped._base_metric.compute()]


@pytest.mark.parametrize("used_before", [False, True])
def test_continues_where_it_was(used_before):
    whole = module()
    update(whole, 0)
    update(whole, 1)
    states = pickle.loads(pickle.dumps(metric_states(whole)))
    resumed = module()
    if used_before:
        update(resumed, 7)
        resumed.untouched.update(3.0)
        results(resumed)  # fills the caches of compute
    load_metric_states(resumed, states)
    assert str(results(resumed)) == str(results(whole))
    assert resumed.cat.update_count == 2
    assert not resumed.untouched.update_called
    update(whole, 2)
    update(resumed, 2)
    assert str(results(resumed)) == str(results(whole))


def test_skipped_metrics_are_reset():
    holder = module()
    update(holder, 0)
    states = metric_states(holder, skip={id(holder.cat)})
    assert "cat" not in states
    load_metric_states(holder, states)
    assert not holder.cat.update_called
    assert holder.curve.update_called
