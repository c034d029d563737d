"""What every scheduler of log states promises: the properties of diffusers' common scheduler tests, and more.

A test file runs all of them over its scheduler and configs::

    @pytest.mark.parametrize("config", CONFIGS, ids=str)
    @pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
    def test_properties(check, config, tmp_path):
        check(MyScheduler, config, tmp_path)

The "network" is the exact answer for data that are log-normal with the moments of the config, so that a full loop must
give these moments back.
"""

import contextlib
import copy
import inspect
import json
import logging
import pickle
import warnings
from collections.abc import Iterator

import diffusers
import numpy as np
import pytest
import torch

SHAPE = (4, 3, 8, 8)


def network(scheduler, sample, t):
    """The exact output for log-normal data, from a log state."""
    p = scheduler.parametrization
    rho = scheduler.rho_at(float(t))
    shift = scheduler.process.mean_shift(scheduler.process.time(rho))
    log_x = sample.float() if sample.dtype in (torch.float16, torch.bfloat16) else sample
    mean, std = p.moments(log_x)
    epsilon = (log_x - shift - mean) * (rho / (rho**2 + std**2))
    return p.output(epsilon, log_x, shift, rho).to(sample.dtype)


def step(scheduler, output, t, sample, seed=None, **kwargs):
    """One step, with a generator where the sampler draws."""
    if "generator" in inspect.signature(scheduler.step).parameters:
        kwargs.setdefault("generator", None if seed is None else torch.Generator().manual_seed(seed))
    return scheduler.step(output, t, sample, **kwargs)


def loop(scheduler, sample, steps=10, seed=0, begin=0):
    """The whole schedule, from a log state at its beginning."""
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    kwargs = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    if begin:
        scheduler.set_begin_index(begin)
    for t in scheduler.timesteps[begin:]:
        scheduler.scale_model_input(sample, t)
        sample = scheduler.step(network(scheduler, sample, t), t, sample, **kwargs).prev_sample
    return sample


def prior(scheduler, shape=SHAPE, seed=0, dtype=torch.float32):
    return scheduler.sample_prior(shape, torch.Generator().manual_seed(seed), dtype=dtype)


def draws(scheduler) -> bool:
    """Whether a step has noise in it."""
    samples = []
    for seed in (0, 1):
        scheduler.set_timesteps(5)
        t, sample = scheduler.timesteps[0], prior(scheduler)
        samples.append(step(scheduler, network(scheduler, sample, t), t, sample, seed).prev_sample)
    return not torch.equal(*samples)


@contextlib.contextmanager
def config_warnings() -> Iterator[list[str]]:
    """What diffusers says about configs meanwhile."""
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger, listener = diffusers.utils.logging.get_logger("diffusers.configuration_utils"), Listener(logging.WARNING)
    logger.addHandler(listener)
    try:
        yield heard
    finally:
        logger.removeHandler(listener)


# --- saving and loading ---


def check_a_saved_scheduler_does_the_same(cls, config, tmp_path):
    scheduler = cls(**config)
    scheduler.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    start = prior(scheduler)
    torch.testing.assert_close(loop(again, start), loop(scheduler, start), rtol=0, atol=0)
    keys = inspect.signature(cls.__init__).parameters.keys() - {"self"}
    assert {key: again.config[key] for key in keys} == {key: scheduler.config[key] for key in keys}


def check_the_config_is_plain_json(cls, config, tmp_path):
    scheduler = cls(**config)
    scheduler.save_config(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == cls.__name__
    for key, value in config.items():
        assert saved[key] == value
    again = cls.from_config(cls.load_config(tmp_path))
    assert all(again.config[key] == scheduler.config[key] for key in saved if not key.startswith("_"))


def check_switching_to_a_compatible_scheduler_and_back(cls, config, tmp_path):
    scheduler = cls(**config)
    assert cls in scheduler.compatibles
    for other in scheduler.compatibles:
        with config_warnings() as heard:
            there = other.from_config(scheduler.config)
            back = cls.from_config(there.config)
        assert heard == []
        for key in set(there.config) & set(scheduler.config) - {"_class_name", "_use_default_values"}:
            assert there.config[key] == scheduler.config[key] or key not in config, key
        assert all(back.config[key] == scheduler.config[key] for key in config)
        start = prior(scheduler)
        torch.testing.assert_close(prior(there), start)
        torch.testing.assert_close(loop(back, start), loop(scheduler, start), rtol=0, atol=0)
        assert torch.isfinite(loop(there, start)).all()


def check_a_config_of_another_version(cls, config, tmp_path):
    """Unknown keys are named and ignored, as by diffusers; missing ones are defaults; unknown names are refused."""
    saved = {key: value for key, value in cls(**config).config.items() if not key.startswith("_")}
    saved["key_of_tomorrow"] = 3
    with config_warnings() as heard:
        scheduler, unused = cls.from_config(saved, return_unused_kwargs=True)
    assert ["key_of_tomorrow" in message for message in heard] == [True]
    assert unused["key_of_tomorrow"] == 3
    del saved["key_of_tomorrow"], saved["rho_min"]
    assert cls.from_config(saved).config.rho_min == inspect.signature(cls.__init__).parameters["rho_min"].default
    with pytest.raises(ValueError, match="prediction_type must be one of .*; got 'of_tomorrow'"):
        cls.from_config({**saved, "prediction_type": "of_tomorrow"})
    with pytest.raises(TypeError, match="key_of_tomorrow"):
        cls(**config, key_of_tomorrow=3)
    assert torch.isfinite(loop(scheduler, prior(scheduler))).all()


def check_copies_are_independent(cls, config, tmp_path):
    scheduler = cls(**config)
    scheduler.set_timesteps(6)
    sample = prior(scheduler)
    for t in scheduler.timesteps[:3]:
        sample = step(scheduler, network(scheduler, sample, t), t, sample, seed=1).prev_sample
    t = scheduler.timesteps[3]
    twins = [copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler)), scheduler]
    results = [step(twin, network(twin, sample, t), t, sample, seed=2).prev_sample for twin in twins]
    assert all(torch.equal(result, results[0]) for result in results)


# --- the interface of diffusers ---


def check_the_public_interface(cls, config, tmp_path):
    scheduler = cls(**config)
    sample = prior(scheduler)
    scheduler.set_timesteps(5)
    assert scheduler.init_noise_sigma > 0
    assert len(scheduler) == scheduler.config.num_train_timesteps
    assert scheduler.num_inference_steps >= 5
    assert scheduler.order >= 1
    assert scheduler.timesteps.dtype == torch.float32
    assert scheduler.scale_model_input(sample, scheduler.timesteps[0]).shape == SHAPE
    assert scheduler.step_index is None
    with pytest.raises(AttributeError, match="no attribute 'beta_start'"):
        scheduler.beta_start  # noqa: B018
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers says that it is deprecated
        assert scheduler.rho_min == scheduler.config.rho_min


def check_steps_keep_the_shape_and_the_dtype(cls, config, tmp_path):
    scheduler = cls(**config)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        scheduler.set_timesteps(5)
        sample = prior(scheduler).to(dtype)
        for t in scheduler.timesteps[:3]:
            result = step(scheduler, network(scheduler, sample, t), t, sample, seed=0)
            assert result.prev_sample.shape == SHAPE
            assert result.prev_sample.dtype == dtype
            assert torch.isfinite(result.prev_sample).all()
            sample = result.prev_sample


def check_half_precision_is_computed_in_float32(cls, config, tmp_path):
    """A step of a half-precision sample is that of the same numbers in float32, rounded once at the end."""
    scheduler = cls(**config)
    for dtype in (torch.float16, torch.bfloat16):
        steps = []
        sample = prior(scheduler).to(dtype)
        for cast in (dtype, torch.float32):
            scheduler.set_timesteps(5)
            t = scheduler.timesteps[0]
            output = network(scheduler, sample, t)
            steps.append(step(scheduler, output.to(cast), t, sample.to(cast), seed=0).prev_sample)
        assert torch.equal(steps[0], steps[1].to(dtype))


def check_a_network_of_another_precision(cls, config, tmp_path):
    """A float32 state with the outputs of a network in bfloat16 or float64: the state is what keeps its dtype."""
    scheduler = cls(**config)
    for dtype in (torch.bfloat16, torch.float64):
        scheduler.set_timesteps(5)
        sample, t = prior(scheduler), scheduler.timesteps[0]
        output = network(scheduler, sample, t).to(dtype)
        other = step(scheduler, output, t, sample, seed=0).prev_sample
        scheduler.set_timesteps(5)
        expected = step(scheduler, output.float(), t, sample, seed=0).prev_sample
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-6)


def check_tuples_and_objects_are_equal(cls, config, tmp_path):
    scheduler = cls(**config)
    results = []
    for return_dict in (True, False):
        scheduler.set_timesteps(5)
        sample, t = prior(scheduler), scheduler.timesteps[0]
        output = network(scheduler, sample, t)
        results.append(step(scheduler, output, t, sample, seed=0, return_dict=return_dict))
    assert isinstance(results[1], tuple)
    for from_object, from_tuple in zip(results[0].to_tuple(), results[1], strict=True):
        assert torch.equal(from_object, from_tuple)
    assert torch.equal(results[0]["prev_sample"], results[1][0])


def check_steps_change_nothing_they_are_given(cls, config, tmp_path):
    scheduler = cls(**config)
    scheduler.set_timesteps(5)
    sample, t = prior(scheduler), scheduler.timesteps[0]
    output = network(scheduler, sample, t)
    before = sample.clone(), output.clone(), scheduler.timesteps.clone()
    step(scheduler, output, t, sample, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, (sample, output, scheduler.timesteps), strict=True))


def check_add_noise(cls, config, tmp_path):
    """Log x0 + m + rho noise, at one timestep, at one for each sample, and at whole numbers as in training loops."""
    scheduler = cls(**config)
    generator = torch.Generator().manual_seed(0)
    images = 0.05 + 0.9 * torch.rand(SHAPE, generator=generator, dtype=torch.float64)
    noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    log_x0 = scheduler.to_log(images)
    scheduler.set_timesteps(4)
    noised = scheduler.add_noise(log_x0, noise, scheduler.timesteps[:4])
    for i, t in enumerate(scheduler.timesteps[:4].tolist()):
        rho = scheduler.rho_at(t)
        shift = scheduler.process.mean_shift(scheduler.process.time(rho))
        torch.testing.assert_close(noised[i], log_x0[i] + shift + rho * noise[i], rtol=1e-10, atol=1e-10)
        one = scheduler.add_noise(log_x0[i : i + 1], noise[i : i + 1], scheduler.timesteps[i])
        torch.testing.assert_close(one[0], noised[i], rtol=1e-12, atol=1e-12)
    whole = scheduler.add_noise(log_x0, noise, torch.tensor([100, 200, 300, 400]))
    assert torch.isfinite(whole).all()
    assert scheduler.add_noise(log_x0.half(), noise.half(), scheduler.timesteps[0]).dtype == torch.float16


def check_inputs_of_a_schedule_and_of_a_training_batch_agree(cls, config, tmp_path):
    scheduler = cls(**config)
    scheduler.set_timesteps(5)
    sample, t = prior(scheduler, dtype=torch.float64), scheduler.timesteps[0]
    in_schedule = scheduler.scale_model_input(sample, t)
    in_training = scheduler.scale_model_input(sample, t.expand(4))
    # the timesteps are float32: 1e-7 of 600, over 125, is the relative error of rho
    torch.testing.assert_close(in_schedule, in_training, rtol=2e-6, atol=2e-6)


def check_timesteps_and_noise_levels_invert_each_other(cls, config, tmp_path):
    scheduler = cls(**config)
    rho = torch.logspace(-2, 0, 9, dtype=torch.float64) * scheduler.process.largest_rho
    torch.testing.assert_close(scheduler.rho_at(scheduler.timestep_at(rho)), rho, rtol=1e-12, atol=0)
    assert scheduler.rho_at(scheduler.timestep_at(0.3)) == pytest.approx(0.3, rel=1e-12)


def check_the_prior_has_the_moments_of_noised_data(cls, config, tmp_path):
    scheduler = cls(**config)
    n = 40_000
    sample = prior(scheduler, (n, 3), dtype=torch.float64)
    process = scheduler.process
    mean, std = (np.broadcast_to(m, 3) for m in (scheduler.config.log_mean, scheduler.config.log_std))
    for i in range(3):
        spread = np.hypot(std[i], process.largest_rho)
        # four standard errors
        shift = mean[i] + process.mean_shift(process.t_end)
        assert sample[:, i].mean().item() == pytest.approx(shift, abs=4 * spread / n**0.5)
        assert sample[:, i].std().item() == pytest.approx(spread, rel=4 / (2 * n) ** 0.5)
        assert scheduler.init_noise_sigma >= spread - 1e-12


# --- loops ---


def check_a_full_loop_gives_the_data(cls, config, tmp_path):
    """From the exact prior, through the exact network, to the moments of the data in each channel."""
    scheduler = cls(**config)
    n = 2000
    sample = loop(scheduler, prior(scheduler, (n, 3), dtype=torch.float64), steps=100)
    mean, std = (np.broadcast_to(m, 3) for m in (scheduler.config.log_mean, scheduler.config.log_std))
    for i in range(3):
        # four standard errors, and the error of a first-order method in 100 steps
        assert sample[:, i].mean().item() == pytest.approx(mean[i], abs=4 * std[i] / n**0.5 + 0.05 * std[i]), i
        assert sample[:, i].std().item() == pytest.approx(std[i], rel=4 / (2 * n) ** 0.5 + 0.1), i
    images = scheduler.to_images(sample)
    assert torch.isfinite(images).all()
    assert (sample.exp() > 0).all()


def check_loops_are_reproducible(cls, config, tmp_path):
    scheduler, other = cls(**config), cls(**config)
    start = prior(scheduler)
    assert torch.equal(loop(scheduler, start, seed=3), loop(other, start, seed=3))
    assert torch.equal(loop(scheduler, start, seed=3), loop(other, start, seed=3))  # a second time on both
    if draws(scheduler):
        assert not torch.equal(loop(scheduler, start, seed=3), loop(other, start, seed=4))


def check_a_generator_for_each_sample(cls, config, tmp_path):
    """Sample i of a batch is the one that generator i gives alone."""
    scheduler = cls(**config)

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    start = scheduler.sample_prior(SHAPE, generators(0, 1, 2, 3))
    for i in range(4):
        torch.testing.assert_close(scheduler.sample_prior((1, *SHAPE[1:]), generators(i))[0], start[i])
    if not draws(scheduler):
        return
    scheduler.set_timesteps(5)
    t = scheduler.timesteps[0]
    output = network(scheduler, start, t)
    batch = scheduler.step(output, t, start, generator=generators(0, 1, 2, 3)).prev_sample
    for i in range(4):
        scheduler.set_timesteps(5)
        one = slice(i, i + 1)
        alone = scheduler.step(output[one], t, start[one], generator=generators(i)).prev_sample
        torch.testing.assert_close(alone[0], batch[i])


def check_random_state_is_left_alone(cls, config, tmp_path):
    """With a generator, torch's own random state is neither read nor changed."""
    scheduler = cls(**config)
    start, before = prior(scheduler), torch.get_rng_state()
    first = loop(scheduler, start)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert torch.equal(loop(scheduler, start), first)


def check_any_number_of_steps(cls, config, tmp_path):
    scheduler = cls(**config)
    start = prior(scheduler, (2, 3, 4, 4))
    for steps in (5, 10, 27, 50, 199):
        assert torch.isfinite(loop(scheduler, start, steps)).all()
        assert scheduler.step_index == len(scheduler.timesteps)


def check_every_network_call_moves_the_sample(cls, config, tmp_path):
    """The last one too: none is wasted on a repeated noise level."""
    scheduler = cls(**config)
    scheduler.set_timesteps(10)
    sample = prior(scheduler, dtype=torch.float64)
    for i, t in enumerate(scheduler.timesteps):
        output = network(scheduler, sample, t)
        moved = step(scheduler, output, t, sample, seed=i).prev_sample
        other = step_again(scheduler, i, output + 1, t, sample, seed=i)
        assert (moved - sample).abs().max() > 1e-6, i
        assert (moved - other).abs().max() > 1e-6, i
        sample = moved


def step_again(scheduler, index, output, t, sample, seed):
    """The step at a position from a copy, so that the scheduler stays where it is."""
    twin = copy.deepcopy(scheduler)
    twin._step_index = index
    return step(twin, output, t, sample, seed).prev_sample


def check_timesteps_decrease_over_all_noise_levels(cls, config, tmp_path):
    scheduler = cls(**config)
    for steps in (5, 50, 1000):
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == scheduler.num_inference_steps
        assert (scheduler.sigmas.diff() < 0).all()
        assert scheduler.sigmas[0].item() == pytest.approx(scheduler.process.largest_rho, rel=1e-6)
        assert scheduler.sigmas[-1].item() == 0


def check_beginning_in_the_middle(cls, config, tmp_path):
    """Noised data from a later position on: the way of image to image."""
    scheduler = cls(**config)
    scheduler.set_timesteps(10)
    begin = scheduler.order * 4
    generator = torch.Generator().manual_seed(0)
    log_x0 = torch.zeros(SHAPE, dtype=torch.float64) + scheduler.parametrization.moments(torch.zeros(SHAPE))[0]
    noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    noised = scheduler.add_noise(log_x0, noise, scheduler.timesteps[begin])
    result = loop(scheduler, noised, begin=begin)
    assert torch.isfinite(result).all()
    assert scheduler.begin_index == begin
    with pytest.raises(ValueError, match="begin_index must be in"):
        scheduler.set_begin_index(len(scheduler.timesteps))
    scheduler.set_timesteps(10)
    assert scheduler.begin_index is None


# --- wrong use ---


def check_wrong_use_is_refused(cls, config, tmp_path):
    scheduler = cls(**config)
    sample = prior(scheduler)
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        step(scheduler, sample, 1.0, sample)
    with pytest.raises(ValueError, match="call set_timesteps before, or give a timestep"):
        scheduler.scale_model_input(sample)
    for steps in (0, -1, 2.5):
        with pytest.raises(ValueError, match="num_inference_steps must be"):
            scheduler.set_timesteps(steps)
    scheduler.set_timesteps(7)
    first, third = scheduler.timesteps[0], scheduler.timesteps[2 * scheduler.order]
    with pytest.raises(ValueError, match="not in the schedule"):
        step(scheduler, sample, 123456.0, sample)
    with pytest.raises(ValueError, match=r"set_begin_index\(\d+\) begins there"):
        step(scheduler, sample, third, sample)
    with pytest.raises(ValueError, match="a step has one timestep, got a tensor of shape"):
        step(scheduler, sample, scheduler.timesteps, sample)
    with pytest.raises(ValueError, match=r"\(4, 3, 8, 8\), got \(4, 6, 8, 8\)"):
        step(scheduler, torch.zeros(4, 6, 8, 8), first, sample)
    assert scheduler.step_index is None  # a refused step is not counted
    loop(scheduler, sample, 7)
    with pytest.raises(ValueError, match="all .* steps of the schedule are done"):
        step(scheduler, sample, scheduler.timesteps[-1], sample)


def check_numbers_that_are_not_finite_are_refused(cls, config, tmp_path):
    """From the network or in the sample, with the step at which they came."""
    scheduler = cls(**config)
    for value in (float("nan"), float("inf")):
        scheduler.set_timesteps(6)
        sample = prior(scheduler)
        for t in scheduler.timesteps[:2]:
            sample = step(scheduler, network(scheduler, sample, t), t, sample, seed=0).prev_sample
        t = scheduler.timesteps[2]
        output = network(scheduler, sample, t)
        output[1, 0, 3, 3] = value
        with pytest.raises(ValueError, match=r"not finite at step 2 of \d+ \(timestep .*1 of the network's output"):
            step(scheduler, output, t, sample, seed=0)
    scheduler.set_timesteps(6)
    sample = prior(scheduler)
    output = network(scheduler, sample, scheduler.timesteps[0])
    sample[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite at step 0 of \d+ .*1 of the sample"):
        step(scheduler, output, scheduler.timesteps[0], sample, seed=0)


def check_images_outside_the_range_are_refused(cls, config, tmp_path):
    scheduler = cls(**config)
    with pytest.raises(ValueError, match=r"images must be in \[0, 1\]|data must be positive"):
        scheduler.to_log(torch.tensor([0.5, -0.5]))


PROPERTIES = [check for name, check in list(globals().items()) if name.startswith("check_")]
