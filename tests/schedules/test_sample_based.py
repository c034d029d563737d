import copy
import math

import pytest
import torch

from lightning_opt.schedules import SampleBasedLR

settings = {
    "SampleBasedLR": [
        {"batch_size": 8, "lr_decay_samples": 96, "warmup_samples": 16},
        {"batch_size": 8, "decay": "constant", "warmup_samples": 40},
    ]
}


def rates(batches, lr=2.0, **kwargs):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = SampleBasedLR(optimizer, batches[0], **kwargs)
    out = []
    for batch in batches:
        scheduler.batch_size = batch
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out, scheduler


def test_warm_up_and_cosine_in_closed_form():
    found, _ = rates([10] * 12, warmup_samples=40, lr_decay_samples=100, min_factor=0.1)
    for step, rate in enumerate(found):
        samples = 10 * step
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * min(max(samples - 40, 0) / 60, 1))) / 2
        assert rate == pytest.approx(2.0 * min((samples + 10) / 40, 1) * (cosine if samples >= 40 else 1), rel=1e-12)
    assert found[3] == 2.0  # the last step of the warm-up has the peak rate
    assert found[-1] == pytest.approx(0.2, rel=1e-12)


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_a_growing_batch_stays_on_the_curve_over_samples(decay):
    """The rate of a step is a function of the samples before it, however they were divided into steps."""
    kwargs = {"warmup_samples": 0, "lr_decay_samples": 480, "decay": decay}
    constant, _ = rates([10] * 48, **kwargs)
    growing, scheduler = rates([10, 10, 20, 40, 80, 160, 160], **kwargs)
    assert growing == [constant[samples // 10] for samples in (0, 10, 20, 40, 80, 160, 320)]
    assert scheduler.samples == 480
    assert scheduler.get_last_lr() == [pytest.approx(0.0, abs=1e-15)]


def test_constant_needs_no_end():
    found, _ = rates([8] * 5, warmup_samples=16, decay="constant")
    assert found == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_a_saved_schedule_is_continued():
    whole, _ = rates([10, 20, 30, 40, 50, 60], lr_decay_samples=300)
    _, first = rates([10, 20, 30], lr_decay_samples=300)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    second = SampleBasedLR(optimizer, 10, lr_decay_samples=300)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    optimizer.param_groups[0]["lr"] = first.get_last_lr()[0]  # torch's optimizers save it
    for batch, rate in zip([40, 50, 60], whole[3:], strict=True):
        second.batch_size = batch
        assert optimizer.param_groups[0]["lr"] == rate
        optimizer.step()
        second.step()


@pytest.mark.parametrize("place", [0, 1])
def test_as_a_part_of_torchs_sequence(place):
    """Torch makes each part's first step twice, and takes one back."""
    kwargs = {"warmup_samples": 20, "lr_decay_samples": 60, "decay": "linear"}
    alone, _ = rates([10] * 5, **kwargs)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    parts = [SampleBasedLR(optimizer, 10, **kwargs), torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)]
    sequence = torch.optim.lr_scheduler.SequentialLR(optimizer, parts if place == 0 else parts[::-1], [5])
    found = []
    for _ in range(10):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        sequence.step()
    assert found[5 * place : 5 * place + 5] == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0, "decay": "constant"}, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 8}, "lr_decay_samples must be given for decay='cosine'"),
        ({"batch_size": 8, "lr_decay_samples": 10, "warmup_samples": 10}, "must be above warmup_samples=10, got 10"),
        (
            {"batch_size": 8, "lr_decay_samples": 10, "warmup_samples": -1},
            "warmup_samples must be an integer >= 0, got -1",
        ),
        ({"batch_size": 8, "lr_decay_samples": 10, "min_factor": 2.0}, r"min_factor must be in \[0.0, 1.0\], got 2.0"),
        ({"batch_size": 8, "decay": "cos"}, "decay must be one of"),
    ],
)
def test_wrong_values_are_named(kwargs, message):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match=message):
        SampleBasedLR(optimizer, **kwargs)
