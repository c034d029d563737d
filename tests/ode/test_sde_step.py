import math

import pytest
import torch
import torchsde
from torch import Tensor, nn
from torchsde._core.adaptive_stepping import compute_error

from lightning_opt.ode import NeuralSDE, euler_heun_step, local_error, sri_step, step_doubling
from tests.reference import sde_steps

F64 = torch.float64
T, H = 0.2, 0.3
SAMPLES = 7


class Drift(nn.Module):
    """-a^2 sin(y) cos(y)^3: with the diffusion below, y(t) = arctan(a W(t) + tan y(0))."""

    def __init__(self, a: float = 0.8) -> None:
        super().__init__()
        self.a = a

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -(self.a**2) * y.sin() * y.cos() ** 3


class Diffusion(Drift):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.a * y.cos() ** 2


class Linear(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.rate * y


class Net(nn.Module):
    """A small network of time and state, elementwise as a diagonal diffusion has to be for some methods."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(4, 1, 3, generator=torch.Generator().manual_seed(seed), dtype=F64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        a, b, c, d = self.weights
        return (y * a + t * b + c).tanh() * d


def f(t: float, y: float) -> float:
    return math.sin(y) - t * y


def g(t: float, y: float) -> float:
    return 0.5 + 0.4 * math.cos(y) * math.exp(-t)


def dg(t: float, y: float) -> float:
    return -0.4 * math.sin(y) * math.exp(-t)


class F(nn.Module):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return y.sin() - t * y


class G(nn.Module):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.5 + 0.4 * y.cos() * (-t).exp()


def path(shape: tuple[int, ...]) -> torchsde.BrownianInterval:
    levy = {"levy_area_approximation": "space-time"}
    return torchsde.BrownianInterval(0.0, 1.0, shape, dtype=F64, entropy=0, cache_size=None, **levy)


def equation(block: NeuralSDE) -> object:
    class Equation:
        noise_type, sde_type = block.noise_type, block.sde_type
        f = staticmethod(block.drift.forward)
        g = staticmethod(block.diffusion.forward)

    return Equation()


def exact(problem: str, y0: Tensor, w: Tensor) -> Tensor:
    return (0.8 * w + y0.tan()).atan() if problem == "arctan" else y0 * (0.5 * w + (0.3 - 0.125)).exp()


PROBLEMS = {"arctan": (Drift(), Diffusion()), "geometric": (Linear(0.3), Linear(0.5))}


def order(errors: list[float]) -> float:
    """The slope of log errors over steps that halve, by least squares."""
    y = torch.tensor(errors, dtype=F64).log2()
    x = -torch.arange(len(errors), dtype=F64)
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(("method", "expected"), [("euler", 0.5), ("milstein", 1.0), ("srk", 1.5)])
def test_solvers_converge_with_their_strong_order(problem: str, method: str, expected: float) -> None:
    drift, diffusion = PROBLEMS[problem]
    y0 = torch.full((4000, 1), 0.4, dtype=F64)
    noise = path((4000, 1))
    errors = []
    for steps in (16, 32, 64, 128):
        block = NeuralSDE(drift, diffusion, method=method, adaptive=False, dt=1 / steps).eval()
        with torch.no_grad():
            difference = block(y0, noise=noise) - exact(problem, y0, noise(0.0, 1.0))
        errors.append(float(difference.square().mean().sqrt()))
    # 4,000 paths: a root mean square is known to about 1 / sqrt(2 * 4000) = 1 %, a slope over 3 octaves to 0.01; the
    # rest is the next order of the step
    assert order(errors) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_two_steps_of_the_embedded_pair_have_orders_three_halves_and_one(problem: str) -> None:
    drift, diffusion = PROBLEMS[problem]
    noise = path((4000, 1))
    errors: dict[str, list[float]] = {"high": [], "low": []}
    for steps in (16, 32, 64, 128):
        for name, found in errors.items():
            y = torch.full((4000, 1), 0.4, dtype=F64)
            for k in range(steps):
                t, h = k / steps, 1 / steps
                step = sri_step(drift, diffusion, t, y, h, *noise(t, t + h, return_U=True))
                y = step.y1 if name == "high" else step.y1 - step.error
            y0 = torch.full_like(y, 0.4)
            found.append(float((y - exact(problem, y0, noise(0.0, 1.0))).square().mean().sqrt()))
    assert order(errors["high"]) == pytest.approx(1.5, abs=0.1)
    assert order(errors["low"]) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("method", ["euler", "milstein", "euler_heun", "srk"])
def test_step_doubling_is_the_naive_reference(method: str) -> None:
    steps = {
        "euler": lambda t, y, h, dw: sde_steps.euler(f, g, t, y, h, dw),
        "milstein": lambda t, y, h, dw: sde_steps.milstein(f, g, dg, t, y, h, dw),
        "euler_heun": lambda t, y, h, dw: sde_steps.euler_heun(f, g, t, y, h, dw),
    }
    block = NeuralSDE(F(), G(), method=method, sde_type="stratonovich" if method == "euler_heun" else "ito")
    y, noise = torch.linspace(-2, 2, SAMPLES, dtype=F64)[:, None], path((SAMPLES, 1))
    step = step_doubling(equation(block), T, y, H, noise, method)
    first, second = noise(T, T + H / 2, return_U=True), noise(T + H / 2, T + H, return_U=True)
    whole = noise(T, T + H, return_U=True)
    for i in range(SAMPLES):
        start = y[i].item()
        if method == "srk":
            middle, _ = sde_steps.sri(f, g, T, start, H / 2, first[0][i].item(), first[1][i].item())
            end, _ = sde_steps.sri(f, g, T + H / 2, middle, H / 2, second[0][i].item(), second[1][i].item())
            expected = sde_steps.sri(f, g, T, start, H, whole[0][i].item(), whole[1][i].item())[0] - end
        else:
            expected = sde_steps.doubled_error(steps[method], T, start, H, first[0][i].item(), second[0][i].item())
        assert step.error[i].item() == pytest.approx(expected, abs=1e-14)  # some tens of roundings of numbers near 1


def test_the_scaled_error_is_the_one_by_which_torchsde_accepts() -> None:
    y, noise = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0)), path((5, 3))
    step = step_doubling(equation(NeuralSDE(Net(0), Net(1))), T, y, H, noise, "srk")
    ours = local_error(step.error, step.y1 + step.error, step.y1, rtol=1e-2, atol=1e-3)
    theirs = compute_error(step.y1 + step.error, step.y1, rtol=1e-2, atol=1e-3)
    assert ours.item() == pytest.approx(theirs, rel=1e-13)


def test_the_embedded_pair_is_the_naive_reference_and_the_step_of_torchsde() -> None:
    y, noise = torch.linspace(-2, 2, SAMPLES, dtype=F64)[:, None], path((SAMPLES, 1))
    dw, area = noise(T, T + H, return_U=True)
    step = sri_step(F(), G(), T, y, H, dw, area)
    for i in range(SAMPLES):
        high, low = sde_steps.sri(f, g, T, y[i].item(), H, dw[i].item(), area[i].item())
        assert step.y1[i].item() == pytest.approx(high, abs=1e-14)
        assert step.error[i].item() == pytest.approx(high - low, abs=1e-14)
    span = torch.tensor([T, T + H], dtype=F64)
    theirs = torchsde.sdeint(equation(NeuralSDE(F(), G())), y, span, bm=noise, method="srk", dt=1.0)[-1]
    torch.testing.assert_close(step.y1, theirs, rtol=0, atol=1e-14)


def test_lambas_estimate_of_a_linear_equation_is_in_closed_form() -> None:
    mu, sigma = -0.7, 0.4
    y, noise = torch.linspace(-2, 2, SAMPLES, dtype=F64)[:, None], path((SAMPLES, 1))
    dw = noise(T, T + H)
    step = euler_heun_step(Linear(mu), Linear(sigma), T, y, H, dw)
    torch.testing.assert_close(step.y1, y * (1 + mu * H + sigma * dw + sigma**2 * dw**2 / 2), rtol=0, atol=2e-15)
    torch.testing.assert_close(step.error, y * (mu**2 * H**2 / 2 + sigma**2 * dw**2 / 2), rtol=0, atol=2e-15)


@pytest.mark.parametrize(
    ("sde_type", "method", "estimate"),
    [
        ("ito", "euler", "doubling"),
        ("ito", "srk", "doubling"),
        ("stratonovich", "midpoint", "doubling"),
        ("stratonovich", "reversible_heun", "doubling"),
        ("ito", "srk", "embedded"),
        ("stratonovich", "euler_heun", "embedded"),
    ],
)
def test_the_gradient_of_the_error_is_that_of_finite_differences(sde_type: str, method: str, estimate: str) -> None:
    drift, diffusion = Net(0), Net(1)
    block = NeuralSDE(drift, diffusion, sde_type=sde_type, method=method, estimate=estimate)
    u = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(2))

    def value() -> Tensor:
        step = block.step(T, u, H, generator=torch.Generator().manual_seed(3))  # the same noise every time
        return H * local_error(step.error, u, step.y1, rtol=1e-2, atol=1e-2)

    value().backward()
    for weights in (drift.weights, diffusion.weights):
        found, change = torch.empty_like(weights), 1e-6
        with torch.no_grad():
            flat = weights.view(-1)
            for i, before in enumerate(flat.tolist()):
                flat[i] = before + change
                above = value()
                flat[i] = before - change
                found.view(-1)[i] = (above - value()) / (2 * change)
                flat[i] = before
        # the difference quotient is off by roundings of about 1e-16 / 1e-6 and by third derivatives times 1e-12
        assert (weights.grad - found).norm() <= 1e-7 * found.norm()


def test_steps_of_the_block_follow_the_generator() -> None:
    block, u = NeuralSDE(Net(0), Net(1)), torch.zeros(5, 3, dtype=F64)
    generator = torch.Generator().manual_seed(0)
    first, second = block.step(T, u, H, generator=generator), block.step(T, u, H, generator=generator)
    again = block.step(T, u, H, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first.y1, again.y1)
    assert not torch.equal(first.y1, second.y1)
