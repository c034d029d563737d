import copy
import math
from functools import partial

import pytest
import pytorch_optimizer
import torch
from torch import nn

from lightning_opt.optim import DiffGrad
from tests.reference.diffgrad import diffgrad
from tests.reference.problems import naive_trajectory, noisy_quadratic, trajectory

settings = {
    "DiffGrad": [
        {"lr": 1e-2},
        {"lr": 1e-2, "weight_decay": 0.1, "friction": "relative", "amsgrad": True},
        {"lr": 1e-2, "weight_decay": 0.1, "decoupled": True, "eps_mode": "authors"},
    ]
}


# --- closed forms ---


def test_first_step_is_lr_times_the_sigmoid_of_the_gradient(backend):
    g = torch.tensor([3.0, -0.5, 0.0, 1e-3], dtype=torch.float64)
    path = trajectory(lambda p: DiffGrad(p, lr=0.1, **backend), torch.ones(4).double(), lambda w, t: g, 1)
    expected = 1 - 0.1 * g.abs().sigmoid() * g / (g.abs() + 1e-8)  # g = 0: no motion, no NaN
    torch.testing.assert_close(path[1], expected, rtol=1e-15, atol=0)


def test_constant_gradient_moves_at_half_of_adam(backend):
    g = torch.tensor([0.3, -2.0, 1e-3], dtype=torch.float64)
    start = torch.zeros(3).double()
    ours = trajectory(lambda p: DiffGrad(p, lr=1e-2, **backend), start, lambda w, t: g, 50)
    adam = trajectory(lambda p: torch.optim.Adam(p, lr=1e-2), start, lambda w, t: g, 50)
    # from the second step on; iterates of at most 0.5 carry roundings of 5e-17 into steps of 1e-2
    torch.testing.assert_close(ours[1:].diff(dim=0), adam[1:].diff(dim=0) / 2, rtol=0, atol=2e-16)


def test_previous_gradient_is_not_an_alias():
    """The first release of the authors' code stored p.grad itself, so that the change was zero from step 2 on."""
    paths = []
    for set_to_none in (False, True):
        w = nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
        optimizer = DiffGrad([w], lr=0.1, fused=False)
        for _ in range(20):
            optimizer.zero_grad(set_to_none=set_to_none)
            (w**4).sum().backward()
            optimizer.step()
            assert torch.equal(optimizer.state[w]["previous_grad"], w.grad)
            assert optimizer.state[w]["previous_grad"].data_ptr() != w.grad.data_ptr()
        paths.append(w.detach())
    assert torch.equal(*paths)
    start = torch.tensor([3.0, -2.0], dtype=torch.float64)
    naive = naive_trajectory(partial(diffgrad, lr=0.1), start, lambda w, t: 4 * w**3, 20)
    torch.testing.assert_close(paths[0], naive[-1], rtol=0, atol=1e-13)


def test_relative_friction_does_not_depend_on_the_scale_of_the_loss():
    start, gradient = noisy_quadratic(100)

    def run(friction, scale):
        return trajectory(
            lambda p: DiffGrad(p, lr=1e-2, eps=1e-12, friction=friction, fused=False),
            start,
            lambda w, t: scale * gradient(w, t),
            100,
        )

    # eps / |g| <= 1e-12 / 1e-4: below 1e-8 of each step, and of the path
    torch.testing.assert_close(run("relative", 1000.0), run("relative", 1.0), rtol=0, atol=1e-7)
    assert (run("absolute", 1000.0) - run("absolute", 1.0)).abs().max() > 1e-2


def test_escapes_the_local_minimum_of_the_authors_first_problem():
    """F1(x) = (x + 0.3)^2 for x <= 0, (x - 0.2)^2 + 0.05 above, from -1."""

    def gradient(x, t):
        return torch.where(x <= 0, 2 * (x + 0.3), 2 * (x - 0.2))

    options = {"lr": 0.1, "betas": (0.95, 0.999), "eps": 1e-8}
    start, steps = torch.tensor([-1.0], dtype=torch.float64), 299  # the authors count the start as the first of 300
    ours = trajectory(lambda p: DiffGrad(p, **options, fused=False), start, gradient, steps)
    adam = trajectory(lambda p: torch.optim.Adam(p, **options), start, gradient, steps)
    half = trajectory(lambda p: torch.optim.Adam(p, **{**options, "lr": 0.05}), start, gradient, steps)
    assert ours[-1].item() == pytest.approx(-0.30007, abs=5e-6)
    assert ours.max().item() == pytest.approx(-0.0616, abs=5e-5)
    assert adam[-1].item() == pytest.approx(0.20011, abs=5e-6)  # trapped
    assert adam.max().item() == pytest.approx(0.332, abs=5e-4)
    assert half[-1].item() == pytest.approx(-0.3003, abs=5e-5)  # Adam at half the rate is not


# --- independent implementations ---

OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled": True},
    {"eps_mode": "authors", "amsgrad": True},
    {"amsgrad": True, "weight_decay": 0.1},
    {"friction": "relative", "kappa": 3.0, "weight_decay": 0.1},
    {"friction": "relative", "eps_mode": "authors", "amsgrad": True, "betas": (0.5, 0.9), "eps": 1e-2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_follows_the_naive_reference(options, backend):
    start, gradient = noisy_quadratic(100)
    ours = trajectory(lambda p: DiffGrad(p, lr=1e-2, **options, **backend), start, gradient, 100)
    naive = naive_trajectory(partial(diffgrad, lr=1e-2, **options), start, gradient, 100)
    torch.testing.assert_close(ours, naive, rtol=0, atol=2e-14)


def peer(params, *, amsgrad=False, decoupled=False, **options):
    return pytorch_optimizer.DiffGrad(params, ams_bound=amsgrad, weight_decouple=decoupled, **options)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled": True}, {"amsgrad": True}], ids=str
)
def test_agrees_with_pytorch_optimizer(options, foreach):
    start, gradient = noisy_quadratic(200)
    theirs = trajectory(lambda p: peer(p, lr=1e-2, foreach=foreach, **options), start, gradient, 200)

    def run(mode):
        return trajectory(lambda p: DiffGrad(p, lr=1e-2, eps_mode=mode, **options, fused=False), start, gradient, 200)

    torch.testing.assert_close(run("authors"), theirs, rtol=0, atol=1e-12)
    # the paper's eps is sqrt(1 - beta2^t) times the authors', at first 0.03: up to lr * 3e-7 / |g| a step
    assert 1e-9 < (run("paper") - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"weight_decay": 0.1, "decoupled": True}], ids=str)
def test_continues_a_checkpoint_of_pytorch_optimizer(options):
    start, gradient = noisy_quadratic(60)
    whole = trajectory(lambda p: peer(p, lr=1e-2, **options), start, gradient, 60)
    p = nn.Parameter(start.clone())
    theirs = peer([p], lr=1e-2, **options)
    for t in range(30):
        p.grad = gradient(p.detach(), t)
        theirs.step()
    ours = DiffGrad([p], lr=1.0, fused=False)
    ours.load_state_dict(DiffGrad.from_peer_state_dict(copy.deepcopy(theirs.state_dict())))
    for t in range(30, 60):
        p.grad = gradient(p.detach(), t)
        ours.step()
    torch.testing.assert_close(p.detach(), whole[60], rtol=0, atol=1e-12)


def test_checkpoint_with_a_foreign_option_is_refused():
    theirs = pytorch_optimizer.DiffGrad([nn.Parameter(torch.zeros(2))], rectify=True)
    with pytest.raises(ValueError, match="made with rectify=True, which DiffGrad does not have"):
        DiffGrad.from_peer_state_dict(theirs.state_dict())


# --- options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0.0 and finite, got -1.0"),
        ({"lr": math.inf}, "lr must be >= 0.0 and finite, got inf"),
        ({"eps": -1e-8}, "eps must be >= 0.0 and finite, got -1e-08"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0.0, 1.0\), got 1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0.0 and finite, got -1.0"),
        ({"kappa": 0.0}, "kappa must be > 0.0 and finite, got 0.0"),
        ({"kappa": math.nan}, "kappa must be > 0.0 and finite, got nan"),
        ({"friction": "absolut"}, "friction must be one of 'absolute', 'relative'; got 'absolut'. Did you mean"),
        ({"eps_mode": "code"}, "eps_mode must be one of 'paper', 'authors'; got 'code'"),
    ],
)
def test_wrong_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DiffGrad([nn.Parameter(torch.zeros(2))], **options)


def test_parameter_without_gradient_keeps_its_previous_gradient(backend):
    p = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = DiffGrad(p, lr=0.1, **backend)
    for x in p:
        x.grad = torch.full_like(x, 0.5)
    optimizer.step()
    p[0].grad, before = None, p[0].detach().clone()
    optimizer.step()
    assert torch.equal(p[0], before)
    assert torch.equal(optimizer.state[p[0]]["previous_grad"], torch.full((3,), 0.5))
    assert [optimizer.state[x]["step"].item() for x in p] == [1, 2]


def test_previous_gradient_in_bfloat16_changes_only_the_friction():
    start, gradient = noisy_quadratic(50)
    start = start.float()

    def run(state_dtype):
        return trajectory(
            lambda p: DiffGrad(p, lr=1e-2, state_dtype=state_dtype, fused=False),
            start,
            lambda w, t: gradient(w.double(), t).float(),
            50,
        )

    p = nn.Parameter(start.clone())
    optimizer = DiffGrad([p], state_dtype={"previous_grad": "bfloat16"}, fused=False)
    p.grad = torch.ones_like(p)
    optimizer.step()
    dtypes = {name: t.dtype for name, t in optimizer.state[p].items()}
    assert dtypes.pop("previous_grad") == torch.bfloat16
    assert set(dtypes.values()) == {torch.float32}
    # |q| <= 8 has errors up to 2^-9 * 8, sigmoid a slope of at most 1/4: 50 steps of 1e-2 differ by 0.4% at most
    difference = (run({"previous_grad": "bfloat16"}) - run(None)).abs().max()
    assert 0 < difference < 50 * 1e-2 * 0.004


# --- what it tells ---


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.5}, {"weight_decay": 0.5, "maximize": True}, {"friction": "relative", "kappa": 2.0}],
    ids=str,
)
def test_statistics_are_the_friction_of_the_coming_step(options):
    start, gradient = noisy_quadratic(12, dim=40)
    p = nn.Parameter(start.clone())
    optimizer = DiffGrad([p], lr=1e-2, **options, fused=False)
    assert optimizer.statistics() == {}
    previous, v = torch.zeros(40).double(), torch.zeros(40).double()
    for t in range(12):
        p.grad = gradient(p.detach(), t)
        g = (-p.grad if options.get("maximize") else p.grad) + options.get("weight_decay", 0.0) * p.detach()
        v = 0.999 * v + 0.001 * g**2
        change = (previous - g).abs()
        if "friction" in options:
            change = 2 * change / (v / (1 - 0.999 ** (t + 1))).sqrt()
        previous, xi = g, change.sigmoid()
        if t:
            statistics = optimizer.statistics()
            assert statistics["xi_mean"].item() == pytest.approx(xi.mean().item(), rel=1e-6)
            assert statistics["xi_p95"].item() == pytest.approx(xi.sort().values[37].item(), rel=1e-6)  # 38th of 40
        optimizer.step()


def test_relative_friction_spans_its_range_on_noise():
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(4000))
    optimizer = DiffGrad([p], friction="relative", fused=False)
    for _ in range(200):
        p.grad = 1e-6 * torch.randn(4000, generator=generator)
        optimizer.step()
    p.grad = 1e-6 * torch.randn(4000, generator=generator)
    # |q - g| / root mean square is |N(0, 2)|: the mean of its sigmoid is 0.725, its standard deviation 0.13
    z = math.sqrt(2) * torch.randn(1_000_000, generator=generator).abs()
    mean = z.sigmoid().mean().item()
    assert mean == pytest.approx(0.725, abs=1e-3)
    # eps = 1e-8 is 1% of the root; 4000 samples have a standard error of 0.002
    assert optimizer.statistics()["xi_mean"].item() == pytest.approx(mean, abs=0.01)


def test_saturation_is_diagnosed_after_100_logged_steps_in_a_row():
    optimizer = DiffGrad([nn.Parameter(torch.zeros(2))])
    said = [optimizer.diagnose({"xi_mean": 0.505}, step) for step in range(99)]
    said.append(optimizer.diagnose({"xi_mean": 0.7}, 99))
    said += [optimizer.diagnose({"xi_mean": 0.505}, step) for step in range(100, 199)]
    assert said == [None] * 199
    assert 'equals Adam with lr/2; consider friction="relative"' in optimizer.diagnose({"xi_mean": 0.505}, 199)


def test_a_copy_can_diagnose():
    optimizer = copy.deepcopy(DiffGrad([nn.Parameter(torch.zeros(2))]))
    assert optimizer.diagnose({"xi_mean": 0.505}, 0) is None
