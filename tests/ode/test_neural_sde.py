import copy
import math
import warnings

import numpy as np
import pytest
import torch
import torchsde
from torch import Tensor, nn

from lightning_opt.ode import TSIT5, NeuralSDE, SolveError

F64 = torch.float64
DIM, CHANNELS, BATCH = 3, 2, 8
SPAN = torch.tensor([0.0, 1.0], dtype=F64)


class Net(nn.Module):
    """A network of time and state that counts its calls; elementwise, or with a matrix for every noise channel."""

    def __init__(self, seed: int, channels: int | None = None, additive: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.channels, self.additive, self.calls = channels, additive, 0
        self.a = nn.Parameter(torch.randn(DIM, channels or 1, generator=generator, dtype=F64))
        self.b = nn.Parameter(torch.randn(DIM, channels or 1, generator=generator, dtype=F64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        state = torch.zeros_like(y) if self.additive else y
        values = (self.a * state[..., None] + self.b * (1 + t)).sin()
        return values if self.channels else values[..., 0]


def block_of(noise_type: str = "diagonal", **arguments: object) -> NeuralSDE:
    channels = {"diagonal": None, "scalar": 1}.get(noise_type, CHANNELS)
    diffusion = Net(1, channels, additive=noise_type == "additive")
    return NeuralSDE(Net(0), diffusion, noise_type=noise_type, rtol=1e-2, atol=1e-2, **arguments)


def start(seed: int = 0) -> Tensor:
    return torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(seed), dtype=F64)


def path(block: NeuralSDE, entropy: int = 0) -> torchsde.BrownianInterval:
    channels = {"diagonal": DIM, "scalar": 1}.get(block.noise_type, CHANNELS)
    levy = {"srk": "space-time", "log_ode": "foster"}.get(block.method, "none")
    size = (BATCH, channels)
    return torchsde.BrownianInterval(0.0, 1.0, size, dtype=F64, entropy=entropy, levy_area_approximation=levy)


def plain(block: NeuralSDE) -> nn.Module:
    """The same equation as torchsde's own users write it."""

    class Equation(nn.Module):
        noise_type, sde_type = block.noise_type, block.sde_type

        def __init__(self) -> None:
            super().__init__()
            self.drift, self.diffusion = block.drift, block.diffusion

        def f(self, t: Tensor, y: Tensor) -> Tensor:
            return self.drift(t, y)

        def g(self, t: Tensor, y: Tensor) -> Tensor:
            return self.diffusion(t, y)

    return Equation()


CASES = [
    ("ito", "euler", "diagonal"),
    ("ito", "euler", "general"),
    ("ito", "milstein", "diagonal"),
    ("ito", "milstein", "scalar"),
    ("ito", "srk", "diagonal"),
    ("ito", "srk", "scalar"),
    ("ito", "srk", "additive"),
    ("stratonovich", "midpoint", "general"),
    ("stratonovich", "heun", "diagonal"),
    ("stratonovich", "euler_heun", "diagonal"),
    ("stratonovich", "reversible_heun", "diagonal"),
    ("stratonovich", "milstein", "additive"),
    ("stratonovich", "log_ode", "general"),
]
cases = pytest.mark.parametrize(("sde_type", "method", "noise_type"), CASES)


@cases
@pytest.mark.filterwarnings("ignore:.*not guaranteed to converge")
@pytest.mark.parametrize("adaptive", [True, False])
def test_the_solve_is_torchsdes_with_fewer_evaluations(
    sde_type: str, method: str, noise_type: str, adaptive: bool
) -> None:
    block = block_of(noise_type, sde_type=sde_type, method=method, adaptive=adaptive, dt=0.13)
    y0 = start()
    ours = block(y0, noise=path(block))
    record = block.last_solve
    assert block.drift.calls == record.nfe_forward
    assert block.diffusion.calls == record.diffusion_forward
    ours.square().sum().backward()
    gradients = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    theirs = torchsde.sdeint(
        plain(block), y0, SPAN, bm=path(block), method=method, dt=0.13, adaptive=adaptive, rtol=1e-2, atol=1e-2
    )[-1]
    assert torch.equal(ours, theirs)
    assert block.drift.calls - record.nfe_forward > record.nfe_forward  # torchsde evaluates some places again
    theirs.square().sum().backward()
    for ours_, theirs_ in zip(gradients, (p.grad for p in block.parameters()), strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-11, atol=1e-11)  # sums in another order


@pytest.mark.parametrize(
    ("method", "sde_type", "attempt"), [("euler", "ito", 2), ("srk", "ito", 11), ("midpoint", "stratonovich", 5)]
)
def test_evaluations_of_an_attempt(method: str, sde_type: str, attempt: int) -> None:
    block = block_of(method=method, sde_type=sde_type, dt=0.3)
    block(start())
    record = block.last_solve
    assert record.rejected > 0
    # the first evaluation of an attempt is that of the one before, if that was rejected; euler's start is the place
    # where a step before ended, which nothing evaluated
    assert record.nfe_forward == attempt * record.accepted + (attempt - 1) * record.rejected


@cases
def test_the_record_holds_the_accepted_steps(sde_type: str, method: str, noise_type: str) -> None:
    block = block_of(noise_type, sde_type=sde_type, method=method, dt=0.3)
    noise = path(block)
    asked: list[tuple[float, float]] = []

    class Listener:
        shape, dtype, device = noise.shape, noise.dtype, noise.device
        levy_area_approximation = noise.levy_area_approximation

        def __call__(self, a: Tensor, b: Tensor, **wanted: bool) -> Tensor:
            asked.append((float(a), float(b)))
            return noise(a, b, **wanted)

    y1 = block(start(), noise=Listener())
    record = block.last_solve
    assert len(asked) == 3 * (record.accepted + record.rejected)
    assert len(record.t) == len(record.dt) == len(record.states) == record.accepted > 1
    ends = [t + h for t, h in zip(record.t, record.dt, strict=True)]
    assert record.t == pytest.approx([0.0, *ends[:-1]], abs=1e-15)
    assert ends[-1] == pytest.approx(1.0, abs=1e-15)
    assert torch.equal(record.states[0], start())
    assert not any(state.requires_grad for state in record.states)
    if method == "reversible_heun":  # its states go with a second one, which is what the drift sees
        return
    for t, h, state, after in zip(record.t, record.dt, record.states, [*record.states[1:], y1], strict=True):
        for a, b in ((t, t + h / 2), (t + h / 2, t + h)):
            span = torch.tensor([a, b], dtype=F64)
            state = torchsde.sdeint(plain(block), state, span, bm=noise, method=method, dt=1.0)[-1]
        torch.testing.assert_close(state, after, rtol=0, atol=1e-12)


def test_nothing_is_recorded_in_evaluation() -> None:
    block = block_of().eval()
    block(start())
    assert block.last_solve.states == []
    assert block.last_solve.accepted > 1


@pytest.mark.parametrize("method", ["midpoint", "reversible_heun"])
@pytest.mark.parametrize("noise_type", ["diagonal", "general"])
def test_the_stochastic_adjoint_has_the_gradient_of_the_steps(method: str, noise_type: str) -> None:
    arguments = {"sde_type": "stratonovich", "method": method, "adaptive": False, "dt": 1 / 64}
    gradients = []
    for adjoint in (False, True):
        block = block_of(noise_type, adjoint=adjoint, **arguments)
        y0 = start().requires_grad_()
        block(y0, noise=path(block)).square().sum().backward()
        gradients.append([y0.grad, *(p.grad for p in block.parameters())])
        record, calls = block.last_solve, (block.drift.calls, block.diffusion.calls)
        assert calls == (
            record.nfe_forward + record.nfe_backward,
            record.diffusion_forward + record.diffusion_backward,
        )
        assert (record.nfe_backward > 0) == adjoint
    for direct, by_adjoint in zip(*gradients, strict=True):
        # reversible Heun goes back through its own steps; midpoint solves the adjoint anew, to half the order of 1/64
        tolerance = 1e-10 if method == "reversible_heun" else 0.1
        assert (by_adjoint - direct).norm() <= tolerance * direct.norm()


@pytest.mark.parametrize("noise_type", ["diagonal", "additive", "general"])
def test_evaluations_of_an_adaptive_adjoint_are_counted(noise_type: str) -> None:
    block = block_of(noise_type, sde_type="stratonovich", adjoint=True)
    block(start()).sum().backward()
    record = block.last_solve
    assert record.nfe_backward > 0
    assert record.diffusion_backward > 0
    assert block.drift.calls == record.nfe_forward + record.nfe_backward
    assert block.diffusion.calls == record.diffusion_forward + record.diffusion_backward


class Constant(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(y, self.value)


def test_states_between_have_the_variance_of_the_equation() -> None:
    count = 20_000
    block = NeuralSDE(Constant(0.0), Constant(1.0), dt=0.5).eval()
    times = [0.0, 0.1, 0.25, 1.0]
    states = block(torch.zeros(count, 1, dtype=F64), times)
    assert states.shape == (4, count, 1)
    spread = 4 * math.sqrt(2 / count)  # four standard deviations of a variance over itself
    assert states.var(dim=1)[1:, 0].tolist() == pytest.approx(times[1:], rel=spread)
    noise = torchsde.BrownianInterval(0.0, 1.0, (count, 1), dtype=F64, entropy=0, levy_area_approximation="space-time")
    grid = torch.tensor(times, dtype=F64)
    sde = plain(block)
    between = torchsde.sdeint(sde, states[0], grid, bm=noise, method="srk", dt=0.5, adaptive=True)
    assert between[1].var().item() < 0.05  # torchsde: (0.1 / 0.5)**2 of the variance at 0.5, instead of 0.1


def test_training_has_new_noise_that_a_checkpoint_continues() -> None:
    block = block_of()
    states = [block(start()) for _ in range(2)]
    saved = copy.deepcopy(block.state_dict())
    third = block(start())
    assert not torch.equal(states[0], states[1])
    other = block_of()
    other.load_state_dict(saved)
    assert torch.equal(other(start()), third)
    assert not torch.equal(block_of(seed=1)(start()), states[0])


def test_every_process_has_its_own_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    first = block_of()(start())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    assert torch.equal(block_of()(start()), first)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert not torch.equal(block_of()(start()), first)


def test_evaluation_has_the_same_noise_and_leaves_training_alone() -> None:
    block, undisturbed = block_of(), block_of()
    first = block.eval()(start())
    assert torch.equal(block(start()), first)
    assert torch.equal(block.train()(start()), undisturbed(start()))


def test_global_random_state_is_not_touched() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    block = block_of("general")
    block(start()).sum().backward()
    block.step(0.0, start(), 0.1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("end", [0.1, 0.7])  # which float32 rounds up, and down
def test_times_that_float32_rounds(end: float) -> None:
    block = block_of(t_span=(0.0, end)).float()
    block(start().float())
    block(start().float(), [0.0, end / 3, end]).sum().backward()
    assert block.last_solve.t1 == end


@pytest.mark.parametrize("method", ["euler", "srk"])
def test_steps_that_divide_a_segment_leave_nothing_at_its_end(method: str) -> None:
    block = NeuralSDE(Constant(1.0), Constant(0.1), method=method, dt=0.05, rtol=1.0, atol=1.0)
    states = block(torch.zeros(4, 1), torch.linspace(0, 1, 41))
    assert states.isfinite().all()
    assert block.last_solve.accepted == 40


def test_half_precision_states_are_solved_in_float32() -> None:
    block = block_of().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert block(start().bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_type": "white"}, "noise_type must be one of"),
        ({"sde_type": "strat"}, "sde_type must be one of"),
        ({"method": "midpoint"}, "method must be one of 'euler', 'milstein', 'srk'"),
        ({"noise_type": "general", "method": "srk"}, "not for general noise: take one of 'euler'"),
        ({"dt": 0.0}, "dt must be > 0"),
        ({"rtol": -1.0}, "rtol must be >= 0"),
        ({"atol": 0.0}, "atol must be > 0"),
        ({"max_steps": 0}, "max_steps must be >= 1"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"estimate": "exact"}, "estimate must be one of"),
        ({"estimate": "embedded", "method": "euler"}, "'doubling' is for all"),
        ({"t_span": (1.0, 0.0)}, "noise is drawn forward in time"),
        ({"t_span": (1.0, 1.0)}, "the first before the second"),
        ({"adjoint_method": "rk4"}, "adjoint_method must be one of"),
    ],
)
def test_wrong_values_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuralSDE(Constant(0.0), Constant(1.0), **arguments)


def test_a_module_without_time_is_named() -> None:
    with pytest.raises(ValueError, match=r"diffusion must take time and state, forward\(t, y\), and Linear.forward"):
        NeuralSDE(Constant(0.0), nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("y0", "times", "message"),
    [
        (torch.zeros(3), None, r"the state must be a floating-point tensor \[batch, dim\], got one of torch.float32"),
        (torch.zeros(3, 1, dtype=torch.int64), None, "the state must be a floating-point tensor"),
        (torch.zeros(3, 1), [0.0, 0.0], "strictly increasing, got .* noise is drawn forward in time"),
        (torch.zeros(3, 1), [1.0, 0.0], "strictly increasing"),
        (torch.zeros(3, 1), [0.0, math.inf], "finite and strictly increasing"),
        (torch.zeros(3, 1), [1.0, 1.0 + 1e-9], "must differ in the precision of the state, torch.float32"),
        (torch.zeros(3, 1), torch.tensor(1.0), "a tensor that is not flat"),
        (torch.zeros(3, 1), torch.tensor([0.0, 1.0], requires_grad=True), "a tensor that requires a gradient"),
        (torch.zeros(0, 1), [0.0, 1.0], r"must have elements, got one of torch.float32, \(0, 1\)"),
        (torch.zeros(3, 1), [0.0], "two or more"),
    ],
)
def test_wrong_states_and_times_are_named(y0: Tensor, times: list[float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuralSDE(Constant(0.0), Constant(1.0))(y0, times)


@pytest.mark.parametrize("adaptive", [True, False])
def test_too_many_steps(adaptive: bool) -> None:
    block = block_of(adaptive=adaptive, dt=1e-3, max_steps=10)
    with pytest.raises(SolveError, match=r"took 10 steps and reached t = 0\.0.*raise max_steps"):
        block(start())


def test_too_many_steps_of_the_adjoint() -> None:
    block = block_of(sde_type="stratonovich", adjoint=True, max_steps=50)
    y1 = block(start())
    block.drift.a.data.mul_(1e3)  # harder on the way back than it was on the way there
    with pytest.raises(SolveError, match=r"the stochastic adjoint .* took 50 steps and went back to t = 0\.9"):
        y1.sum().backward()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("adaptive", [True, False])
def test_a_state_that_is_not_finite(value: float, adaptive: bool) -> None:
    block = NeuralSDE(Constant(value), Constant(1.0), adaptive=adaptive, max_steps=100)
    with pytest.raises(SolveError, match="the state is not finite at t = "):
        block(torch.zeros(2, 1))


def test_steps_below_the_precision_of_time() -> None:
    class Jump(nn.Module):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return 1e12 * (t > 0.5) * (1 + y)

    block = NeuralSDE(Jump(), Constant(0.0), method="euler", rtol=1e-6, atol=1e-6)
    with pytest.raises(SolveError, match="the step became too small"):
        block(torch.zeros(2, 1))


def test_the_adjoint_refuses_noise_without_memory() -> None:
    block = block_of(sde_type="stratonovich", adjoint=True)

    class Forgetful:
        shape, dtype, device, levy_area_approximation = (BATCH, DIM), F64, torch.device("cpu"), "none"
        generator = torch.Generator().manual_seed(0)

        def __call__(self, a: Tensor, b: Tensor) -> Tensor:
            root = math.sqrt(float(b) - float(a))
            return root * torch.randn(self.shape, generator=self.generator, dtype=F64)

    with pytest.raises(ValueError, match="does not answer alike when asked again: give a torchsde.BrownianInterval"):
        block(start(), noise=Forgetful())


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([[0.1, 0.3], [-0.2, 0.1]], dtype=F64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return y @ self.weights


def test_a_diagonal_diffusion_that_mixes_entries_is_refused_where_torchsde_is_wrong() -> None:
    y0 = torch.ones(4, 2, dtype=F64)
    with pytest.raises(ValueError, match="take sde_type='stratonovich', or adjoint=False"):
        NeuralSDE(Constant(0.1), Mixing(), method="euler", adjoint=True)(y0)
    with pytest.raises(ValueError, match="entries of the diffusion depend on other entries"):
        NeuralSDE(Constant(0.1), Mixing(), sde_type="stratonovich", method="milstein")(y0)
    block = block_of(adjoint=True, method="euler")  # elementwise
    block(start()).sum().backward()
    NeuralSDE(Constant(0.1), Mixing(), sde_type="stratonovich", adjoint=True)(y0).sum().backward()


def test_no_warning_reaches_the_user() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block_of("general", method="euler")(start()).sum().backward()


def test_a_tableau_is_refused() -> None:
    with pytest.raises(ValueError, match="from its own solver, 'srk', not from a tableau"):
        block_of().step(0.0, start(), 0.1, TSIT5)
