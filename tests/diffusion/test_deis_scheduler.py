"""DEIS for VP, VE and flow-matching models: parity with diffusers where it has the method, and known problems."""

import copy
import math
import pickle

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    ScoreSdeVeScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from lightning_opt.diffusion import DEISScheduler, FlowMatching, VarianceExploding, VariancePreserving
from lightning_opt.diffusion.deis import ALGORITHMS
from tests.reference.deis import GaussianMixture

# numpy's, of tensors in diffusers
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

F64 = torch.float64
TOY = GaussianMixture()


def output(scheduler, x, rho):
    """The output of a model that knows the mixture, in the scheduler's prediction type."""
    a = scheduler.noise.signal(rho)
    epsilon = TOY.epsilon(x.double() / a, rho)
    x0 = x / a - rho * epsilon
    n = math.hypot(1, rho)
    return {
        "epsilon": epsilon,
        "score": -epsilon / (a * rho),
        "sample": x0,
        "v_prediction": (epsilon - rho * x0) / n,
        "flow_prediction": epsilon - x0,
    }[scheduler.config.prediction_type].to(x.dtype)


def levels(scheduler):
    return [call.rho for call in scheduler._plan.calls]


def sample(scheduler, x, begin=0):
    for t, rho in zip(scheduler.timesteps[begin:], levels(scheduler)[begin:], strict=True):
        x = scheduler.step(output(scheduler, x, rho), t, x).prev_sample
    return x


def sample_theirs(theirs, ours, x):
    """At the levels of ours."""
    for t, rho in zip(theirs.timesteps, levels(ours), strict=True):
        x = theirs.step(output(ours, x, rho), t, x).prev_sample
    return x


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("steps", "exact", "tolerance"), [(10, False, 1e-5), (14, True, 1e-8), (20, True, 1e-8)])
def test_log_rho_polynomials_are_those_of_diffusers(order, steps, exact, tolerance):
    """Their coefficients cancel in float32, to 3e-5 at 20 steps; with levels in float64 they are ours to 1e-8.

    Theirs end with lower orders below 15 steps.
    """
    options = {"solver_order": order, "lower_order_final": steps < 15}
    theirs = DEISMultistepScheduler(**options)
    theirs.set_timesteps(steps)
    if exact:
        theirs.sigmas = theirs.sigmas.double()
    ours = DEISScheduler.from_config(theirs.config, deis_type="logrho_ab", final_sigmas_type="sigma_min", **options)
    ours.set_timesteps(sigmas=theirs.sigmas[:-1].clamp(ours.noise.rho_min, ours.noise.largest_rho).tolist())
    x = torch.randn(200, dtype=F64)
    torch.testing.assert_close(sample(ours, x), sample_theirs(theirs, ours, x), rtol=0, atol=tolerance)


def test_the_grid_of_a_diffusers_config_is_the_same_but_for_rounding():
    for spacing in ("linspace", "trailing"):
        theirs = DEISMultistepScheduler(timestep_spacing=spacing)
        ours = DEISScheduler.from_config(theirs.config)
        theirs.set_timesteps(20)
        ours.set_timesteps(20)
        assert (ours.timesteps - theirs.timesteps).abs().max() <= 1
    theirs = DEISMultistepScheduler(timestep_spacing="leading", steps_offset=1)
    ours = DEISScheduler.from_config(theirs.config)
    theirs.set_timesteps(19)  # a stride of 50 for both
    ours.set_timesteps(19)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps.float(), rtol=0, atol=1e-3)
    for name in ("use_karras_sigmas", "use_exponential_sigmas"):
        theirs = EulerDiscreteScheduler(**{name: True})
        ours = DEISScheduler.from_config(theirs.config)
        theirs.set_timesteps(21)
        ours.set_timesteps(20)
        torch.testing.assert_close(ours.sigmas[:-1], theirs.sigmas[:-2], rtol=1e-4, atol=0)


def test_first_order_is_ddim():
    theirs = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    theirs.set_timesteps(20)
    x = torch.randn(200, dtype=F64)
    for algorithm in ("t_ab", "rho_ab", "logrho_ab", "ipndm", "rk_1euler"):
        ours = DEISScheduler.from_config(theirs.config, deis_type=algorithm, solver_order=1)
        ours.set_timesteps(timesteps=theirs.timesteps.tolist())
        y = sample_theirs(theirs, ours, x)
        # float32 square roots of 1 - alpha at the last steps
        torch.testing.assert_close(sample(ours, x), y, rtol=0, atol=1e-5)


def test_first_order_is_euler_of_flow_matching():
    """dv / d rho = eps with eps frozen is dx / ds = u with u frozen: an identity."""
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigmas = [0.95 - 0.09 * i for i in range(10)]
    theirs.set_timesteps(sigmas=sigmas)
    ours = DEISScheduler.from_config(theirs.config, deis_type="rho_ab", solver_order=1)
    ours.set_timesteps(sigmas=sigmas)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-7)
    x = torch.randn(200)
    torch.testing.assert_close(sample(ours, x), sample_theirs(theirs, ours, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("noise_schedule", ["vp", "ve", "flow"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "flow_prediction", "score"])
def test_every_prediction_type_gives_the_same_sample(noise_schedule, prediction_type):
    options = {"noise_schedule": noise_schedule, "deis_type": "rho_ab", "solver_order": 3}
    expected = DEISScheduler(**options)
    ours = DEISScheduler(**options, prediction_type=prediction_type)
    for scheduler in (expected, ours):
        scheduler.set_timesteps(6)
    x = expected.init_noise_sigma * torch.randn(50, dtype=F64)
    torch.testing.assert_close(sample(ours, x), sample(expected, x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("algorithm", ["t_ab", "rho_ab", "logrho_ab", "ipndm", "rk_2heun", "rk_4rk"])
@pytest.mark.parametrize(
    "options",
    [
        {"noise_schedule": "vp"},
        {"noise_schedule": "vp", "beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True},
        {"noise_schedule": "ve"},
        {"noise_schedule": "flow", "flow_shift": 3.0},
    ],
)
@pytest.mark.parametrize("grid", [{}, {"spacing": "rho"}])
def test_a_constant_prediction_is_integrated_exactly(algorithm, options, grid):
    """From pure noise with that noise predicted, the last call ends at the data, x_0 itself."""
    scheduler = DEISScheduler(**options, **grid, deis_type=algorithm)
    scheduler.set_timesteps(7)
    noise, x0 = torch.randn(5, dtype=F64), torch.randn(5, dtype=F64)
    rho = scheduler._plan.calls[0].rho
    x = scheduler.noise.signal(rho) * (x0 + rho * noise)
    for t in scheduler.timesteps:
        x = scheduler.step(noise, t, x).prev_sample
    # roundings of levels up to 4096, some of them divided by a signal of 1 / 4096
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-10)
    assert len(scheduler.timesteps) == 7 * scheduler.order
    assert scheduler.sigmas[-1] == 0
    assert scheduler.timesteps.min() >= 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_call_moves_the_sample(algorithm):
    """diffusers' DEIS wastes the last call on a Karras grid: the last level is there twice."""
    scheduler = DEISScheduler(deis_type=algorithm, use_karras_sigmas=True)
    scheduler.set_timesteps(5)
    x = torch.randn(20, dtype=F64)
    for t, rho in zip(scheduler.timesteps, levels(scheduler), strict=True):
        after = scheduler.step(output(scheduler, x, rho), t, x).prev_sample
        assert (after - x).abs().min() > 0
        x = after


@pytest.mark.parametrize(
    ("algorithm", "order", "options"),
    [("t_ab", 2, {}), ("rho_ab", 3, {"warmup": "heun"}), ("rk_4rk", 4, {})],
)
def test_order_of_convergence_on_vp(algorithm, order, options):
    x = torch.randn(100, dtype=F64)

    def result(name, steps, **more):
        scheduler = DEISScheduler(
            deis_type=name,
            spacing="rho",
            spacing_order=5.0,
            final_sigmas_type="sigma_min",
            lower_order_final=False,
            **more,
        )
        scheduler.set_timesteps(steps)
        return sample(scheduler, x)

    exact = result("rk_4rk", 400)  # within 1 / 39 of the last error below
    errors = [
        (result(algorithm, n, solver_order=order, **options) - exact).square().mean().sqrt().item() for n in (80, 160)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


def test_the_model_of_every_diffusers_config():
    for source in (DDPMScheduler, DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler):
        config = source(beta_start=0.001, beta_schedule="scaled_linear", prediction_type="v_prediction").config
        ours = DEISScheduler.from_config(config)
        assert isinstance(ours.noise, VariancePreserving)
        assert ours.config.prediction_type == "v_prediction"
        table = DDPMScheduler.from_config(config).alphas_cumprod.double()
        t = torch.arange(1000, dtype=F64)
        torch.testing.assert_close(ours.noise.signal(ours.noise.rho(t)) ** 2, table, rtol=1e-12, atol=0)
        torch.testing.assert_close(ours.noise.time(ours.noise.rho(t)), t, rtol=0, atol=1e-9)
    flow = DEISScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False).config)
    assert isinstance(flow.noise, FlowMatching)
    assert (flow.config.flow_shift, flow.config.prediction_type, flow.config.use_flow_sigmas) == (
        3.0,
        "flow_prediction",
        True,
    )
    unipc = DEISScheduler.from_config(UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=2.0).config)
    assert isinstance(unipc.noise, FlowMatching)
    ve = DEISScheduler.from_config(ScoreSdeVeScheduler(sigma_max=50.0).config)
    assert isinstance(ve.noise, VarianceExploding)
    assert (ve.init_noise_sigma, ve.config.prediction_type) == (50.0, "score")
    again = DEISScheduler.from_config(flow.config, solver_order=2)
    assert isinstance(again.noise, FlowMatching)


def test_switching_back_keeps_the_model():
    ours = DEISScheduler.from_config(
        DDPMScheduler(beta_schedule="scaled_linear").config, deis_type="t_ab", spacing="t", spacing_order=2.0
    )
    for target in (DDPMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        other = target.from_config(ours.config)
        torch.testing.assert_close(other.alphas_cumprod, DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod)
        other.set_timesteps(10)


def test_saved_and_loaded(tmp_path):
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for ours in (
        DEISScheduler.from_config(flow.config, deis_type="rk_3vdh"),
        DEISScheduler(noise_schedule="ve", sigma_max=20.0, spacing="rho", spacing_order=5.0),
    ):
        ours.save_pretrained(tmp_path)
        loaded = DEISScheduler.from_pretrained(tmp_path)
        for scheduler in (ours, loaded):
            scheduler.set_timesteps(8)
        torch.testing.assert_close(loaded.timesteps, ours.timesteps, rtol=0, atol=0)
        torch.testing.assert_close(loaded.sigmas, ours.sigmas, rtol=0, atol=0)


def test_the_saved_config_of_another_scheduler(tmp_path):
    """A file has every key, also those that were never set."""
    for theirs, model in (
        (EulerDiscreteScheduler(beta_schedule="scaled_linear"), VariancePreserving),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=3), VariancePreserving),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatching),
        (ScoreSdeVeScheduler(), VarianceExploding),
    ):
        theirs.save_pretrained(tmp_path)
        ours = DEISScheduler.from_pretrained(tmp_path)
        assert type(ours.noise) is model
        ours.set_timesteps(5)
    assert ours.init_noise_sigma == 1348


def test_a_copy_goes_on_by_itself():
    scheduler = DEISScheduler(deis_type="rho_ab", use_karras_sigmas=True)
    scheduler.set_timesteps(6)
    x = torch.randn(10, dtype=F64)
    for t, rho in list(zip(scheduler.timesteps, levels(scheduler), strict=True))[:3]:
        x = scheduler.step(output(scheduler, x, rho), t, x).prev_sample
    twins = [scheduler, copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))]
    results = [sample(twin, x, begin=3) for twin in twins]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_in_a_pipeline():
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipe = DDPMPipeline(unet, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    for options in ({}, {"deis_type": "rk_2heun"}, {"deis_type": "t_ab", "warmup": "heun"}):
        pipe.scheduler = DEISScheduler.from_config(DDPMScheduler().config, **options)
        images = [
            pipe(
                batch_size=2, num_inference_steps=5, output_type="np", generator=torch.Generator().manual_seed(0)
            ).images
            for _ in range(2)
        ]
        assert images[0].shape == (2, 8, 8, 1)
        assert (images[0] == images[1]).all()


@pytest.mark.parametrize("algorithm", ["t_ab", "ipndm", "rk_2heun"])
@pytest.mark.parametrize("tell", [True, False])
def test_image_to_image(algorithm, tell):
    """Begin in the middle, by set_begin_index or by the first timestep: as if the levels before had never been."""
    scheduler = DEISScheduler(deis_type=algorithm)
    noise = torch.randn(40, dtype=F64)

    scheduler.set_timesteps(10)
    sample(scheduler, noise)
    scheduler.set_timesteps(10)
    begin = 4 * scheduler.order
    if tell:
        scheduler.set_begin_index(begin)
    x = scheduler.add_noise(torch.full_like(noise, 0.3), noise, scheduler.timesteps[begin : begin + 1])
    result = sample(scheduler, x, begin)
    fresh = DEISScheduler(deis_type=algorithm)
    fresh.set_timesteps(sigmas=levels(scheduler)[begin :: scheduler.order])
    torch.testing.assert_close(sample(fresh, x), result, rtol=0, atol=1e-12)


def test_dynamic_shifting():
    """mu of the pipeline is the log of the shift."""
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    ours = DEISScheduler.from_config(theirs.config)
    sigmas = [1.0 - i / 10 for i in range(10)]
    theirs.set_timesteps(sigmas=sigmas, mu=0.8)
    ours.set_timesteps(sigmas=sigmas, mu=0.8)
    torch.testing.assert_close(ours.sigmas[1:], theirs.sigmas[1:], rtol=1e-5, atol=1e-7)
    assert ours.sigmas[0] == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="mu must be given"):
        ours.set_timesteps(10)


def test_noise_is_added_as_diffusers_does():
    x0, noise = torch.randn(4, 3), torch.randn(4, 3)
    t = torch.tensor([0, 10, 500, 999])
    for theirs in (DDPMScheduler(), DDPMScheduler(beta_schedule="squaredcos_cap_v2")):
        ours = DEISScheduler.from_config(theirs.config)
        torch.testing.assert_close(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), rtol=0, atol=2e-6)
    flow = FlowMatchEulerDiscreteScheduler()
    ours = DEISScheduler.from_config(flow.config)
    t = flow.timesteps[[1, 100, 500, 999]]
    torch.testing.assert_close(ours.scale_noise(x0, t, noise), flow.scale_noise(x0, t, noise), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deis_type": "rk_heun"}, "Did you mean 'rk_3heun'"),
        ({"solver_order": 5}, "solver_order must be in"),
        ({"prediction_type": "noise"}, "prediction_type must be one of"),
        ({"noise_schedule": "edm"}, "noise_schedule must be one of"),
        ({"spacing": "karras"}, "spacing must be one of"),
        ({"spacing_order": 0.0}, "spacing_order"),
        ({"flow_shift": 0.0}, "flow_shift"),
        ({"sigma_max": 1e6}, "the largest noise level must be in"),
        ({"noise_schedule": "ve", "sigma_min": 100.0}, "the largest noise level must be > 100"),
        ({"trained_betas": [0.1, 1.5, 0.2]}, "alphas_cumprod"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        DEISScheduler(**options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EulerDiscreteScheduler(use_beta_sigmas=True).config, "beta grid"),
        (EulerDiscreteScheduler(timestep_type="continuous").config, "log sigma"),
        (DDPMScheduler(thresholding=True).config, "thresholds"),
        (EDMEulerScheduler().config, "EDM's preconditioning"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True).config, "stochastic"),
    ],
)
def test_what_cannot_be_done_is_said(config, message):
    with pytest.raises(ValueError, match=message):
        DEISScheduler.from_config(config)


def test_wrong_use():
    x = torch.zeros(4, 2)
    scheduler = DEISScheduler(solver_order=3)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 0, x)
    with pytest.raises(ValueError, match="order 3 needs at least 3 steps, got 2"):
        scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="num_inference_steps, sigmas or timesteps"):
        scheduler.set_timesteps()
    with pytest.raises(ValueError, match="falling"):
        scheduler.set_timesteps(timesteps=[900, 900, 500, 10])
    with pytest.raises(ValueError, match="not both"):
        scheduler.set_timesteps(timesteps=[900, 800, 500], sigmas=[3.0, 2.0, 1.0])
    with pytest.raises(ValueError, match="is 4, but there are 3 levels"):
        scheduler.set_timesteps(4, sigmas=[3.0, 2.0, 1.0])
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="not in the schedule"):
        scheduler.step(x, 3.3, x)
    x = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
    with pytest.raises(ValueError, match="another batch"):
        scheduler.step(x[:2], scheduler.timesteps[1], x[:2])
    with pytest.raises(ValueError, match="not finite"):
        scheduler.step(x * math.nan, scheduler.timesteps[1], x)


def test_more_steps_than_timesteps_do_not_repeat():
    """Rounded to whole timesteps they would, and a look-up by value would lose its place."""
    for options in ({}, {"spacing": "rho"}, {"timestep_spacing": "leading"}):
        scheduler = DEISScheduler(**options)
        scheduler.set_timesteps(1500)
        assert len(scheduler.timesteps.unique()) == 1500
