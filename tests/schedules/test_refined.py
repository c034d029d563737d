import numpy as np
import pytest
import torch

from lightning_opt.schedules import LinearDecayLR, NormRecord, RefinedLR, horizon, refine_schedule, resample
from lightning_opt.schedules.refined import load_schedule, save_schedule

settings = {
    "RefinedLR": [
        {"schedule": [0.5, 1.0, 0.25, 0.0], "total_steps": 12},
        {"schedule": [1.0, 0.7, 0.5, 0.3, 0.0], "total_steps": 12, "warmup_steps": 3},
    ]
}


def optimizer(lr=1.0):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


def factors(scheduler, steps):
    seen = [scheduler.get_last_lr()[0]]
    for _ in range(steps):
        scheduler.optimizer.step()
        scheduler.step()
        seen.append(scheduler.get_last_lr()[0])
    return seen


@pytest.mark.parametrize("total", [3, 10, 11, 40, 1001])
def test_resampled_linearly_to_any_length(total):
    schedule = torch.rand(11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = factors(RefinedLR(optimizer(), schedule, total), total)
    expected = np.interp(np.arange(total + 1) / total, np.linspace(0, 1, 11), schedule.numpy())
    np.testing.assert_allclose(seen, expected, rtol=0, atol=1e-15)


def test_constant_norms_give_linear_decay_at_every_length():
    schedule = refine_schedule(torch.full((100,), 2.5))
    for total in (7, 100, 333):
        linear = factors(LinearDecayLR(optimizer(), total), total)
        # the refined shape itself is exact to 1e-15
        np.testing.assert_allclose(factors(RefinedLR(optimizer(), schedule, total), total), linear, rtol=0, atol=1e-14)


def test_without_total_steps_it_has_one_step_a_value():
    scheduler = RefinedLR(optimizer(), [1.0, 0.5, 0.0])
    assert (scheduler.total_steps, horizon(scheduler)) == (3, ("total_steps", 3))


def test_warm_up_multiplies():
    plain = factors(RefinedLR(optimizer(), [0.5, 1.0, 0.0], 10), 10)
    warm = factors(RefinedLR(optimizer(), [0.5, 1.0, 0.0], 10, warmup_steps=3), 10)
    assert warm[:3] == pytest.approx([plain[0] / 4, plain[1] / 2, plain[2] * 3 / 4], abs=1e-15)
    assert warm[3:] == plain[3:]


def test_a_file_is_the_same_schedule(tmp_path):
    schedule = refine_schedule(torch.rand(50) + 0.5, total_steps=20)
    save_schedule(tmp_path / "schedule.npz", schedule)
    assert torch.equal(load_schedule(tmp_path / "schedule.npz"), schedule)
    from_file = RefinedLR(optimizer(), str(tmp_path / "schedule.npz"))
    assert from_file.schedule_sha256 == RefinedLR(optimizer(), schedule).schedule_sha256


def test_the_state_belongs_to_its_schedule():
    scheduler = RefinedLR(optimizer(), [1.0, 0.5, 0.0], 6)
    factors(scheduler, 2)
    state = scheduler.state_dict()
    assert not any(isinstance(value, torch.Tensor) for value in state.values())
    same = RefinedLR(optimizer(), [1.0, 0.5, 0.0], 6)
    same.load_state_dict(state)
    assert same.last_epoch == 2
    with pytest.raises(ValueError, match="saved with another schedule: its SHA-256 is .* give the schedule"):
        RefinedLR(optimizer(), [1.0, 0.5 + 1e-15, 0.0], 6).load_state_dict(state)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([1.0], r"at least two numbers in one dimension, got shape \(1,\)"),
        (torch.ones(3, 3), r"got shape \(3, 3\)"),
        ([1.0, -0.5], "numbers >= 0 and finite, got -0.5"),
        ([1.0, float("nan")], "numbers >= 0 and finite, got nan"),
        ([1.0, float("inf")], "numbers >= 0 and finite, got inf"),
        ([0.0, 0.0], "a number > 0, got zeros only"),
        ("nowhere.npz", "there is no nowhere.npz"),
    ],
)
def test_wrong_schedules(schedule, message):
    with pytest.raises(ValueError, match=message):
        RefinedLR(optimizer(), schedule, 5)


def test_files_that_hold_no_schedule(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_text("")
    np.savez(tmp_path / "other.npz", norms=np.ones(3))
    np.save(tmp_path / "array.npy", np.ones(3))
    for name in ("text.npz", "empty.npz", "other.npz", "array.npy"):
        with pytest.raises(ValueError, match=f"{name} holds none"):
            RefinedLR(optimizer(), str(tmp_path / name), 5)
    with pytest.raises(ValueError, match="at least 2|integer >= 2"):
        resample(torch.ones(3), 1)


def test_a_record_survives_its_file(tmp_path):
    record = NormRecord(torch.rand(7).double(), "l1", "Adam", 1e-3, total_steps=10, steps=7, batch_size=32, version="1")
    record.save(tmp_path / "gradnorms.npz")
    loaded = NormRecord.load(tmp_path / "gradnorms.npz")
    assert torch.equal(loaded.norms, record.norms)
    assert (loaded.norm, loaded.optimizer, loaded.lr, loaded.batch_size) == ("l1", "Adam", 1e-3, 32)
    assert not loaded.complete
    assert [path.name for path in tmp_path.iterdir()] == ["gradnorms.npz"]  # no temporary file is left
    with pytest.raises(FileNotFoundError):
        NormRecord.load(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", schedule=np.ones(3))
    with pytest.raises(ValueError, match=r"other.npz holds no record of gradient norms"):
        NormRecord.load(tmp_path / "other.npz")


def test_horizons_of_torchs_schedulers():
    from torch.optim import lr_scheduler as torch_schedulers

    o = optimizer(0.1)
    assert horizon(torch_schedulers.CosineAnnealingLR(o, T_max=20)) == ("T_max", 20)
    assert horizon(torch_schedulers.PolynomialLR(o, total_iters=7)) == ("total_iters", 7)
    assert horizon(torch_schedulers.StepLR(o, step_size=3)) is None
    parts = [torch_schedulers.ConstantLR(o, total_iters=5), torch_schedulers.CosineAnnealingLR(o, T_max=20)]
    both = torch_schedulers.SequentialLR(o, parts, milestones=[5])
    assert horizon(both) == ("T_max", 25)
